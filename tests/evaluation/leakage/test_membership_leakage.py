"""The judge of membership inference: by hand, by simulation, by refusal."""

from __future__ import annotations

import pytest
import torch

from blindtune.errors import DataError
from blindtune.evaluation.leakage.membership import membership_leakage


def test_by_hand() -> None:
    leakage = membership_leakage(torch.tensor([3.0, 2.0, 0.0]), torch.tensor([1.0, 2.0]))
    # Pairs: 3 beats both, 2 beats one and ties one, 0 beats none.
    assert leakage.auc == pytest.approx(3.5 / 6)
    # Fewer than 99 others: the highest of them is the threshold, so only 3 is found.
    assert leakage.found == pytest.approx(1 / 3)
    assert leakage.false_positive_rate == pytest.approx(1 / 3)


def test_one_percent_of_the_others_may_be_accused() -> None:
    others = torch.arange(200.0)
    leakage = membership_leakage(torch.tensor([197.5, 198.5, 0.0, 0.0]), others)
    # The second of 200 is the threshold, 198: it accuses 2 of 201 on average.
    assert leakage.found == 0.25
    assert leakage.false_positive_rate == pytest.approx(2 / 201)


@pytest.mark.parametrize("others", [20, 99, 400])
def test_where_nothing_leaks_as_many_are_found_as_are_accused(others: int) -> None:
    generator = torch.Generator().manual_seed(others)
    runs = [
        membership_leakage(
            torch.randn(300, generator=generator), torch.randn(others, generator=generator)
        )
        for _ in range(300)
    ]
    rate = runs[0].false_positive_rate
    assert sum(run.found for run in runs) / 300 == pytest.approx(rate, rel=0.25)
    assert sum(run.found_low > run.false_positive_high for run in runs) <= 8  # 2.5 % of them


def test_a_few_records_that_leak_wholly_are_a_leak() -> None:
    generator = torch.Generator().manual_seed(0)
    members = torch.randn(400, generator=generator)
    members[:32] += 9
    leakage = membership_leakage(members, torch.randn(200, generator=generator))
    assert leakage.auc_low <= 0.5  # the area does not show it
    assert leakage.found_low > leakage.false_positive_high
    assert leakage.leaks
    assert leakage.found == pytest.approx(0.08, abs=0.03)


def test_all_told_apart_still_has_an_interval() -> None:
    leakage = membership_leakage(torch.full((20,), 2.0), torch.full((30,), 1.0))
    assert leakage.auc == 1
    assert 0.8 < leakage.auc_low < 1


def test_intervals_cover() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = 0.7602  # P(x + 1 > y) of standard normals: Phi(1 / sqrt 2)
    covered = 0
    for _ in range(200):
        members = torch.randn(40, generator=generator) + 1
        leakage = membership_leakage(members, torch.randn(60, generator=generator))
        covered += leakage.auc_low <= truth <= leakage.auc_high
    assert covered >= 180


def test_a_nan_is_refused() -> None:
    with pytest.raises(DataError, match="NaN"):
        membership_leakage(torch.tensor([1.0, float("nan")]), torch.tensor([0.0, 1.0]))
