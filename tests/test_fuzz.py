"""The fuzzer: a short run of every target, and proof that it would notice what it looks for."""

import gc
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import fuzz  # noqa: E402
from blindtune.errors import PackageError  # noqa: E402
from fuzz_targets import ALLOWED, FORBIDDEN, Target, make_targets  # noqa: E402

NAMES = [
    "package", "forged package", "manifest", "signature", "safetensors", "frame", "tokenizer",
    "data choices.jsonl", "data labelled.jsonl", "data labelled.csv",
    "data training.jsonl", "data training.json", "data training.txt", "data training.csv",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _alarm():
    before = signal.signal(signal.SIGALRM, fuzz._alarm)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def targets():
    with fuzz.work_place() as place:
        yield {target.name: target for target in make_targets(place)}


def refuse(data):
    raise PackageError("no")


def test_every_reader_is_a_target(targets):
    assert list(targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_accepted_and_mutations_do_no_harm(targets, name, tmp_path):
    target = targets[name]
    if target.policy == ALLOWED:
        for seed in target.seeds:
            target.run(seed)
    report = fuzz.fuzz([target], 60, tmp_path / "f.json", most=400)
    record = report["targets"][name]
    assert record["problems"] == []
    assert record["executions"] == 400
    assert record["refused"] == 400 or target.policy == ALLOWED
    assert record["refused"] >= 50
    again = fuzz.fuzz([target], 60, tmp_path / "f.json", most=100)
    assert again["targets"][name]["executions"] == 500


def test_inputs_are_reproducible(targets):
    for target in targets.values():
        inputs = [fuzz.make_input(target, number) for number in range(50)]
        assert inputs == [fuzz.make_input(target, number) for number in range(50)]
        assert len(set(inputs)) > 25


@pytest.mark.parametrize(
    ("run", "policy", "problem"),
    [
        (lambda data: data[0] // 0, ALLOWED, "ZeroDivisionError"),
        (lambda data: None, FORBIDDEN, "accepted"),
        (lambda data: time.sleep(10), ALLOWED, "Hang"),
    ],
)
def test_a_faulty_reader_is_noticed(run, policy, problem, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    target = Target(name="faulty", seeds=[b"seed"], run=run, policy=policy)
    refused, what = fuzz.execute(target, b"data")
    assert not refused
    assert what.startswith(problem)


def test_a_flood_of_memory_is_noticed(monkeypatch):
    def flood(data):
        torch.ones(120 << 20)  # far more than the tests before leave to be collected
        raise PackageError("no")

    monkeypatch.setattr(fuzz, "BATCH", 2)
    gc.collect()
    record = fuzz.empty_record()
    fuzz.run_batch(Target(name="flood", seeds=[b"seed"], run=flood, policy=ALLOWED), record)
    assert "bytes of memory" in record["problems"][0]["what"]
    record = fuzz.empty_record()
    fuzz.run_batch(Target(name="calm", seeds=[b"seed"], run=refuse, policy=ALLOWED), record)
    assert record["problems"] == []
    assert record["refused"] == 2


def test_the_committed_run_is_long_and_without_problems():
    report = json.loads(fuzz.RESULTS.read_text())
    assert report["problems"] == 0
    assert report["executions"] >= 1_000_000
    assert set(NAMES) <= set(report["targets"])
    for record in report["targets"].values():
        assert record["longest_seconds"] < fuzz.SECONDS
        assert record["most_memory_bytes"] <= fuzz.MEMORY_BYTES
