"""Tables are read where they lie: row by row, without a copy, and without a value in an error."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from blindtune.errors import DataError
from blindtune.evaluation.utility.choices import read_items
from blindtune.split.customer.labelled_text import read_labelled
from blindtune.training.rows import csv_rows, parquet_rows
from blindtune.training.text import DataConfig, load_dataset_file, read_rows

SECRET = "Jane Doe"


def write_table(path, records):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_no_copy_is_made_that_a_killed_process_could_leave(tmp_path, monkeypatch, kind):
    def refuse(*args, **options):
        raise AssertionError("the library copies what it reads")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    path = tmp_path / f"a.{kind}"
    path.write_text("text,label\nthe cat,1\nthe dog,0\n")
    if kind == "parquet":
        write_table(path, [{"text": "the cat", "label": 1}, {"text": "the dog", "label": 0}])
    rows = list(read_rows(str(path), DataConfig()))
    assert [where for where, _ in rows] == [f"{path}, row 1", f"{path}, row 2"]
    assert [record["text"] for _, record in rows] == ["the cat", "the dog"]
    assert read_labelled(path).labels_N.tolist() == [1, 0]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_rows_after_the_last_that_is_asked_for_are_not_looked_at(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text('text\nthe cat\nthe dog\n"the" mat\n')
    config = DataConfig(max_samples=2, pack=False)
    assert len(load_dataset_file(path, tokenizer, config)) == 2
    with pytest.raises(DataError, match="malformed after row 2"):
        load_dataset_file(path, tokenizer, DataConfig(max_samples=3, pack=False))


def test_cells_are_the_text_that_stands_there(tmp_path):
    path = tmp_path / "a.csv"
    long = "the cat, " * 20_000
    path.write_text(f'\ufefftext,id\nNA,1\n007,2\n\n"a ""b""\nc",\n" d"\n"{long}",5\n', "utf-8")
    rows = list(csv_rows(path))
    assert [number for number, _ in rows] == [1, 2, 3, 4, 5]
    assert [row["text"] for _, row in rows] == ["NA", "007", 'a "b"\nc', " d", long]
    assert [row["id"] for _, row in rows] == ["1", "2", "", None, "5"]
    read = [record["id"] for _, record in read_rows(str(path), DataConfig())]
    assert read == ["1", "2", None, None, "5"]


def test_a_file_with_a_byte_order_mark_tunes_and_is_scored(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    record = {"question": "who sat?", "choices": ["the dog", "the cat"], "label": 1, "text": "x"}
    other = record | {"label": 0}
    path.write_text(f"{json.dumps(record)}\r\n\r\n{json.dumps(other)}\r\n", "utf-8-sig")
    assert len(load_dataset_file(path, tokenizer, DataConfig())) == 2
    assert [item.label for item in read_items(path)] == [1, 0]
    assert read_labelled(path).labels_N.tolist() == [1, 0]


def test_batches_leave_nothing_out(tmp_path, monkeypatch):
    records = [{"text": f"cat {i}"} for i in range(7)]
    path = write_table(tmp_path / "a.parquet", records)
    monkeypatch.setattr("blindtune.training.rows.BATCH_ROWS", 3)
    assert list(parquet_rows(path)) == list(enumerate(records, 1))


def test_nested_columns_read_as_those_of_json(tmp_path, tokenizer):
    for name, record in (
        ("choices", {"question": "who?", "choices": ["the dog", "the cat"], "label": 1}),
        ("named", {"question": "who?", "choices": {"text": ["a", "b"], "label": ["1", "2"]},
                   "answerKey": "2"}),
        ("talk", {"messages": [{"role": "user", "content": "who sat?"},
                               {"role": "assistant", "content": "the cat"}]}),
    ):  # fmt: skip
        table = write_table(tmp_path / f"{name}.parquet", [record])
        lines = tmp_path / f"{name}.jsonl"
        lines.write_text(json.dumps(record))
        read = [load_dataset_file(path, tokenizer, DataConfig()) for path in (table, lines)]
        assert read[0].fingerprint() == read[1].fingerprint()


BAD = {
    "more.csv": (f"text,id\na,1\n{SECRET}, MD,2\n", r"more.csv, row 2: expected 2 cells.* got 3"),
    "twice.csv": ("text,text\na,b\n", "twice.csv: expected columns of different names"),
    "quote.csv": (f'text\n"{SECRET}" MD\n', "quote.csv: .*malformed after row 0"),
    "open.csv": (f'text\na\n"{SECRET}\n', "open.csv: .*malformed after row 1"),
    "latin.csv": (b"text\ncaf\xe9\n", "latin.csv: expected .csv in UTF-8, malformed"),
    "none.parquet": (b"text", "none.parquet: expected a data file in the Parquet format"),
    "cut.parquet": (None, "cut.parquet: expected a data file in the Parquet format"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_named_and_not_quoted(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / name
    if content is None:
        whole = write_table(tmp_path / "b.parquet", [{"text": SECRET}]).read_bytes()
        content = whole[:4] + bytes(40) + whole[44:]
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message) as raised:
        list(read_rows(str(path), DataConfig()))
    told = str(raised.value)
    assert "\n" not in told
    assert not [word for word in SECRET.split() if word in told]


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    for read in (csv_rows, parquet_rows):
        with pytest.raises(DataError, match="none"):
            next(read(tmp_path / "none"))
