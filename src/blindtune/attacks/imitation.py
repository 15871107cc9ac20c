"""The adversary plays the customer: public text through the public bottom, with or without noise.

Everything about the customer's computation is public but its text and its noise, so an adversary
can make as many pairs of text and states as it likes. Noise is drawn afresh, by the mechanism's own
code.

Shapes: B batch, L length, D hidden, W width of the word embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blindtune.attacks.adversary import Spared, Stack, StatesView
from blindtune.models.given_words import begin_with
from blindtune.models.margins import Margins
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.replacing import privatizer_of, replaced
from blindtune.privacy.word_groups import WordGroups

_NONE = Margins()


@final
class Imitation:
    """The customer's side without the customer.

    Args:
        model: holds embedding and bottom; its parameters are not trained.
        cut: layers of the bottom.
        mechanism: the noise; None: none.
        margins: the tokens around every text, which get none.
        groups: of words, where each becomes its group's before any noise.
        spared: tokens with less noise; they are drawn, as nobody but the customer knows them.
        testing_seed: for tests and repeatable audits: the adversary's noise, which protects nobody.
    """

    def __init__(
        self,
        model: Stack,
        cut: int,
        mechanism: Mechanism | None = None,
        margins: Margins = _NONE,
        groups: WordGroups | None = None,
        spared: Spared | None = None,
        *,
        testing_seed: int | None = None,
    ) -> None:
        self.model, self.cut = model, cut
        self._margins, self._groups, self._spared = margins, groups, spared
        self._draw = torch.Generator()
        if testing_seed is None:
            self._draw.seed()
        else:
            self._draw.manual_seed(testing_seed)
        table_VD = model.embedding.weight
        assert isinstance(table_VD, Tensor), type(table_VD)
        self._privatizer = privatizer_of(mechanism, table_VD, groups, testing_seed=testing_seed)

    @staticmethod
    def of(view: StatesView, *, noised: bool = True, testing_seed: int | None = None) -> Imitation:
        """The customer that a view is of; `noised` False: without noise and word groups."""
        if not noised:
            return Imitation(view.model, view.cut, margins=view.margins)
        return Imitation(
            view.model, view.cut, view.mechanism, view.margins, view.groups, view.spared,
            testing_seed=testing_seed,
        )  # fmt: skip

    @torch.no_grad()
    def states(self, texts: Sequence[Tensor], batch_size: int = 32) -> list[Tensor]:
        """What a customer would send of these texts: [L, D] of each, with fresh noise."""
        made: list[Tensor] = []
        for begin in range(0, len(texts), batch_size):
            some = texts[begin : begin + batch_size]
            ids_BL, mask_BL = padded(some)
            kept = [self._margins.mask(text) for text in some]
            kept_BL = pad_sequence(kept, batch_first=True, padding_value=True)
            hidden_BLD = self._noised(ids_BL, mask_BL, kept_BL)
            made += [row[: len(ids)] for row, ids in zip(hidden_BLD, some, strict=True)]
        return made

    def _noised(self, ids_BL: Tensor, mask_BL: Tensor, kept_BL: Tensor) -> Tensor:
        noise, factors_BL = self._privatizer, (~kept_BL).float()
        if self._spared is not None:
            drawn_BL = torch.rand(factors_BL.shape, generator=self._draw)
            less_BL = (drawn_BL < self._spared.share).to(kept_BL.device) & ~kept_BL
            factors_BL = factors_BL.masked_fill(less_BL, self._spared.factor)
        sent_BL = replaced(noise, self._groups, ids_BL, factors_BL, kept_BL)
        embedding_BLW = self.model.embedding(sent_BL)
        if noise is not None and noise.mechanism.mode == "vector":
            embedding_BLW = noise.embeddings(embedding_BLW, factors_BL)
        hidden_BLD = self.through(embedding_BLW, mask_BL)
        if noise is not None and noise.mechanism.mode == "block-output":
            return noise.block_outputs(hidden_BLD)
        return hidden_BLD

    def through(self, embedding_BLW: Tensor, mask_BL: Tensor, cut: int | None = None) -> Tensor:
        """States [B, L, D] after the bottom, from what the embedding module would give [B, L, W].

        Differentiable. Works for embeddings that belong to no word.

        Args:
            embedding_BLW: word embeddings, before positions, norms and the like are added.
            mask_BL: 1 for tokens, 0 for padding at the right.
            cut: layers to run; None: the bottom's.
        """
        inputs = begin_with(self.model, embedding_BLW, mask_BL)
        end = self.cut if cut is None else cut
        return self.model.run_layers(inputs.hidden_BLD, inputs.calls, 0, end)


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids [B, L] with padding at the right, and their mask (int64)."""
    ids_BL = pad_sequence(list(texts), batch_first=True)
    mask_BL = pad_sequence([torch.ones(len(t), dtype=torch.int64) for t in texts], batch_first=True)
    return ids_BL, mask_BL
