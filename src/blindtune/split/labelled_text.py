"""Labelled texts from a customer's file: .jsonl with an object a line, or .csv with a header."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blindtune.errors import DataError


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and their classes."""

    texts: tuple[str, ...]
    labels_N: Tensor
    """Classes [N], int64, by their place in `names`."""
    names: tuple[str, ...]
    """What the labels are called in the file, sorted."""


def read_labelled(
    path: str | Path,
    *,
    text_column: str = "text",
    label_column: str = "label",
    names: tuple[str, ...] | None = None,
) -> LabelledTexts:
    """Read a file of texts and classes; rows with an empty text are left out.

    Args:
        path: ends in .jsonl or .csv, UTF-8.
        text_column, label_column: where text and label are; labels are strings or integers.
        names: the classes, when another file decided them (the training texts').

    Raises:
        DataError: no such file, another ending, a malformed row, a column missing, an unknown
            label, or fewer than two classes.
    """
    texts, found = [], []
    for where, row in _rows(Path(path)):
        text, label = row.get(text_column), row.get(label_column)
        if not isinstance(text, str) or isinstance(label, bool | float | dict | list | None):
            raise DataError(
                f"{where}: expected a text in {text_column!r} and a class in {label_column!r}, "
                f"got columns {', '.join(map(str, row))[:200]}: name the right columns"
            )
        if text.strip():
            texts.append(text)
            found.append(str(label))
    classes = names or tuple(sorted(set(found)))
    if not texts or len(classes) < 2:
        raise DataError(
            f"{path}: expected texts of at least two classes, got {len(texts)} texts of "
            f"{len(classes)}: check the label column"
        )
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(
            f"{path}: expected classes {', '.join(classes)[:200]}, got {', '.join(unknown)[:200]}: "
            "use the classes of the training texts"
        )
    place = {name: i for i, name in enumerate(classes)}
    return LabelledTexts(tuple(texts), torch.tensor([place[label] for label in found]), classes)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix not in (".jsonl", ".csv"):
        raise DataError(f"{path}: expected a file ending in .jsonl or .csv: convert or rename it")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                for number, row in enumerate(csv.DictReader(file, strict=True), 2):
                    yield f"{path}:{number}", row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise DataError(f"{path}:{number}: expected an object on the line")
                    yield f"{path}:{number}", value
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except (UnicodeDecodeError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path}: malformed ({str(error)[:100]}): correct the file") from error
