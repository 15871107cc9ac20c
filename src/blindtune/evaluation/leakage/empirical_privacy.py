"""What an attack got right: guesses beside the truth.

Empirical privacy (EP) is 1 minus the share that an attack gets right (arXiv 2312.15603). It belongs
to one attack with what that attack knew: a stronger attack lowers it, and a high EP under a weak
one promises nothing. State it beside the accounted guarantee, never in its place.

Intervals: tokens of one text are not independent (one text is easier than another), so the
binomial error is widened by the design effect of texts as clusters (Kish 1965), and a Wilson
interval is taken at the number of independent tokens that is left, with Student's factor for so
many texts, because few of them tell little of how much they differ. It is a real interval also
where all or nothing was right.

Shapes: L tokens of one text, N texts or records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from blindtune.errors import ConfigError, DataError
from blindtune.evaluation.utility.paired import student
from blindtune.models.margins import Margins
from blindtune.privacy.token_importance import (
    ContributingTokens,
    ImportanceConfig,
    count_tokens,
)

_NONE = Margins()


@dataclass(frozen=True, kw_only=True)
class EmpiricalPrivacy:
    """1 - right / of for one attack, with a confidence interval."""

    right: int
    """Tokens (or records) that the attack got right."""
    of: int
    """Tokens (or records) that it was asked for, at least 1."""
    low: float
    high: float
    confidence: float
    """That the interval [low, high] covers the EP of texts like these."""

    @property
    def value(self) -> float:
        """EP, between 0 (all is read) and 1 (nothing is)."""
        return 1 - self.right / self.of

    def __str__(self) -> str:
        return (
            f"EP {self.value:.3f} [{self.low:.3f}, {self.high:.3f}] "
            f"({self.right:,} of {self.of:,} right)"
        )


@dataclass(frozen=True, kw_only=True)
class TokenLeakage:
    """What an attack read of texts, by kind of token; None where there are no such tokens."""

    content: EmpiricalPrivacy
    """All tokens but those around a text: the EP to report."""
    special: EmpiricalPrivacy | None = None
    """Start and separator around a text: sent without noise by default, no secret."""
    contributing: EmpiricalPrivacy | None = None
    """Tokens that CTI gave less noise."""
    other: EmpiricalPrivacy | None = None
    """Content tokens with full noise, where CTI was used."""
    rare: EmpiricalPrivacy | None = None
    """Content tokens that are no common words, where it was said which those are."""
    whole_texts: EmpiricalPrivacy
    """Texts of which every content token was right."""


def empirical_privacy(
    guess: Sequence[Tensor],
    truth: Sequence[Tensor],
    *,
    margins: Margins = _NONE,
    contributing: Sequence[Tensor] | None = None,
    common: Tensor | None = None,
    confidence: float = 0.95,
) -> TokenLeakage:
    """Score a guess of token ids.

    Args:
        guess: ids [L] of every text, from an attack.
        truth: the private ids [L] of the same texts (`PrivateStates.ids`).
        margins: the tokens around every text, which are no content.
        contributing: masks [L] of the tokens that CTI spared (`contributing_masks`).
        common: ids of common words (`common_words`), to score the others apart.
        confidence: of the intervals.

    Raises:
        DataError: other texts or lengths than the truth's, or no content at all.
    """
    _check_same_lengths(guess, truth, "guess")
    if contributing is not None:
        _check_same_lengths(contributing, truth, "mask")
    right = [g.cpu() == t.cpu() for g, t in zip(guess, truth, strict=True)]
    content = [~margins.mask(t.cpu()) for t in truth]

    def score(masks: Sequence[Tensor]) -> EmpiricalPrivacy | None:
        counts = [(int(r[m].sum()), int(m.sum())) for r, m in zip(right, masks, strict=True)]
        return scored(counts, confidence)

    all_content = score(content)
    if all_content is None:
        raise DataError("expected at least one content token, got texts of special ones only")
    spared = None if contributing is None else [m.cpu().bool() for m in contributing]
    whole = [bool(r[m].all()) for r, m in zip(right, content, strict=True) if bool(m.any())]
    whole_texts = scored([(int(hit), 1) for hit in whole], confidence)
    assert whole_texts is not None
    return TokenLeakage(
        content=all_content,
        special=score([~m for m in content]),
        contributing=None
        if spared is None
        else score([m & s for m, s in zip(content, spared, strict=True)]),
        other=None
        if spared is None
        else score([m & ~s for m, s in zip(content, spared, strict=True)]),
        rare=None
        if common is None
        else score([m & ~torch.isin(t.cpu(), common) for m, t in zip(content, truth, strict=True)]),
        whole_texts=whole_texts,
    )


def common_words(public: Sequence[Tensor], margins: Margins = _NONE) -> Tensor:
    """Ids of the commonest words, as few as make up half of the tokens of public texts [L].

    Function words nearly all. A privatizer that replaces them alone has an EP of up to a half, and
    sends every other word: score the others apart.
    """
    tokens = torch.cat([margins.content(text) for text in public])
    word_W, count_W = tokens.unique(return_counts=True)
    order = count_W.argsort(descending=True, stable=True)
    before = count_W[order].cumsum(0) - count_W[order]
    common: Tensor = word_W[order[before < len(tokens) / 2]]
    return common


def contributing_masks(
    ids: Sequence[Tensor],
    labels_N: Tensor,
    margins: Margins,
    config: ImportanceConfig,
    *,
    classes: int,
    vocabulary_size: int,
) -> list[Tensor]:
    """Which tokens of training texts CTI gave less noise, bool [L] of each; as `privatize` does."""
    content = [margins.content(text) for text in ids]
    counts = count_tokens(
        content, labels_N.tolist(), classes=classes, vocabulary_size=vocabulary_size
    )
    chosen_CV = ContributingTokens(counts, config).chosen_CV
    assert chosen_CV is not None
    return [
        chosen_CV[int(label)][text] & ~margins.mask(text)
        if label >= 0
        else torch.zeros_like(text, dtype=torch.bool)
        for text, label in zip(ids, labels_N, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class RecordLeakage:
    """What an attack said about records (labels, an attribute), beside what needs no attack."""

    privacy: EmpiricalPrivacy
    """1 - accuracy, over records."""
    blind_accuracy: float
    """Accuracy of always saying the most frequent class: an attack below it found nothing."""

    @property
    def accuracy(self) -> float:
        """Share of records that the attack got right."""
        return 1 - self.privacy.value

    @property
    def advantage(self) -> float:
        """How much of what blind guessing leaves open the attack found: 0 none, 1 all.

        Negative where it did worse than blind guessing.
        """
        open_share = 1 - self.blind_accuracy
        return (self.accuracy - self.blind_accuracy) / open_share if open_share else 0.0


def record_privacy(
    guess_N: Tensor, truth_N: Tensor, *, unnamed: bool = False, confidence: float = 0.95
) -> RecordLeakage:
    """Score a guess of one class a record, such as a label or an attribute.

    Args:
        guess_N: from an attack.
        truth_N: the private classes.
        unnamed: the guess tells groups apart without naming them: each is named by its commonest
            class, as if somebody had told the adversary. By this help even a random grouping is
            a little better than blind guessing where records are few.
        confidence: of the interval.

    Raises:
        DataError: no records, or another number than the truth's.
    """
    if guess_N.shape != truth_N.shape or truth_N.ndim != 1 or not len(truth_N):
        raise DataError(
            f"expected one class for each of at least one record, got {list(guess_N.shape)} for "
            f"{list(truth_N.shape)}"
        )
    if unnamed:
        guess_N = guess_N.clone()
        for group in guess_N.unique():
            guess_N[guess_N == group] = -1 - truth_N[guess_N == group].mode().values
        guess_N = -1 - guess_N
    privacy = scored([(int(g == t), 1) for g, t in zip(guess_N, truth_N, strict=True)], confidence)
    assert privacy is not None
    most = int(truth_N.unique(return_counts=True)[1].max())
    return RecordLeakage(privacy=privacy, blind_accuracy=most / len(truth_N))


def scored(counts: Sequence[tuple[int, int]], confidence: float) -> EmpiricalPrivacy | None:
    """EP of (right, of) counted a text; None if nothing was counted.

    Source of the interval: module docstring.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"expected a confidence between 0 and 1, got {confidence}")
    counted = [(right, of) for right, of in counts if of]
    right, of = sum(r for r, _ in counted), sum(n for _, n in counted)
    if not of:
        return None
    share = right / of
    count = of / _design_effect(counted, share, of)
    low, high = wilson(share, count, confidence, clusters=len(counted) if 0 < right < of else 0)
    return EmpiricalPrivacy(right=right, of=of, low=1 - high, high=1 - low, confidence=confidence)


def _design_effect(counts: Sequence[tuple[int, int]], share: float, of: int) -> float:
    """Variance of the share with texts as clusters, over that of independent tokens; at least 1.

    Where all or nothing was right, or of one text, it cannot be seen: every text counts once then.
    """
    binomial = share * (1 - share) / of
    if len(counts) < 2 or not binomial:
        return of / len(counts)
    residual = sum((right - share * n) ** 2 for right, n in counts)
    clustered = residual * len(counts) / (len(counts) - 1) / of**2
    return max(1.0, clustered / binomial)


def wilson(
    share: float, count: float, confidence: float, *, clusters: int = 0
) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927).

    Where `count` was found from the spread of several clusters, Student's factor for so many stands
    in the place of the normal one: few of them tell little of their spread.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    if clusters > 1:
        z = student(clusters - 1, 0.5 + confidence / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    # Rounding must not leave the share itself outside.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def _check_same_lengths(given: Sequence[Tensor], truth: Sequence[Tensor], what: str) -> None:
    if [t.shape for t in given] != [t.shape for t in truth]:
        raise DataError(
            f"expected a {what} for each of {len(truth)} texts and as long, got {len(given)} of "
            "other lengths: they are of other texts"
        )
