"""Exposure of canaries: by hand, at its ends, by chance."""

from __future__ import annotations

import pytest
import torch

from blindtune.errors import DataError
from blindtune.evaluation.leakage.exposure import exposure


def test_by_hand() -> None:
    found = exposure(torch.tensor([0.0, 3.0, 2.0, 1.0]), 2)
    assert (found.rank, found.bits) == (2, 1.0)
    assert exposure(torch.tensor([0.0, 3.0, 2.0, 1.0]), 1).bits == 2
    assert exposure(torch.tensor([0.0, 3.0, 2.0, 1.0]), 0).bits == 0


def test_a_model_that_tells_nothing_exposes_nothing() -> None:
    assert exposure(torch.zeros(64), 5).bits == 0


def test_a_canary_never_trained_on_has_a_uniform_rank() -> None:
    scores = torch.randn(400, 99, generator=torch.Generator().manual_seed(0))
    ranks = torch.tensor([exposure(row, 0).rank / 99 for row in scores])
    assert 0.45 < ranks.mean() < 0.56


@pytest.mark.parametrize("canary", [-1, 2])
def test_an_index_outside_is_refused(canary: int) -> None:
    with pytest.raises(DataError, match="index"):
        exposure(torch.tensor([0.0, 1.0]), canary)
