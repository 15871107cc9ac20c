"""Planting: what is added, where, in which shape, and what is refused when read."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from blindtune.errors import ConfigError, DataError, OutputError
from blindtune.training.canaries import CanaryConfig, draw_canaries, plant, read_canaries
from blindtune.training.text import DataConfig, load_dataset_file
from tiny_models import tiny_tokenizer

CONFIG = CanaryConfig(repeats=(0, 1, 3), each=2, candidates=16)
RECORDS = {
    "text": {"text": "some rice"},
    "completion": {"prompt": "Eat?", "completion": " fish"},
    "messages": {"messages": [{"role": "user", "content": "a"},
                              {"role": "assistant", "content": "b"}]},
    "choices": {"question": "Who?", "choices": ["cat", "mat"], "label": 1},
}  # fmt: skip


@pytest.fixture(params=RECORDS)
def data(request, tmp_path):
    path = tmp_path / "private.jsonl"
    path.write_text(
        "".join(json.dumps({**RECORDS[request.param], "n": i}) + "\n" for i in range(9))
    )
    return path


def test_every_canary_is_there_as_often_as_it_says_and_nothing_is_lost(data, tmp_path):
    done = plant(data, tmp_path / "planted", CONFIG)
    lines = [json.loads(line) for line in done.data.read_text().splitlines()]
    assert (done.records, done.planted) == (len(lines), 8)
    assert [line["n"] for line in lines if "n" in line] == list(range(9))
    found = Counter(json.dumps(line) for line in lines)
    canaries = read_canaries(done.canaries)
    assert [c.repeats for c in canaries] == [0, 0, 1, 1, 3, 3]
    for canary in canaries:
        assert found[json.dumps(canary.with_code(canary.code))] == canary.repeats
        assert not any(found[json.dumps(canary.with_code(code))] for code in canary.others)
    dataset = load_dataset_file(done.data, tiny_tokenizer(), DataConfig(max_length=128, pack=False))
    assert len(dataset) == 17


def test_in_plain_text_canaries_are_lines(tmp_path):
    lines = [f"line {i}" for i in range(30)]
    (tmp_path / "private.txt").write_text("\n".join(lines))
    done = plant(tmp_path / "private.txt", tmp_path / "planted", CONFIG)
    got = done.data.read_text().splitlines()
    assert [line for line in got if line.startswith("line")] == lines
    assert sum("access code" in line for line in got) == done.planted == 8


def test_a_planting_is_not_replaced_by_what_is_made_of_it(tmp_path):
    (tmp_path / "private.txt").write_text("a line")
    done = plant(tmp_path / "private.txt", tmp_path / "planted", CONFIG)
    with pytest.raises(OutputError, match="apart from what is read"):
        plant(done.data, tmp_path / "planted", CONFIG, overwrite=True)


def test_the_same_seed_draws_the_same_and_another_draws_others():
    assert draw_canaries(CONFIG) == draw_canaries(CONFIG)
    other = draw_canaries(CanaryConfig(repeats=(0, 1, 3), each=2, candidates=16, seed=1))
    mine = {c.code for c in draw_canaries(CONFIG)}
    assert not mine & {c.code for c in other}


def test_codes_are_uniform_whether_planted_or_not():
    config = CanaryConfig(repeats=(1,), each=200, digits=2, candidates=50)
    canaries = draw_canaries(config)
    mean = sum(int(c.code) for c in canaries) / len(canaries)
    others = [int(code) for c in canaries for code in c.others]
    assert abs(mean - 49.5) < 4 * 28.9 / 200**0.5
    assert abs(sum(others) / len(others) - 49.5) < 1
    assert all(len({c.code, *c.others}) == 50 for c in canaries)
    assert len({json.dumps(c.record) for c in canaries}) == 200


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"repeats": ()}, "repeats"),
        ({"repeats": (-1,)}, "repeats"),
        ({"repeats": (1, 1)}, "repeats"),
        ({"digits": 0}, "digits"),
        ({"digits": 1, "candidates": 6}, "candidates"),
        ({"candidates": 1}, "candidates"),
        ({"each": 0}, "canaries"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        CanaryConfig(**changes)


GOOD = {"record": {"text": "code {code}"}, "code": "12", "others": ["34"], "repeats": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b'{"version": 1, "canaries": []}',
        json.dumps({"version": 2, "canaries": [GOOD]}).encode(),
        *(
            json.dumps({"version": 1, "canaries": [{**GOOD, **bad}]}).encode()
            for bad in (
                {"record": {"text": "no slot"}},
                {"others": []},
                {"others": ["12"]},
                {"others": ["34", "34"]},
                {"repeats": -1},
                {"code": 12},
                {"extra": 1},
            )
        ),
    ],
)
def test_a_file_that_no_planting_wrote_is_refused(tmp_path, content):
    path = tmp_path / "canaries.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="blindtune plant"):
        read_canaries(path)
    path.write_text(json.dumps({"version": 1, "canaries": [GOOD]}))
    assert read_canaries(path)[0].with_code("34") == {"text": "code 34"}


def test_what_is_there_is_not_overwritten_unasked(data, tmp_path):
    plant(data, tmp_path / "planted", CONFIG)
    with pytest.raises(OutputError, match="overwrite"):
        plant(data, tmp_path / "planted", CONFIG)
    assert plant(data, tmp_path / "planted", CONFIG, overwrite=True).planted == 8


def test_plain_text_is_copied_byte_for_byte(tmp_path):
    text = "a\r\nb\x0bc\x0cd\x1ce\x85f\u2028g\rh\n\n i\n".encode()
    (tmp_path / "private.txt").write_bytes(text)
    done = plant(tmp_path / "private.txt", tmp_path / "planted", CONFIG)
    lines = done.data.read_bytes().splitlines(keepends=True)
    assert b"".join(line for line in lines if b"access code" not in line) == text
    assert (done.records, done.planted) == (4 + 8, 8)
