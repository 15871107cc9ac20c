"""Ranking an attack's candidates by what a language would say: a beam over the words of each token.

Sources: re-ranking in Bayes-optimal reconstruction (arXiv 2410.17052) and BeamClean (arXiv
2505.13758): the text that maximises the sum over tokens of

    log P(seen | word) + weight * log P(word | words before).

Two priors: counts of the public text (`NgramPrior`, no model), and any causal language model with
the same vocabulary (`CausalPrior`; for a decoder the vendor's own model is one) or with another
(`spelled_prior`). `JointPrior` takes both.

Beams of several texts, or of all weights of a rehearsed text, grow together by a word a step, so a
model reads them in one batch, each beginning that several of them share once, and of each but its
last word nothing anew.

Shapes: B beams, K candidates, L length, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import Tensor

from blindtune.attacks.adversary import Candidates, Guess, right_tokens, unigram
from blindtune.attacks.causal_reading import CausalReading
from blindtune.errors import ConfigError, DataError
from blindtune.models.decoder import Decoder

WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
SHORTER = 2.0
"""Of trigrams: how many times a shorter context counts as seen."""
TOGETHER = 8
"""Texts whose beams grow together; fewer where several weights are tried on each."""
NO_WORD = -1e6
"""log P of a row that is no word: below all that likelihoods make up for, and still a number."""


class Prior(Protocol):
    """Abstract. What a language says of the next word."""

    def log_probabilities(self, before_BL: Tensor, word_BK: Tensor) -> Tensor:
        """log P(word | words before) [B, K], each beam with words of its own; L may be 0."""

    def forget(self) -> None:
        """Free what it keeps of the words before; called when beams have come to their ends."""


@final
class NgramPrior:
    """Trigrams of public text, smoothed by bigrams and these by single words (MacKay, Peto 1995).

    Args:
        texts: ids [L] of public texts.
        vocabulary_size: V.

    Raises:
        DataError: no texts.
    """

    def __init__(self, texts: Sequence[Tensor], vocabulary_size: int) -> None:
        if not texts:
            raise DataError("expected at least one public text to count words in, got none")
        self._single_V = unigram(texts, vocabulary_size).exp()
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._contexts: Counter[tuple[int, ...]] = Counter()
        for text in texts:
            ids = [-1, *text.tolist()]  # -1: a text begins
            for order in (2, 3):
                for end in range(order, len(ids) + 1):
                    gram = tuple(ids[end - order : end])
                    self._counts[gram] += 1
                    self._contexts[gram[:-1]] += 1

    def log_probabilities(self, before_BL: Tensor, word_BK: Tensor) -> Tensor:
        """See `Prior`."""
        rows = []
        for before, words in zip(before_BL[:, -2:].tolist(), word_BK.tolist(), strict=True):
            context = (-1, *before)[-2:]
            rows.append([self._probability(context, word) for word in words])
        return torch.tensor(rows).log()

    def forget(self) -> None:
        """See `Prior`; it keeps nothing."""

    def _probability(self, context: tuple[int, ...], word: int) -> float:
        if not context:
            return float(self._single_V[word])
        shorter = self._probability(context[1:], word)
        count, of = self._counts[(*context, word)], self._contexts[context]
        return (count + SHORTER * shorter) / (of + SHORTER)


@final
class CausalPrior:
    """A causal language model.

    Args:
        model: its vocabulary is the bottom's; ids beyond it (a table may have more rows than there
            are words) are taken for no words.
        begin_id: what stands before a text's first token; None: the first token gets no prior.
    """

    def __init__(self, model: Decoder, begin_id: int | None = None) -> None:
        self._reading = CausalReading(model)
        self._begin = () if begin_id is None else (begin_id,)
        self._words = int(model.config.vocab_size)

    def log_probabilities(self, before_BL: Tensor, word_BK: Tensor) -> Tensor:
        """See `Prior`."""
        before = [(*self._begin, *row) for row in before_BL.clamp(max=self._words - 1).tolist()]
        known_BK = word_BK.clamp(max=self._words - 1)
        said_BK = self._reading.log_probabilities(before, [0] * len(before), known_BK)
        return said_BK.masked_fill(word_BK >= self._words, NO_WORD)

    def forget(self) -> None:
        """See `Prior`."""
        self._reading.forget()


@final
class JointPrior:
    """Several priors at once: each must find a word likely, as experts that multiply (Hinton 2002).

    A language model knows the language, counts of public text its subject and manner.
    """

    def __init__(self, *priors: Prior) -> None:
        self._priors = priors

    def log_probabilities(self, before_BL: Tensor, word_BK: Tensor) -> Tensor:
        """The sum of their logarithms, normed by nobody (see `Prior`)."""
        said = [prior.log_probabilities(before_BL, word_BK) for prior in self._priors]
        return torch.stack(said).sum(0)

    def forget(self) -> None:
        """See `Prior`."""
        for prior in self._priors:
            prior.forget()


def decode(
    found: Candidates,
    prior: Prior,
    *,
    beams: int = 8,
    weight: float = 1.0,
    until: float = math.inf,
) -> Guess:
    """The likeliest text of every lattice of candidates, by beam search.

    Args:
        found: candidates of every token, from any attack.
        prior: of the language.
        beams: partial texts that are kept.
        weight: of the prior; 0 leaves the likelihoods alone.
        until: no word is added after this time, by the monotonic clock.

    Raises:
        ConfigError: fewer than one beam or a negative weight. TimeoutError: time was up before all
            texts were at their ends.
    """
    if beams < 1 or weight < 0:
        raise ConfigError(f"expected beams >= 1 and weight >= 0, got {beams} and {weight}")
    return _decoded(found, prior, beams, (weight,), until)[0]


def best_weight(
    found: Candidates,
    known: Sequence[Tensor],
    prior: Prior,
    *,
    beams: int = 8,
    weights: Sequence[float] = WEIGHTS,
) -> float:
    """How far to trust the prior beside this attack's likelihoods: tried on texts that are known.

    Estimated likelihoods are off, and off likelihoods with a full prior can read less than without
    one. The adversary rehearses: it noises public texts itself, attacks them, and sees.

    Args:
        found: the attack's candidates of public texts that the adversary noised itself.
        known: those texts. The prior must not be counted from them, or it is trusted too much.
        prior: as for `decode`.
        beams: as for `decode`.
        weights: to choose from; the first one of equals.

    Raises:
        DataError: no texts, or others than the candidates'.
    """
    right = right_by_weight(found, known, prior, beams=beams, weights=weights)
    return weights[right.index(max(right))]


def right_by_weight(
    found: Candidates,
    known: Sequence[Tensor],
    prior: Prior,
    *,
    beams: int = 8,
    weights: Sequence[float] = WEIGHTS,
    until: float = math.inf,
) -> list[int]:
    """How many tokens of known texts each weight reads.

    Arguments and errors as for `best_weight`; `until` as for `decode`.
    """
    if not known or [len(text) for text in known] != [len(words) for words in found.words]:
        raise DataError("expected candidates for each token of at least one known text")
    return [right_tokens(guess, known) for guess in _decoded(found, prior, beams, weights, until)]


@final
class _Lattice:
    """The candidates of one text, and the beams that go through them with one weight."""

    def __init__(self, words_LK: Tensor, seen_LK: Tensor, weight: float, beams: int) -> None:
        self.words_LK, self.weight = words_LK.cpu(), weight
        self._seen_LK, self._beams = seen_LK.cpu().double(), beams if weight else 1
        self.text_BL = torch.empty(1, 0, dtype=torch.int64)
        self._score_B = torch.zeros(1, dtype=torch.float64)

    def is_open(self, at: int) -> bool:
        """Whether a prior can change what is chosen here."""
        choices = len(self._score_B) * int((self._seen_LK[at] > -torch.inf).sum())
        return choices > 1 and self.weight > 0

    def grow(self, at: int, said_BK: Tensor | None) -> None:
        """Go on by a word; None: nothing is said of it."""
        score_BK = self._score_B[:, None] + self._seen_LK[at]
        if said_BK is not None:
            score_BK = score_BK + self.weight * said_BK
        # Of equals the first: candidates come likeliest first.
        score_B, best = score_BK.reshape(-1).sort(descending=True, stable=True)
        score_B, best = score_B[: self._beams], best[: self._beams]
        possible = score_B > -torch.inf  # the likeliest always is
        self._score_B, best = score_B[possible], best[possible]
        parent, choice = best // score_BK.shape[1], best % score_BK.shape[1]
        self.text_BL = torch.cat([self.text_BL[parent], self.words_LK[at, choice][:, None]], 1)


def _decoded(
    found: Candidates, prior: Prior, beams: int, weights: Sequence[float], until: float
) -> list[Guess]:
    """The likeliest texts by each weight."""
    pairs = list(zip(found.words, found.log_likelihoods, strict=True))
    guesses: list[list[Tensor]] = [[] for _ in weights]
    together = max(1, TOGETHER // max(1, sum(weight > 0 for weight in weights)))
    for first in range(0, len(pairs), together):
        some = pairs[first : first + together]
        by_weight = [[_Lattice(*pair, weight, beams) for pair in some] for weight in weights]
        try:
            _grow([lattice for lattices in by_weight for lattice in lattices], prior, until)
        finally:
            prior.forget()
        for guess, lattices in zip(guesses, by_weight, strict=True):
            guess += [lattice.text_BL[0] for lattice in lattices]
    return [tuple(guess) for guess in guesses]


def _grow(lattices: Sequence[_Lattice], prior: Prior, until: float) -> None:
    """Lead the beams of all of them to their ends, a word a step."""
    for at in range(max(len(lattice.words_LK) for lattice in lattices)):
        if time.monotonic() > until:
            raise TimeoutError("expected more time for the language prior")
        live = [lattice for lattice in lattices if at < len(lattice.words_LK)]
        asked = [lattice for lattice in live if lattice.weight]
        said: dict[_Lattice, Tensor] = {}
        if any(lattice.is_open(at) for lattice in asked):
            words = [lattice.words_LK[at].expand(len(lattice.text_BL), -1) for lattice in asked]
            before_BL = torch.cat([lattice.text_BL for lattice in asked])
            said_BK = prior.log_probabilities(before_BL, torch.cat(words)).double()
            said = dict(zip(asked, said_BK.split([len(rows) for rows in words]), strict=True))
        for lattice in live:
            lattice.grow(at, said.get(lattice))
