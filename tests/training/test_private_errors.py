"""Errors about private files name the place and the kind of value, never the value."""

import json

import pytest

from blindtune.errors import DataError
from blindtune.evaluation.utility.choices import read_items
from blindtune.split.customer.labelled_text import read_labelled
from blindtune.training.canaries import plant
from blindtune.training.text import DataConfig, encode_rows, load_dataset_file, read_rows
from tiny_models import tiny_tokenizer

SECRET = "Jane Doe lives in Utrecht"
GOOD = {"question": "Q?", "choices": ["a", "b"], "label": 0}


@pytest.mark.parametrize(
    "record",
    [
        GOOD | {"choices": SECRET},
        GOOD | {"choices": [SECRET]},
        GOOD | {"choices": [SECRET, 3]},
        GOOD | {"choices": {"text": ["a", "b"], "label": SECRET}},
        GOOD | {"label": SECRET},
        {"messages": SECRET},
        {"messages": [{"role": "user", "content": [SECRET]}]},
        {"text": {"said": SECRET}},
    ],
)
def test_records(record):
    with pytest.raises(DataError) as raised:
        encode_rows([("file:1", record)], "file", tiny_tokenizer(), DataConfig())
    assert "file:1" in str(raised.value)
    assert not shared_words(str(raised.value))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json.dumps(SECRET)),
        ("a.jsonl", SECRET),
        ("a.jsonl", f'{{"text": "{SECRET}"'),
        ("a.json", f'["{SECRET}"]'),
        ("a.json", f"[{SECRET}]"),
    ],
    ids=range(5),
)
def test_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    for read in (lambda p: list(read_rows(str(p), DataConfig())), read_items, read_labelled):
        with pytest.raises(DataError) as raised:
            read(path)
        assert not shared_words(str(raised.value))


@pytest.mark.parametrize(
    "given", [SECRET, SECRET * 20, f"{SECRET}\n{SECRET}", [SECRET], (SECRET,), {"text": SECRET}],
    ids=range(6),
)  # fmt: skip
def test_texts_in_the_place_of_a_path(given):
    """The system's error quoted them, and short ones went to the hub as a name."""
    for read in (
        lambda data: load_dataset_file(data, tiny_tokenizer(), DataConfig()), read_labelled,
        read_items, lambda data: plant(data, "out"),
        lambda data: list(read_rows(data, DataConfig())),
    ):  # fmt: skip
        with pytest.raises(DataError) as raised:
            read(given)
        if read is read_items and given == SECRET:
            continue  # a path like any other
        assert "expected the path of a data file" in str(raised.value)
        assert not shared_words(str(raised.value))


@pytest.mark.parametrize("kind", ["class", "target"])
def test_labels(tmp_path, kind):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x", "label": [SECRET]}))
    with pytest.raises(DataError, match="a list of 1") as raised:
        read_labelled(path, kind=kind)
    assert not shared_words(str(raised.value))
    path.write_text(json.dumps({"text": "x", "label": SECRET}))
    with pytest.raises(DataError) as raised:
        read_labelled(path, names=("up", "down"), kind=kind)
    assert not shared_words(str(raised.value))


def shared_words(message):
    return [word for word in SECRET.split() if word != "in" and word in message]
