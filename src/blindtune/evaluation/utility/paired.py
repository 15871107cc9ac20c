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
from statistics import NormalDist
from typing import final

import torch
from torch import Tensor

CONFIDENCE = 0.95
"""Of every lower end, one-sided."""


@final
@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over tokens and what is uncertain about it."""

    value: float
    errors: Tensor
    """Stretched error by each text, then by each seed. Linear in the losses; its norm is how far
    the lower end lies below the value."""

    @property
    def low(self) -> float:
        """Lower end; minus infinity for a single text."""
        return self.value - float(self.errors.norm())


def estimate(nats_KN: Tensor, tokens_N: Tensor) -> Estimate:
    """Mean a token over all texts and seeds.

    Args:
        nats_KN: what each text adds with each seed, such as the difference of two models' nats.
        tokens_N: scored tokens of each text.
    """
    seeds, texts = nats_KN.shape
    every = float(tokens_N.sum())
    mean_K = nats_KN.sum(1) / every
    value = float(mean_K.mean())
    if texts == 1:
        return Estimate(value, torch.tensor([math.inf], dtype=torch.float64))
    apart_N = nats_KN.mean(0) - value * tokens_N
    pull_N = apart_N / (every - tokens_N) * math.sqrt((texts - 1) / texts)
    errors = [student(texts - 1) * pull_N]
    if seeds > 1:
        errors.append(student(seeds - 1) * (mean_K - value) / math.sqrt(seeds * (seeds - 1)))
    return Estimate(value, torch.cat(errors))


def ratio_low(part: Estimate, whole: Estimate) -> float:
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
def student(degrees: int) -> float:
    """Student's one-sided 95 % factor; above 2 degrees by its series (Abramowitz, Stegun 26.7.5).

    The series errs by 0.05 % at 3 degrees and less beyond.
    """
    if degrees == 1:
        return math.tan(math.pi * (CONFIDENCE - 0.5))
    if degrees == 2:
        twice = 2 * CONFIDENCE - 1
        return twice * math.sqrt(2 / (1 - twice**2))
    z = NormalDist().inv_cdf(CONFIDENCE)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**k for k, term in enumerate(terms, 1))
