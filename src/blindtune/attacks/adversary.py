"""What an adversary of split tuning has: one frozen view for each kind of attack, nothing more.

The adversary is the vendor, or whoever reads what the vendor keeps. It knows the whole model, hence
the bottom, the embedding table and the tokenizer; it knows the mechanism and its eta, which are no
secrets; it has public text of its own. It saw privatized states and, by partition, labels or
gradients. It has neither the noise nor the private text: a view has no field for them, so no attack
can read them by mistake.

Shapes: L tokens of one text, D hidden, V vocabulary, N texts, K best words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.errors import ConfigError, DataError
from blindtune.models.decoder import Decoder
from blindtune.models.encoders import Encoder
from blindtune.models.margins import Margins
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.word_groups import WordGroups

Stack = Decoder | Encoder
Guess = tuple[Tensor, ...]
"""Token ids [L] of every text, int64, in the order of the view."""
_NO_MARGINS = Margins()
UNSEEN = 0.1  # count of a word that the public text lacks


@dataclass(frozen=True, kw_only=True)
class Spared:
    """That some tokens have less noise (CTI). Which ones is not public; how many is taken to be."""

    share: float
    """Of the tokens, those around a text apart; above 0 and below 1."""
    factor: float
    """Of the noise of the others; 0: they are sent as they are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StatesView:
    """States of private texts, and everything public about how they were made."""

    model: Stack
    """The model, or the part of it that holds embedding and bottom."""
    cut: int
    """Layers of the bottom; 0: the states are embeddings."""
    states: tuple[Tensor, ...]
    """[L, D] of every text, as they crossed. Row i belongs to token i."""
    mechanism: Mechanism | None = None
    """The announced noise; None: none."""
    spared: Spared | None = None
    """Tokens with less noise; None: all have the same."""
    groups: WordGroups | None = None
    """Which word stands for which before any noise; public. None: every word for itself."""
    margins: Margins = _NO_MARGINS
    """The tokens around every text: sent without noise, their places are public."""
    public: tuple[Tensor, ...] = ()
    """Token ids [L] of public texts, int64: what the adversary learns from."""

    def __post_init__(self) -> None:
        """Refuse what cannot be of one model."""
        if not 0 <= self.cut <= self.model.layer_count:
            raise ConfigError(
                f"expected a cut from 0 to {self.model.layer_count}, got {self.cut}: give the "
                "layers of the bottom"
            )
        if not self.states:
            raise DataError("expected the states of at least one text, got none")
        width = self.model.hidden_size
        for state in self.states:
            if state.ndim != 2 or not len(state) or state.shape[1] != width:
                raise DataError(
                    f"expected states [tokens, {width}] of every text, got {list(state.shape)}: "
                    "they are not of this model"
                )
            if not bool(state.isfinite().all()):
                raise DataError("expected finite states, got inf or nan: record them again")
        table = self.table_VD
        for ids in self.public:
            if ids.ndim != 1 or ids.is_floating_point() or not _within(ids, len(table)):
                raise DataError(
                    f"expected public texts as ids [L] below {len(table)}: use the bottom's own "
                    "tokenizer"
                )

    @property
    def table_VD(self) -> Tensor:
        """The word embeddings."""
        table = self.model.embedding.weight
        assert isinstance(table, Tensor), type(table)
        return table.detach()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every text."""
        return tuple(len(state) for state in self.states)

    def require_public(self, attack: str, texts: int = 1) -> None:
        """Refuse a view without public text; DataError."""
        if len(self.public) < texts:
            raise DataError(
                f"expected at least {texts} public texts for {attack}, got {len(self.public)}: "
                "give text of the kind that the private texts are"
            )


def unigram(texts: Sequence[Tensor], vocabulary_size: int) -> Tensor:
    """log P(w) [V] by the counts of public texts; a word that they lack counts as `UNSEEN`."""
    count_V = torch.bincount(torch.cat(list(texts)).cpu(), minlength=vocabulary_size).float()
    return ((count_V + UNSEEN) / (count_V.sum() + UNSEEN * vocabulary_size)).log()


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """The K likeliest words of every token: where a prior can choose from."""

    words: tuple[Tensor, ...]
    """Ids [L, K] of every text, likeliest first by likelihood and unigram prior."""
    log_likelihoods: tuple[Tensor, ...]
    """log P(what was seen | word) [L, K], but for a constant a token; without any prior."""

    def first(self) -> Guess:
        """The likeliest word of every token."""
        return tuple(words_LK[:, 0] for words_LK in self.words)


def right_tokens(guess: Sequence[Tensor], truth: Sequence[Tensor]) -> int:
    """How many tokens of texts that the adversary knows a guess has right."""
    return sum(int((g == t.cpu()).sum()) for g, t in zip(guess, truth, strict=True))


def as_guess(ids_T: Tensor, lengths: tuple[int, ...]) -> Guess:
    """Ids of all tokens, text after text, as one tensor a text."""
    return tuple(text.cpu() for text in ids_T.to(torch.int64).split(lengths))


def _within(ids: Tensor, size: int) -> bool:
    return not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < size
