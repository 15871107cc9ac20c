import pytest
from split_world import World

from blindtune.errors import DataError
from blindtune.evaluation.audits.split_subject import read_audited
from blindtune.split.customer import labelled_text
from blindtune.split.customer.labelled_text import labelled, read_labelled, read_texts
from blindtune.split.customer.private_texts import ReadingConfig, read_unseen


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_both_kinds_of_file_read_the_same(tmp_path):
    rows = ['{"text": "so, good", "label": 1}', "", '{"text": "bad", "label": 0}']
    lines = "\n".join([*rows, '{"text": " ", "label": 0}'])
    table = '\ufefftext,label\n"so, good",1\nbad,0\n'
    for path in (write(tmp_path / "a.jsonl", lines), write(tmp_path / "a.csv", table)):
        found = read_labelled(path)
        assert found.texts == ("so, good", "bad")
        assert found.labels_N.tolist() == [1, 0]
        assert found.names == ("0", "1")


def test_names_and_columns(tmp_path):
    path = write(tmp_path / "a.csv", "s,mood\nx,up\ny,down\n")
    found = read_labelled(path, text_column="s", label_column="mood", names=("down", "flat", "up"))
    assert found.labels_N.tolist() == [2, 0]
    with pytest.raises(DataError, match=r"a\.csv, row 1: expected one of the 2 classes"):
        read_labelled(path, text_column="s", label_column="mood", names=("down", "flat"))


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.txt", "x", "ending"),
        ("a.csv", "text\nx\n", "found the columns .text.: rename"),
        ("a.csv", "", "got none"),
        ("a.csv", "text,label\nx,1\n", "1 texts of 1"),
        ("a.jsonl", '{"text": 3, "label": 1}', "a.jsonl:1"),
        ("a.csv", "text,label\nx,1\ny\n", "a value in 'label'"),
        ("a.csv", "text,label\nx,1\ny,\nz,0\n", r"a\.csv, row 2: .*a value in 'label'"),
        ("a.csv", 'text,label\n"x\n\nx",1\ny,\nz,0\n', r"a\.csv, row 2: .*a value in 'label'"),
        ("org/data-1.0", None, "org/data-1.0"),
        ("a.jsonl", '{"text": "x", "label": 0.5}', "class"),
        ("a.jsonl", "[1]", "object"),
        ("a.jsonl", "{", "a.jsonl:1: expected JSON"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}', "a.jsonl:1: .*surrogate"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: expected JSON"),
    ],
)
def test_bad_files(tmp_path, monkeypatch, name, text, match):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # else its hub is asked, and again
    path = name if text is None else write(tmp_path / name, text)
    with pytest.raises(DataError, match=match):
        read_labelled(path)


def test_empty_cells_are_no_labels(tmp_path):
    found = read_texts(write(tmp_path / "a.csv", "text,label\nx,\ny,\n"))
    assert found.labels == (None, None)
    assert not found.labelled


def test_a_target_that_single_precision_cannot_hold(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nx,1.5\ny,1e300\n")
    with pytest.raises(DataError, match=r"a\.csv, row 2: expected a number of single precision"):
        read_labelled(path, kind="target")


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_labelled(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"text,label\n\xff,1\n")
    with pytest.raises(DataError, match="malformed"):
        read_labelled(tmp_path / "b.csv")


def test_texts_to_predict_or_to_audit_are_read_once(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", "text,label\na good film,2.5\na bad one,1\n")
    opened = []

    def rows(path):
        opened.append(path)
        return csv_rows(path)

    csv_rows = labelled_text.csv_rows
    monkeypatch.setattr(labelled_text, "csv_rows", rows)
    bottom = World(tmp_path).bottom
    found = read_unseen(bottom, path, ReadingConfig(), ("1", "2.5", "3"))
    assert found.labels.tolist() == [1, 0]
    assert found.names == ("1", "2.5", "3")
    assert opened == [path]
    found = read_audited(bottom, path, ReadingConfig(task="regression"))
    assert found.labels.tolist() == [2.5, 1.0]
    assert read_audited(bottom, path, ReadingConfig()).names == ("1", "2.5")
    assert opened == [path] * 3


def test_texts_without_labels_have_none(tmp_path):
    found = read_texts(write(tmp_path / "a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"}'))
    assert not found.labelled
    for kind in ("class", "target"):
        with pytest.raises(DataError, match=r"a\.jsonl:2: expected .* got nothing"):
            labelled(found, kind=kind)
