"""Rows of a data file, read where it lies: no copy is made that a killed process could leave.

A row of .jsonl or .csv, or some hundred of .parquet, are in memory at a time. Errors name the file
and the row, never a value: these are private files.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blindtune.errors import DataError
from blindtune.training.records import check_unicode

BATCH_ROWS = 256
"""Rows of a .parquet file that are made at once."""
_LONGEST_CELL = 2**31 - 1
"""Characters; the csv module's own limit, 131,072, is shorter than a text may be."""


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every line of JSON lines; of a .json file that is one array, too.

    Blank lines are no rows; a byte-order mark at the start is left out.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or a line is no JSON object.
    """
    try:
        if path.suffix.lower() == ".json":
            text = decoded(path.read_bytes(), str(path))
            if text.lstrip().startswith("["):
                yield from _array_rows(text, path)
                return
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _parse(decoded(line, where), where, dict)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from error


def _array_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, record in enumerate(_parse(text, str(path), list)):
        where = f"{path}, record {index + 1}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object, got {type(record).__name__}")
        yield where, record


def decoded(data: bytes, where: str) -> str:
    """UTF-8 as text, without the byte-order mark at its start.

    Raises:
        DataError: other bytes.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8 text, byte {error.start + 1} is not: convert the file"
        ) from None


def _parse(text: str, where: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected JSON, got something else ({error})") from None
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "an array"
        raise DataError(f"{where}: expected {wanted}, got {type(value).__name__}")
    check_unicode(text, value, where)
    return value


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    """(number from 1, cells by the names in the head) of every row of a .csv file in UTF-8.

    Blank lines are no rows. A cell that is missing at the end of a row is None.

    Raises:
        DataError: the file cannot be read or is malformed; a row has more cells than the head.
    """
    csv.field_size_limit(_LONGEST_CELL)
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise DataError(f"{path}: expected columns of different names: rename those alike")
            for number, cells in enumerate(filter(None, reader), start=1):
                if len(cells) > len(names):
                    raise DataError(
                        f"{path}, row {number}: expected {len(names)} cells, as many as the head "
                        f"has, got {len(cells)}: put texts that hold commas in quotes"
                    )
                short = len(names) - len(cells)
                yield number, dict(zip(names, [*cells, *[None] * short], strict=True))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: expected .csv in UTF-8, malformed after row {number} ({error}): correct or "
            "convert the file"
        ) from error


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, values by column) of every row of a .parquet file.

    Raises:
        DataError: the file cannot be read, or is not of this kind.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with path.open("rb") as raw, ParquetFile(raw) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (ArrowException, OSError, ValueError) as error:  # its words may quote what it read
        raise DataError(
            f"{path}: expected a data file in the Parquet format, got something else after row "
            f"{number} ({type(error).__name__}): write it anew"
        ) from error
