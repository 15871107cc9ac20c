"""Matching the states that were seen by embeddings of no word.

Source: BiSR (arXiv 2409.00960), section 4.2. The adversary knows the bottom. Dummy embeddings are
moved (AdamW, cosine) until the bottom makes of them the states that were seen; then the nearest
word. Start it from a trained inverter's guess. Of each text the adversary keeps the words of which
the bottom makes the nearer states: these, or the start.

Shapes: B texts, L length, D hidden, W width of word embeddings, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence

from blindtune.attacks.adversary import Guess, StatesView
from blindtune.attacks.imitation import Imitation, padded
from blindtune.errors import ConfigError, DataError
from blindtune.privacy.nearest import NearestRows

TEXTS = 16
"""Texts whose dummy embeddings move together."""
NOTHING = 1e-6
"""Loss of a token that rounding alone explains."""


@dataclass(frozen=True, kw_only=True)
class DummyConfig:
    """How dummy embeddings are moved."""

    steps: int = 600
    """Steps of AdamW, at most; BiSR's number."""
    learning_rate: float = 0.1
    """In units of the word embeddings' own deviation."""
    patience: int = 20
    """Steps in which the loss must fall by a twentieth, or texts are taken to be done."""
    limit_seconds: float = 600.0
    """No step begins after this time. Texts that are moving then keep what is nearer, their start
    or the words that they came to; texts after them keep their start."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.steps < 1 or self.patience < 1 or self.learning_rate <= 0:
            raise ConfigError(
                f"expected steps and patience of at least 1 and a positive learning_rate, got "
                f"{self.steps}, {self.patience} and {self.learning_rate}"
            )
        if not self.limit_seconds > 0:
            raise ConfigError(f"expected limit_seconds > 0, got {self.limit_seconds}")


def tokens_by_dummies(
    view: StatesView, start: Guess | None = None, config: DummyConfig | None = None
) -> tuple[Guess, int]:
    """Words whose embeddings the bottom turns into the states that were seen.

    Args:
        view: its mechanism is not used: under noise this finds what was sent, not the truth.
        start: a guess to begin from; None: the middle of the vocabulary, everywhere.
        config: steps, rate and time.

    Returns:
        The guess, and the number of texts, the first ones, that were done before time ran out. Of
        those that were moving then it has what is nearer, the start or the words that they came to;
        of all after them the start, or (None) a word of no meaning.

    Raises:
        DataError: a start of other lengths.
    """
    config = config or DummyConfig()
    if start is not None and tuple(map(len, start)) != view.lengths:
        raise DataError("expected a start with one token for every state: take this view's guess")
    ends = time.monotonic() + config.limit_seconds
    with torch.no_grad():  # as the module gives them, scaled where it scales
        made_VW = view.model.embedding(
            torch.arange(len(view.table_VD), device=view.table_VD.device)
        )
    search = _Search(Imitation(view.model, view.cut), made_VW, config, ends)
    found: list[Tensor] = []
    done = 0
    for first in range(0, len(view.states), TEXTS):
        states = view.states[first : first + TEXTS]
        words, settled = search.words(states, None if start is None else start[first:][:TEXTS])
        found += words
        done += settled * len(states)
    return tuple(found), done


@final
class _Search:
    """Moves the dummy embeddings of some texts at once.

    Args:
        imitation: makes states of embeddings.
        made_VW: what the embedding module gives for each word.
        config: steps and rate.
        ends: when time is up, by the monotonic clock.
    """

    def __init__(
        self, imitation: Imitation, made_VW: Tensor, config: DummyConfig, ends: float
    ) -> None:
        self._imitation, self._made_VW = imitation, made_VW
        self._config, self._ends = config, ends
        self._rows, self._unit = NearestRows(made_VW), float(made_VW.std())

    def words(self, states: Sequence[Tensor], start: Guess | None) -> tuple[list[Tensor], bool]:
        """The words of these texts, and whether there was time enough."""
        made_VW, lengths = self._made_VW, [len(state) for state in states]
        if time.monotonic() > self._ends:
            return self._unmoved(lengths) if start is None else [t.cpu() for t in start], False
        target_BLD = pad_sequence([state.to(made_VW) for state in states], batch_first=True)
        _, mask_BL = padded([torch.zeros(length, dtype=torch.int64) for length in lengths])
        mask_BL = mask_BL.to(made_VW.device)
        begin_BLW = made_VW.mean(0).expand(*mask_BL.shape, -1)
        if start is not None:
            begin_BLW = made_VW[padded([text.clamp_min(0) for text in start])[0].to(made_VW.device)]
        dummy_BLW, settled = self._moved(begin_BLW, target_BLD, mask_BL)
        ended = self._rows.find(dummy_BLW[mask_BL.bool()]).cpu().split(lengths)
        if start is None:
            return list(ended), settled
        with torch.no_grad():
            ended_BLW = made_VW[padded(list(ended))[0].to(made_VW.device)]
            nearer_B = self._losses(ended_BLW, target_BLD, mask_BL) < self._losses(
                begin_BLW, target_BLD, mask_BL
            )
        both = zip(nearer_B.tolist(), ended, start, strict=True)
        return [end if nearer else begin.cpu() for nearer, end, begin in both], settled

    def _unmoved(self, lengths: Sequence[int]) -> list[Tensor]:
        """The word in the middle of the vocabulary, everywhere."""
        middle_1 = self._rows.find(self._made_VW.mean(0)[None]).cpu()
        return [middle_1.repeat(length) for length in lengths]

    def _moved(self, begin_BLW: Tensor, target_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, bool]:
        """Embeddings that no longer gain, or time or steps ended them; and which it was."""
        dummy_BLW = (begin_BLW / self._unit).clone().requires_grad_()
        optimizer = torch.optim.AdamW([dummy_BLW], self._config.learning_rate, weight_decay=0.0)
        losses: list[float] = []
        for _ in range(self._config.steps):
            if time.monotonic() > self._ends:
                return (dummy_BLW * self._unit).detach(), False
            loss = self._losses(dummy_BLW * self._unit, target_BLD, mask_BL).sum()
            losses.append(float(loss.detach()))
            if losses[-1] <= NOTHING * float(mask_BL.sum()) or self._gains_no_more(losses):
                break
            (dummy_BLW.grad,) = torch.autograd.grad(loss, [dummy_BLW])
            optimizer.step()
        return (dummy_BLW * self._unit).detach(), True

    def _gains_no_more(self, losses: list[float]) -> bool:
        window = self._config.patience
        if len(losses) < 2 * window:
            return False
        return min(losses[-window:]) > 0.95 * min(losses[:-window])

    def _losses(self, embedding_BLW: Tensor, target_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Of every text [B], summed over its tokens."""
        made_BLD = self._imitation.through(embedding_BLW, mask_BL)
        return ((1 - cosine_similarity(made_BLD, target_BLD, dim=2)) * mask_BL).sum(1)
