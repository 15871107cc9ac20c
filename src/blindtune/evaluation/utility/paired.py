"""Differences of mean losses on the same texts, their ratios, and how low these may be.

The losses of every model on the same texts are subtracted text by text, so that a text that is hard
for all of them adds no spread. A text's pull on the mean over tokens is found by leaving it out
(jackknife; for texts of one length the usual standard error). With several seeds of tuning the mean
over seeds has a spread of its own. Each spread is stretched by Student's factor for its own number
of texts or seeds, so that few of them are few, and the two are added as squares (Graybill and Wang
1980; Zou and Donner 2008): one-sided, at least 95 % coverage whichever of the two dominates. With
one seed nothing is known of the spread over seeds, and the lower end is over texts alone.

Not covered: texts are taken as drawn independently from what matters. Windows of one long text are
alike, and other texts may lie further off than the lower end says.

Shapes: K seeds, N texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from torch import Tensor

CONFIDENCE = 0.95
"""Of a lower end, one-sided."""
MANY = 1000
"""Degrees from which on Student's factor falls by 0.1 % at most, and is not computed anew."""


@final
@dataclass(frozen=True, eq=False)
class Mean:
    """A mean over tokens and what is uncertain about it."""

    value: float
    errors: Tensor
    """Stretched error by each text, then by each seed. Linear in the losses; its norm is how far
    the lower end lies below the value."""

    @property
    def low(self) -> float:
        """Lower end; minus infinity for a single text."""
        return self.value - float(self.errors.norm())


def mean_of(nats_KN: Tensor, tokens_N: Tensor, confidence: float = CONFIDENCE) -> Mean:
    """Mean a token over all texts and seeds.

    Args:
        nats_KN: what each text adds with each seed, such as the difference of two models' nats.
        tokens_N: scored tokens of each text.
        confidence: of the lower end.
    """
    seeds, texts = nats_KN.shape
    every = float(tokens_N.sum())
    mean_K = nats_KN.sum(1) / every
    value = float(mean_K.mean())
    if texts == 1:
        return Mean(value, torch.tensor([math.inf], dtype=torch.float64))
    apart_N = nats_KN.mean(0) - value * tokens_N
    pull_N = apart_N / (every - tokens_N) * math.sqrt((texts - 1) / texts)
    errors = [student(texts - 1, confidence) * pull_N]
    if seeds > 1:
        factor = student(seeds - 1, confidence)
        errors.append(factor * (mean_K - value) / math.sqrt(seeds * (seeds - 1)))
    return Mean(value, torch.cat(errors))


def ratio_low(part: Mean, whole: Mean) -> float:
    """Lower end of part / whole, of the same texts and seeds; `whole.low` must be above 0.

    A share r is reached if part - r whole, a mean like others, is at least 0 (Fieller 1954). Its
    lower end falls with r and is 0 at the lesser root of a square equation.
    """
    assert whole.low > 0, "the ratio to what may be 0 has no lower end"
    square = whole.value**2 - float(whole.errors @ whole.errors)
    middle = part.value * whole.value - float(part.errors @ whole.errors)
    rest = part.value**2 - float(part.errors @ part.errors)
    return (middle - math.sqrt(max(0.0, middle**2 - square * rest))) / square


@cache
def student(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Student's one-sided factor: t stays below it with this chance."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        enough = _within(angle, min(degrees, MANY)) > 2 * confidence - 1
        low, high = (low, angle) if enough else (angle, high)
    return math.sqrt(min(degrees, MANY)) * math.tan(high)


def _within(angle: float, degrees: int) -> float:
    """Chance of |t| <= sqrt(degrees) tan(angle) (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
