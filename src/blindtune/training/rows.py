"""Rows of tables, read from the file itself: no copy is made that a killed process could leave.

A row of .csv, or some hundred of .parquet, are in memory at a time. Errors name the file and the
row, never a value: these are private files.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blindtune.errors import DataError

BATCH_ROWS = 256
"""Rows of a .parquet file that are made at once."""
_LONGEST_CELL = 2**31 - 1
"""Characters; the csv module's own limit, 131,072, is shorter than a text may be."""


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
