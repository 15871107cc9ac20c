"""Commands that are killed, or refused by the disk, end well when they are run again."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fault_processes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return fault_processes.World(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", fault_processes.FAULTS)
def test_every_verb_ends_as_an_undisturbed_one(world, fault):
    for verb in world.verbs:
        row = fault_processes.try_out(world, verb, fault, 1, seed=1)
        assert row["equal"], (verb.name, row["different"])


def test_what_would_be_wrong_is_seen(world):
    verb = next(verb for verb in world.verbs if verb.name == "emulate")
    with world.empty_place() as place:
        assert world.run(verb, fault_processes.Injection(folder=place)).code == 0
        (place / ".out.00c0ffee.partial").touch()
        (place / "out" / "manifest.json").write_bytes(b"{")
        trial = fault_processes.Trial(world, verb, "read-only", None)
        trial.compare()
        trial.half_written()
    assert [what.partition(" [")[0] for what in trial.different] == [
        "0: .out.00c0ffee.partial: left", "0: out/manifest.json: other bytes", "0: half-written:",
    ]  # fmt: skip
