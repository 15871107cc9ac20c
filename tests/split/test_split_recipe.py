"""The recipe runs end to end, as a user starts it."""

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tiny_encoders import tiny_encoder
from tiny_models import tiny_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"


def test_split_on_a_tiny_model(tmp_path):
    tiny_encoder("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [f"{'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(16)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]))
    command = [
        RECIPES / "split.py", "--model", tmp_path / "model", "--cut", 0, "--epochs", 1,
        "--train", tmp_path / "data.csv", "--test", tmp_path / "data.csv", "--samples", 64,
        "--out", tmp_path / "out",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "split.json").read_text())
    assert len(found) == 8
    assert all(0 <= row["UA"] <= 1 for row in found)
    wrong = [row["EP, training texts"] for row in found[1:]]
    assert wrong[0] == 0  # the attack reads everything that has no noise
    assert wrong[1] < wrong[3] < wrong[5]
    assert wrong[6] < wrong[5]  # CTI spares a frequent letter of each class
    assert "no noise" in done.stdout


def test_sample_sentences(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    sentences = importlib.import_module("sample_sentences")
    seen = set()
    for path, size in zip(sentences.write_sentences(tmp_path, 40, 20), (40, 20), strict=True):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert Counter(row["label"] for row in rows) == {0: size // 2, 1: size // 2}
        assert not seen & {row["text"] for row in rows}
        seen |= {row["text"] for row in rows}
