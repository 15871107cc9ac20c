"""How much better than chance an attack picks a planted secret (canary) out of its like.

Exposure (Carlini et al. 2019, arXiv 1802.08232): log2(candidates) - log2(rank of the canary). A
canary that was never trained on has a uniform rank, so its exposure is about 1 bit or less in half
of all draws; the highest possible, log2(candidates), says that the canary is found first.

Shapes: K candidates, the canary among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from blindtune.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """Where one canary came among its candidates."""

    rank: int
    """1: the likeliest. Ties count against the attack."""
    candidates: int

    @property
    def bits(self) -> float:
        """log2(candidates / rank): 0 where the canary came last."""
        return math.log2(self.candidates / self.rank)


def exposure(scores_K: Tensor, canary: int) -> Exposure:
    """Rank a canary among candidates drawn as it was drawn.

    Args:
        scores_K: from an attack such as `attacks.membership.loss_drops`; higher: likelier trained.
        canary: index of the planted one.

    Raises:
        DataError: fewer than 2 candidates, no such index, or a score that is NaN.
    """
    if scores_K.ndim != 1 or len(scores_K) < 2 or not 0 <= canary < len(scores_K):
        raise DataError(
            f"expected scores of at least 2 candidates and one index of them, got "
            f"{list(scores_K.shape)} and {canary}"
        )
    if bool(scores_K.isnan().any()):
        raise DataError("expected numbers as scores, got NaN: the model's loss is not a number")
    return Exposure(rank=int((scores_K >= scores_K[canary]).sum()), candidates=len(scores_K))
