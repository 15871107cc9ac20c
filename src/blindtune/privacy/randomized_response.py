"""Randomized response: a label stays as it is by chance, and is any other one otherwise.

Source: Warner 1965; for K classes Kairouz, Bonawitz and Ramage 2016 (arXiv 1602.07387); for labels
of training data Ghazi et al. 2021 (arXiv 2102.06062).

    P(y' | y) = e^epsilon / (e^epsilon + K - 1) if y' = y, else 1 / (e^epsilon + K - 1)

Guarantee: whatever is computed from the drawn labels (losses, gradients, any number of passes over
them) is at most e^epsilon times likelier under one label of a record than under another:
epsilon-differential privacy of each label, against all knowledge and computing power.
Conditions: a label is drawn once; drawn again for another job it spends again.
Not covered: what the text says of its label, or its place in a file that is sorted by class
(shuffle first); how many classes there are; correlated records (each spends). Uniform numbers have
53 bits, so an epsilon far above 30 would never change a label: it is refused.

Shapes: N labels, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blindtune.errors import ConfigError, DataError
from blindtune.privacy.entropy import Uniforms

MAX_EPSILON = 30.0


def keep_chance(epsilon: float, classes: int) -> float:
    """The chance of a label to stay as it is."""
    return 1 / (1 + (classes - 1) * math.exp(-epsilon))


def drawn_labels(labels_N: Tensor, classes: int, epsilon: float, uniforms: Uniforms) -> Tensor:
    """A draw for every label: int64 [N].

    Args:
        labels_N: int64, from 0 to `classes` - 1.
        classes: K, at least 2.
        epsilon: of each label.
        uniforms: where randomness comes from.

    Raises:
        ConfigError: an epsilon out of range, or fewer than two classes.
        DataError: labels that are no classes.
    """
    if not 0 < epsilon <= MAX_EPSILON or classes < 2:
        raise ConfigError(
            f"expected an epsilon above 0, at most {MAX_EPSILON:g}, and at least 2 classes, got "
            f"{epsilon} and {classes}"
        )
    if labels_N.is_floating_point() or not bool(((labels_N >= 0) & (labels_N < classes)).all()):
        raise DataError(f"expected labels from 0 to {classes - 1}, got others")
    stays_N = uniforms(len(labels_N)) <= keep_chance(epsilon, classes)
    # Uniform on (0, 1]: so the step to another class is 1 to K - 1, each as likely.
    step_N = (uniforms(len(labels_N)) * (classes - 1)).ceil().long().clamp_(1, classes - 1)
    other_N = (labels_N.cpu() + step_N) % classes
    return torch.where(stays_N, labels_N.cpu(), other_N)
