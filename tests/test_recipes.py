"""The recipes run end to end, as a user starts them."""

import json
import pydoc_data.topics
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import tiny_model, tiny_tokenizer

RECIPES = Path(__file__).parent.parent / "recipes"
TOPICS = "\n".join(pydoc_data.topics.topics.values())


def run_recipe(name, *options):
    command = [sys.executable, str(RECIPES / name), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_texts(folder, sizes):
    start = 0
    for name, size in sizes.items():
        (folder / f"{name}.txt").write_text(TOPICS[start : start + size])
        start += size
    return [f"--{name}={folder / name}.txt" for name in sizes]


def rows(out):
    board = json.loads((out / "scores.json").read_text())
    return {name: scores[0] for name, scores in board["scoreboard"]["rows"].items()}


def test_recipes_stay_short():
    for path in RECIPES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 150, path


def test_offsite_on_a_tiny_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    texts = write_texts(tmp_path, {"public": 6000, "private": 8000, "test": 2000})
    done = run_recipe(
        "offsite.py", "--model", tmp_path / "model", *texts, "--out", tmp_path / "out",
        "--steps", 3, "--study-steps", 2, "--test-tokens", 512,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(rows(tmp_path / "out")) == {"ZS", "Emulator ZS", "Emulator FT", "Plug-in", "FT"}
    assert "Plug-in" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"(?:href|src)=.https?:", page)


@pytest.mark.real
def test_offsite_on_smollm2(tmp_path):
    texts = write_texts(tmp_path, {"public": 6_000, "private": 9_000, "test": 2_000})
    done = run_recipe(
        "offsite.py", *texts, "--out", tmp_path / "out",
        "--steps", 3, "--study-steps", 1, "--damage-tokens", 128, "--test-tokens", 256,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "out")
    assert found["Plug-in"] < found["ZS"] < found["Emulator ZS"]
    assert found["Plug-in"] < found["Emulator FT"] < found["Emulator ZS"]
