"""Labelled texts from a customer's file: .jsonl with an object a line, or .csv with a header.

Both, .parquet files and data sets of the hub are read as all data is (`training.text`), so that a
bad row is named by file and number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blindtune.errors import DataError
from blindtune.places import data_source
from blindtune.training.records import kind_of_value
from blindtune.training.rows import csv_rows, json_rows
from blindtune.training.text import DataConfig, read_rows

LabelKind = Literal["class", "target"]
"""What a label is: a class by its name, or a number to predict."""


LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and what they are labelled."""

    texts: tuple[str, ...]
    labels_N: Tensor
    """Classes [N], int64, by their place in `names`; or targets [N], float32."""
    names: tuple[str, ...]
    """What the classes are called in the file, sorted; none for targets."""
    rows: tuple[int, ...] = ()
    """Which row of the file each text is, from 1."""


@dataclass(frozen=True)
class FoundTexts:
    """Texts with their raw labels, as a file has them."""

    texts: tuple[str, ...]
    labels: tuple[Any, ...]
    """None where a row has no label."""
    rows: tuple[int, ...]
    """Which row of the file each text is, from 1."""
    where: tuple[str, ...]
    """The place of each row, named in errors."""
    source: str
    """The file."""
    label_column: str

    @property
    def labelled(self) -> bool:
        """Whether every text has a label."""
        return None not in self.labels


def read_labelled(
    path: str | Path,
    *,
    text_column: str = "text",
    label_column: str = "label",
    names: tuple[str, ...] | None = None,
    kind: LabelKind = "class",
) -> LabelledTexts:
    """Read a file of texts and labels; rows with an empty text are left out.

    Args:
        path: ends in .jsonl, .csv or .parquet, UTF-8; or names a data set of the hub.
        text_column, label_column: where text and label are; classes are strings or integers.
        names: the classes, when another file decided them (the training texts').
        kind: what the labels are.

    Raises:
        DataError: no such file, another ending, a malformed row, a column missing, an unknown
            label, or fewer than two classes.
    """
    found = _read(path, text_column, label_column, required=True)
    return labelled(found, names=names, kind=kind)


def labelled(
    found: FoundTexts, *, names: tuple[str, ...] | None = None, kind: LabelKind = "class"
) -> LabelledTexts:
    """Texts of a file with their labels as numbers; see `read_labelled`.

    Raises:
        DataError: a label is missing, unknown, or none of its kind; fewer than two classes.
    """
    if kind == "target":
        targets = [_number(label, where) for label, where in _pairs(found)]
        return LabelledTexts(found.texts, torch.tensor(targets), (), found.rows)
    called = [_class(label, where, found.label_column) for label, where in _pairs(found)]
    classes = names or tuple(sorted(set(called)))
    if not called or len(classes) < 2:
        raise DataError(
            f"{found.source}: expected texts of at least two classes, got {len(called)} texts of "
            f"{len(classes)}: check the label column"
        )
    unknown = [
        where for name, where in zip(called, found.where, strict=True) if name not in classes
    ]
    if unknown:
        raise DataError(
            f"{unknown[0]}: expected one of the {len(classes)} classes of the training texts, got "
            f"another one ({len(unknown)} such rows)"
        )
    place = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([place[name] for name in called])
    return LabelledTexts(found.texts, labels, classes, found.rows)


def read_texts(
    path: str | Path, *, text_column: str = "text", label_column: str = "label"
) -> FoundTexts:
    """Read texts, with whatever labels they have; `labelled` makes numbers of those.

    Raises:
        DataError: as for `read_labelled`, but no label is missed.
    """
    return _read(path, text_column, label_column, required=False)


def _read(path: str | Path, text_column: str, label_column: str, *, required: bool) -> FoundTexts:
    texts, labels, numbers, places = [], [], [], []
    path = data_source(path)
    for number, (where, row) in enumerate(_rows(path), 1):
        text, label = row.get(text_column), row.get(label_column)
        label = None if label == "" else label  # how .csv says that there is none
        named = label_column if isinstance(text, str) else text_column
        if named in row and (not isinstance(text, str) or (required and label is None)):
            raise DataError(
                f"{where}: expected a value in {named!r}, got {kind_of_value(row[named])}: "
                "complete the row, or leave it out"
            )
        if not isinstance(text, str) or (required and label is None):
            wanted = f" and a label in {label_column!r}" if required else ""
            raise DataError(
                f"{where}: expected a text in {text_column!r}{wanted}, found the columns "
                f"{', '.join(repr(str(name)) for name in row)[:200]}: rename them, or give a "
                "text_column and a label_column"
            )
        if text.strip():
            texts.append(text)
            labels.append(label)
            numbers.append(number)
            places.append(where)
    if not texts:
        raise DataError(f"{path}: expected texts, got none: give a file with data")
    return FoundTexts(
        tuple(texts), tuple(labels), tuple(numbers), tuple(places), str(path), label_column
    )


def _pairs(found: FoundTexts) -> Iterator[tuple[Any, str]]:
    return zip(found.labels, found.where, strict=True)


def _class(label: Any, where: str, column: str) -> str:
    if label is None or isinstance(label, bool | float | dict | list):
        raise DataError(
            f"{where}: expected a class (text or a whole number) in {column!r}, got "
            f"{kind_of_value(label)}: name another column, or the task regression"
        )
    return str(label)


def _number(label: Any, where: str) -> float:
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(label, bool) or not abs(value) <= LARGEST:
        raise DataError(
            f"{where}: expected a number of single precision as target, got {kind_of_value(label)}"
        )
    return value


def _rows(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    suffix = Path(path).suffix.lower()
    if suffix == ".jsonl":
        yield from json_rows(Path(path))
    elif suffix == ".csv":
        for number, cells in csv_rows(Path(path)):
            yield f"{path}, row {number}", cells
    elif suffix == ".parquet" or not Path(path).exists():  # or the name of a hub data set
        yield from read_rows(path, DataConfig())
    else:
        raise DataError(
            f"{path}: expected a file ending in .jsonl, .csv or .parquet: convert or rename it"
        )
