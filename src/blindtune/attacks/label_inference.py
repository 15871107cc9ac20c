"""Label inference in the U-shape: labels stay at home, but gradients and states depend on them.

Source: Li et al. 2022 (arXiv 2102.08504), norm and direction of gradients as a leak of labels in
split learning. For cross-entropy the gradient of a text points, for every class, away from that
class's row of the head; texts of one class so have nearly the same direction, whatever the head,
which the adversary does not know. Hence directions are grouped, without any labelled text.

Groups have no names. Score them with `record_privacy(..., unnamed=True)`: the adversary learns
which texts belong together; one labelled text a class, or guessing, names them.

Shapes: L length, D hidden, N texts, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from blindtune.errors import DataError

STARTS = 16  # of the grouping; the tightest is taken
ROUNDS = 50


def groups_of_gradients(gradients: Sequence[Tensor], classes: int, *, seed: int = 0) -> Tensor:
    """Group texts by the direction of their gradient, int64 [N], groups from 0.

    Args:
        gradients: [L, D] of every text, as the customer sent them, all of one or few steps.
        classes: how many groups; the task's classes are known.
        seed: of the starts.

    Raises:
        DataError: fewer texts than classes, fewer than two classes, or no gradient at all.
    """
    direction_ND = torch.stack([rows.double().sum(0) for rows in gradients]) if gradients else None
    if direction_ND is not None and not bool(direction_ND.norm(dim=1).max() > 0):
        raise DataError("expected gradients, got zeros alone: no label was behind them")
    return _grouped(direction_ND, classes, seed)


def groups_of_states(states: Sequence[Tensor], classes: int, *, seed: int = 0) -> Tensor:
    """Group texts by the mean of what crossed (states, or the trunk's outputs), int64 [N].

    Args and errors as `groups_of_gradients`. Works once tuning has drawn the classes apart.
    """
    if not states:
        return _grouped(None, classes, seed)
    mean_ND = torch.stack([rows.double().mean(0) for rows in states])
    return _grouped(mean_ND - mean_ND.mean(0), classes, seed)


def _grouped(vector_ND: Tensor | None, classes: int, seed: int) -> Tensor:
    """Spherical k-means (Dhillon and Modha 2001), the best of several starts."""
    if vector_ND is None or classes < 2 or len(vector_ND) < classes:
        count = 0 if vector_ND is None else len(vector_ND)
        raise DataError(
            f"expected at least 2 classes and a text for each, got {classes} and {count} texts"
        )
    unit_ND = normalize(vector_ND.cpu(), dim=1)
    draw = torch.Generator().manual_seed(seed)
    best, kept = -torch.inf, torch.zeros(len(unit_ND), dtype=torch.int64)
    for _ in range(STARTS):
        centre_CD = unit_ND[torch.randperm(len(unit_ND), generator=draw)[:classes]]
        for _ in range(ROUNDS):
            near_N, group_N = (unit_ND @ centre_CD.T).max(1)
            sum_CD = torch.zeros_like(centre_CD).index_add_(0, group_N, unit_ND)
            moved_CD = normalize(sum_CD, dim=1)
            moved_CD = torch.where(sum_CD.norm(dim=1, keepdim=True) > 0, moved_CD, centre_CD)
            if torch.equal(moved_CD, centre_CD):
                break
            centre_CD = moved_CD
        if float(near_N.sum()) > best:
            best, kept = float(near_N.sum()), group_N
    return kept
