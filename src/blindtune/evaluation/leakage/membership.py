"""How well an attack told trained records from others: the judge of membership inference.

Two numbers: the area under the ROC curve (how often a member is ranked above a non-member; 0.5 is
chance), and the share of members found where 1 % of such as were not trained on are accused falsely
(arXiv 2112.03570), which shows a few leaking records that the area averages away.

Intervals: Wilson's. For the area it is taken at the number of independent records that has the
area's own variance (DeLong, DeLong and Clarke-Pearson 1988), and at the smaller group's size where
that variance is 0. The share's interval is for the threshold that was taken, the score of the r-th
highest of K others. How many others it accuses among all there are is not known: for r of K records
of one kind that share has the mean r / (K + 1) and the distribution Beta(r, K + 1 - r), whose upper
end is given. What is found above that end is no chance.

Shapes: M members, K others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.errors import ConfigError, DataError
from blindtune.evaluation.leakage.empirical_privacy import wilson


@dataclass(frozen=True, kw_only=True)
class MembershipLeakage:
    """What one attack found, with confidence intervals."""

    members: int
    others: int
    auc: float
    """P(a member is ranked above another record), ties half; 0.5: chance, 1: all is told."""
    auc_low: float
    auc_high: float
    found: float
    """Share of members above the threshold (TPR)."""
    found_low: float
    found_high: float
    false_positive_rate: float
    """Share of records that were not trained on which the threshold accuses, on average; as asked
    for, or 1 / (K + 1) if the others are too few for that."""
    false_positive_high: float
    """Upper end of that share's interval."""
    confidence: float
    """Of each interval alone."""

    @property
    def leaks(self) -> bool:
        """Whether either number is above chance beyond its interval."""
        return self.auc_low > 0.5 or self.found_low > self.false_positive_high

    def __str__(self) -> str:
        return (
            f"AUC {self.auc:.3f} [{self.auc_low:.3f}, {self.auc_high:.3f}], TPR {self.found:.3f} "
            f"[{self.found_low:.3f}, {self.found_high:.3f}] at {self.false_positive_rate:.1%} FPR"
        )


def membership_leakage(
    member_scores_M: Tensor,
    other_scores_K: Tensor,
    *,
    false_positive_rate: float = 0.01,
    confidence: float = 0.95,
) -> MembershipLeakage:
    """Score an attack by what it said of members and of records that were not trained on.

    Args:
        member_scores_M: of trained records, from an attack; higher: likelier a member.
        other_scores_K: of records of the same kind that were not trained on. If they are of another
            kind, the numbers tell the kinds apart and say nothing of membership.
        false_positive_rate: for `found`; what K others allow is taken, see there.
        confidence: of the intervals.

    Raises:
        DataError: fewer than 2 records of a sort, or a score that is NaN. ConfigError: a rate or
            confidence out of (0, 1).
    """
    if not 0 < false_positive_rate < 1 or not 0 < confidence < 1:
        raise ConfigError(
            "expected false_positive_rate and confidence between 0 and 1, got "
            f"{false_positive_rate} and {confidence}"
        )
    members, others = member_scores_M.double(), other_scores_K.double()
    if members.ndim != 1 or others.ndim != 1 or min(len(members), len(others)) < 2:
        raise DataError(
            "expected scores of at least 2 members and 2 other records, got "
            f"{list(members.shape)} and {list(others.shape)}"
        )
    if bool(members.isnan().any() | others.isnan().any()):
        raise DataError("expected numbers as scores, got NaN: the model's loss is not a number")
    above_MK = (members[:, None] > others).double() + 0.5 * (members[:, None] == others).double()
    auc = float(above_MK.mean())
    low, high = wilson(auc, _independent_records(above_MK, auc), confidence)
    rank = max(1, int(false_positive_rate * (len(others) + 1) + 1e-9))
    threshold = others.sort(descending=True).values[rank - 1]
    found = float((members > threshold).double().mean())
    found_low, found_high = wilson(found, len(members), confidence)
    return MembershipLeakage(
        members=len(members),
        others=len(others),
        auc=auc,
        auc_low=low,
        auc_high=high,
        found=found,
        found_low=found_low,
        found_high=found_high,
        false_positive_rate=rank / (len(others) + 1),
        false_positive_high=_most_accused(rank, len(others), confidence),
        confidence=confidence,
    )


def _most_accused(rank: int, others: int, confidence: float) -> float:
    """Upper end of the share that lies above the `rank`-th highest of so many others.

    The p at which so few as `rank` - 1 successes of so many have the chance (1 - confidence) / 2.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        terms = (
            math.lgamma(others + 1) - math.lgamma(k + 1) - math.lgamma(others - k + 1)
            + k * math.log(p) + (others - k) * math.log1p(-p)
            for k in range(rank)
        )  # fmt: skip
        fewer = sum(map(math.exp, terms))
        low, high = (p, high) if fewer > (1 - confidence) / 2 else (low, p)
    return high


def _independent_records(above_MK: Tensor, auc: float) -> float:
    """How many independent yes-or-no records have the area's variance; at least 1."""
    members, others = above_MK.shape
    variance = float(torch.var(above_MK.mean(1)) / members + torch.var(above_MK.mean(0)) / others)
    count = auc * (1 - auc) / variance if variance > 0 else min(members, others)
    return min(max(1.0, count), float(members + others))
