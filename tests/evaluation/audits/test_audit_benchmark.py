"""In the benchmark of audits no speech and no text is both private and public."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import audits

WORDS = "one two three four five six seven eight nine ten eleven"


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_speech_and_no_text_is_on_both_sides(tmp_path):
    rows = [
        {"text": f"{WORDS} {speaker} {year} {k}", "speaker": speaker, "year": year}
        for speaker, years in (("ada", (1, 2, 3)), ("bob", (2, 4)), ("eve", (5,)))
        for year in years
        for k in range(3)
    ]
    again = [{"text": f"{WORDS} Amen", "speaker": "ada", "year": year} for year in (1, 2)]
    write(tmp_path / "state_union.jsonl", rows + again)
    mine, theirs = map(read, audits.files(SimpleNamespace(data=tmp_path), "attribute", tmp_path))
    assert {(row["speaker"], row["year"]) for row in mine} == {("ada", 1), ("ada", 3), ("bob", 2)}
    assert {(row["speaker"], row["year"]) for row in theirs} == {("ada", 2), ("bob", 4)}
    assert (len(mine), len(theirs)) == (9, 6)


def test_no_sentence_is_on_both_sides(tmp_path):
    write(tmp_path / "sst2_dev.jsonl", [{"text": WORDS}, {"text": "a film"}])
    write(tmp_path / "sst2_train.jsonl", [{"text": WORDS.upper()}, {"text": f"{WORDS} twelve"}])
    mine, theirs = map(read, audits.files(SimpleNamespace(data=tmp_path), "prior", tmp_path))
    assert [row["text"] for row in mine + theirs] == ["a film", f"{WORDS} twelve"]
