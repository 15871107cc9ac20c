"""What callers name: paths, in which `~` is the home directory, and data, which is never text."""

from __future__ import annotations

import os
import re
from pathlib import Path

from blindtune.errors import DataError

LONGEST_NAME, LONGEST_PATH = 255, 4096
"""Bytes of a file's name and of a path, beyond which the operating system knows none."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def located(path: str | Path) -> Path:
    """A path of which `~`, at its start, is the home directory."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # leaves the ~ of users that are not there


def data_source(named: str | Path) -> str:
    """The path of a data file or the name of a hub data set.

    Raises:
        DataError: texts in its place. They may be private, and are not repeated.
    """
    if not isinstance(named, str | Path):
        raise _no_source(f"a {type(named).__name__}")
    name = str(located(named)) if isinstance(named, Path) else os.path.expanduser(named)  # noqa: PTH111
    parts = [len(part.encode(errors="replace")) for part in name.split("/")]
    if "\n" in name or max(parts) > LONGEST_NAME or sum(parts) + len(parts) > LONGEST_PATH:
        raise _no_source(f"text of {len(name):,} characters")
    return name


def check_hub_name(name: str) -> None:
    """Refuse what no data set can be called, before the hub is asked for it.

    Raises:
        DataError: it has spaces or other such characters, so it is text.
    """
    if not _HUB_NAME.fullmatch(name):
        raise _no_source(f"text of {len(name):,} characters, and no such file is there")


def _no_source(got: str) -> DataError:
    return DataError(
        f"expected the path of a data file, or the name of a hub data set, got {got}: write texts "
        "to a file, and name that"
    )
