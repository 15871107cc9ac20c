"""What the sweeps of both protocols share: rows that are kept, and which settings nothing beats."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, final

from blindtune.atomic import atomic_file, output_error, remove_left_overs, sole_writer
from blindtune.version import __version__

SettingT = TypeVar("SettingT")
Row = dict[str, Any]


@final
class KeptRows:
    """The rows of a sweep in OUT/rows, each under a digest of all that decides it.

    The version of this package takes part in the digest.

    Args:
        out: the sweep's directory.

    Attributes:
        work: OUT/.sweep, for whatever a row makes on its way; empty when a row begins.
    """

    def __init__(self, out: Path) -> None:
        self._out, self.work = out, out / ".sweep"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other sweeps out of the directory; what was worked on goes in the end.

        Raises:
            OutputError: another one is at it, or it cannot be written.
        """
        with sole_writer(self._out):
            try:
                (self._out / "rows").mkdir(parents=True, exist_ok=True)
                remove_left_overs(self._out)
                remove_left_overs(self._out / "rows")
            except OSError as error:
                raise output_error(self._out, error) from error
            try:
                yield
            finally:
                shutil.rmtree(self.work, ignore_errors=True)

    def row(self, name: str, decides: object, make: Callable[[], Row]) -> Row:
        """The row of this name, as it is kept or made now.

        Args:
            name: begins the name of its file.
            decides: all that decides the row, as JSON values.
            make: makes it.
        """
        path = self._out / "rows" / f"{name}-{digest_of(decides)}.json"
        if not path.is_file():
            shutil.rmtree(self.work, ignore_errors=True)
            made = make()
            with atomic_file(path) as file:
                file.write_text(json.dumps(made) + "\n", encoding="utf-8")
        found: Row = json.loads(path.read_text(encoding="utf-8"))
        return found


def digest_of(decides: object) -> str:
    """A short name for all that decides a result, JSON values, and for this package's version."""
    told = json.dumps([__version__, decides], sort_keys=True).encode()
    return hashlib.sha256(told).hexdigest()[:12]


def unbeaten(
    settings: Iterable[SettingT], measures: Callable[[SettingT], tuple[float, float]]
) -> tuple[SettingT, ...]:
    """The settings that no other one beats in both measures at once, best in the first one first.

    Args:
        settings: to choose from.
        measures: utility and privacy of one, larger is better.
    """
    kept, most = [], float("-inf")
    for setting in sorted(settings, key=measures, reverse=True):
        privacy = measures(setting)[1]
        if privacy > most:
            kept.append(setting)
            most = privacy
    return tuple(kept)
