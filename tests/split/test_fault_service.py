"""Vendor and customer as processes that are killed, or whose disks are full."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fault_service


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    return fault_service.Sides(tmp_path_factory.mktemp("sides"))


@pytest.mark.parametrize("fault", fault_service.FAULTS)
def test_the_job_ends_as_an_undisturbed_one(sides, fault):
    row = fault_service.try_out(sides, fault, 1, seed=1)
    assert row["equal"], row["different"]


def test_another_result_is_seen(sides, monkeypatch):
    monkeypatch.setitem(sides.calm, "last", sides.calm["last"] + 1)
    row = fault_service.try_out(sides, "customer killed", 1, seed=1)
    assert [what.partition(": ")[2] for what in row["different"]] == ["last: other values"]
