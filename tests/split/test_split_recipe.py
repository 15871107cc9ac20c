"""The recipe runs end to end, as a user starts it."""

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tiny_encoders import tiny_encoder
from tiny_models import tiny_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Options for a tiny model and a tiny data set."""
    place = tmp_path_factory.mktemp("tiny")
    tiny_encoder("bert").save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    rows = [f"{'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(16)]
    data = place / "data.csv"
    data.write_text("\n".join(["text,label", *rows]))
    return ["--model", place / "model", "--cut", 0, "--train", data, "--test", data]


def played(program, out, *options):
    command = [RECIPES / program, *options, "--out", out]
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "split.json").read_text())


def test_split_on_a_tiny_model(tiny, tmp_path):
    said, found = played(
        "split_in_process.py", tmp_path / "out", *tiny, "--epochs", 1, "--samples", 64
    )
    assert len(found) == 8
    assert all(0 <= row["UA"] <= 1 for row in found)
    wrong = [row["EP, training texts"] for row in found[1:]]
    assert wrong[0] == 0  # the attack reads everything that has no noise
    assert wrong[1] < wrong[3] < wrong[5]
    # CTI spares a frequent letter of each class; one strength alone is within the noise of a draw.
    assert wrong[2] + wrong[4] + wrong[6] < wrong[1] + wrong[3] + wrong[5]
    assert "no noise" in said


def test_vendor_and_customer_as_two_processes(tiny, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "public.txt").write_text("good film 1. bad film 2. " * 1000)
    public = ["--public", tmp_path / "public.txt"]
    said, found = played("split.py", out, *tiny, *public, "--changed", 0.8)
    assert [row["run"] for row in found] == [
        "whole model, no split",
        "no noise",
        "word groups",
        "80% of tokens changed",
        "80% of tokens changed, CTI",
    ]
    assert found[1]["EP"] == 0 < found[2]["EP"]
    assert found[3]["EP"] > 0.5
    assert all(0 <= row["UA"] <= 1 for row in found)
    assert "80% of tokens changed" in said
    # The first line may tell that a signing key was made.
    lines = (out / "vendor.log").read_text().splitlines()
    log = [json.loads(line) for line in lines if line.startswith("{")]
    assert log[-1]["event"] == "service-ends"
    assert log[-1]["jobs"] == 4


def test_sample_sentences(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    sentences = importlib.import_module("sample_sentences")
    seen = set()
    *files, public = sentences.write_sentences(tmp_path, 240, 160)  # as many as the demo has
    for path, size in zip(files, (240, 160), strict=True):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert Counter(row["label"] for row in rows) == {0: size // 2, 1: size // 2}
        assert not seen & {row["text"] for row in rows}
        seen |= {row["text"] for row in rows}
    rest = " ".join(public.read_text().split())
    assert len(rest) > 900_000
    assert not any(sentence in rest for sentence in seen)
