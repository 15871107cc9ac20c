"""A hundred hostile clients, or a thousand idle connections, beside a job that ends as if alone."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import hostile_clients
from fault_processes import Launcher
from hostile_network import KINDS

EPOCHS = 10


@pytest.fixture(scope="module")
def vendor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    launcher = Launcher(folder / "home", ["blindtune.split.vendor.service"])
    with hostile_clients.Vendor(folder, launcher) as made:
        yield made


@pytest.fixture(scope="module")
def alone(vendor):
    return hostile_clients.beside(vendor, ({}, 0), EPOCHS)


def result(row):
    return row["losses"], row["logits"]


def test_a_hundred_hostile_clients(vendor, alone):
    crowd = hostile_clients.crowds()["100 of all kinds"]
    assert sum(crowd[0].values()) == 100
    row = hostile_clients.beside(vendor, crowd, EPOCHS)
    assert result(row) == result(alone)
    assert len(row["losses"]) == 2 * EPOCHS
    assert row["endings"].keys() == KINDS.keys()
    assert all(sum(counts.values()) >= 5 for counts in row["endings"].values())
    assert row["refused"] > 50
    assert row["grown_MiB"] < 600
    assert row["log_bytes"] < 1 << 20


def test_a_thousand_idle_connections(vendor, alone):
    row = hostile_clients.beside(vendor, ({}, 1000), EPOCHS)
    assert result(row) == result(alone)
    assert sum(row["endings"]["idle at once"].values()) == 1000
    assert row["grown_MiB"] < 200
