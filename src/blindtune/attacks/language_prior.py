"""Ranking an attack's candidates by what a language would say: a beam over the words of each token.

Sources: re-ranking in Bayes-optimal reconstruction (arXiv 2410.17052) and BeamClean (arXiv
2505.13758): the text that maximises the sum over tokens of

    log P(seen | word) + weight * log P(word | words before).

Two priors: counts of the public text (`NgramPrior`, no model), and any causal language model with
the same vocabulary (`CausalPrior`); for a decoder the vendor's own model is one.

Shapes: B beams, K candidates, L length, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import Tensor

from blindtune.attacks.adversary import Candidates, Guess, unigram
from blindtune.errors import ConfigError, DataError
from blindtune.models.decoder import Decoder

WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)


class Prior(Protocol):
    """Abstract. What a language says of the next word."""

    def log_probabilities(self, before_BL: Tensor, word_K: Tensor) -> Tensor:
        """log P(word | words before) [B, K]; L may be 0."""


@final
class NgramPrior:
    """Trigrams of public text, smoothed by bigrams and these by single words (MacKay, Peto 1995).

    Args:
        texts: ids [L] of public texts.
        vocabulary_size: V.
        strength: how many times a shorter context counts as seen.

    Raises:
        DataError: no texts.
    """

    def __init__(
        self, texts: Sequence[Tensor], vocabulary_size: int, *, strength: float = 2.0
    ) -> None:
        if not texts:
            raise DataError("expected at least one public text to count words in, got none")
        self._strength = strength
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

    def log_probabilities(self, before_BL: Tensor, word_K: Tensor) -> Tensor:
        """See `Prior`."""
        rows = []
        for before in before_BL.tolist():
            context = (-1, *before)[-2:]
            rows.append([self._probability(context, word) for word in word_K.tolist()])
        return torch.tensor(rows).log()

    def _probability(self, context: tuple[int, ...], word: int) -> float:
        if not context:
            return float(self._single_V[word])
        shorter = self._probability(context[1:], word)
        count, of = self._counts[(*context, word)], self._contexts[context]
        return (count + self._strength * shorter) / (of + self._strength)


@final
class CausalPrior:
    """A causal language model. Cost: for each token a pass over all words before it, a beam.

    Args:
        model: its vocabulary is the bottom's.
        begin_id: what stands before a text's first token; None: the first token gets no prior.
    """

    def __init__(self, model: Decoder, begin_id: int | None = None) -> None:
        self._model, self._begin_id = model, begin_id

    @torch.no_grad()
    def log_probabilities(self, before_BL: Tensor, word_K: Tensor) -> Tensor:
        """See `Prior`."""
        if self._begin_id is not None:
            begin_B1 = before_BL.new_full((len(before_BL), 1), self._begin_id)
            before_BL = torch.cat([begin_B1, before_BL], 1)
        if not before_BL.shape[1]:
            return torch.zeros(len(before_BL), len(word_K))
        device = next(self._model.model.parameters()).device
        inputs = self._model.begin(before_BL.to(device))
        end = self._model.layer_count
        hidden_BLD = self._model.run_layers(inputs.hidden_BLD, inputs.calls, 0, end)
        logits_BV = self._model.logits(hidden_BLD[:, -1:])[:, 0].float()
        return logits_BV.log_softmax(1)[:, word_K.to(device)].cpu()


def decode(
    found: Candidates,
    prior: Prior,
    *,
    beams: int = 8,
    weight: float = 1.0,
) -> Guess:
    """The likeliest text of every lattice of candidates, by beam search.

    Args:
        found: candidates of every token, from any attack.
        prior: of the language.
        beams: partial texts that are kept.
        weight: of the prior; 0 leaves the likelihoods alone.

    Raises:
        ConfigError: fewer than one beam or a negative weight.
    """
    if beams < 1 or weight < 0:
        raise ConfigError(f"expected beams >= 1 and weight >= 0, got {beams} and {weight}")
    pairs = zip(found.words, found.log_likelihoods, strict=True)
    return tuple(_decoded(words_LK, seen_LK, prior, beams, weight) for words_LK, seen_LK in pairs)


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
    if not known or [len(text) for text in known] != [len(words) for words in found.words]:
        raise DataError("expected candidates for each token of at least one known text")
    right = []
    for weight in weights:
        guess = decode(found, prior, beams=beams, weight=weight)
        right.append(sum(int((g == t.cpu()).sum()) for g, t in zip(guess, known, strict=True)))
    return weights[right.index(max(right))]


def _decoded(words_LK: Tensor, seen_LK: Tensor, prior: Prior, beams: int, weight: float) -> Tensor:
    text_BL = torch.empty(1, 0, dtype=torch.int64)
    score_B = torch.zeros(1, dtype=torch.float64)
    for word_K, seen_K in zip(words_LK, seen_LK, strict=True):
        possible = seen_K > -torch.inf  # the likeliest always is
        word_K, seen_K = word_K[possible], seen_K[possible]
        said_BK = prior.log_probabilities(text_BL, word_K).double()
        score_BK = score_B[:, None] + seen_K.double() + weight * said_BK
        score_B, best = score_BK.reshape(-1).topk(min(beams, score_BK.numel()))
        parent, choice = best // len(word_K), best % len(word_K)
        text_BL = torch.cat([text_BL[parent], word_K[choice][:, None]], 1)
    return text_BL[0]
