"""States of one job in a folder, by the number of the request that they were made after.

Both parties keep their share of a job so: the vendor adapter and optimizer, the customer of the
U-shape its head. The last two are kept, because a customer stores its own before it asks the vendor
for the state that belongs to it, and may be killed between.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import torch

from blindtune.atomic import save_torch, secret_file
from blindtune.errors import DataError

KEPT_STATES = 2
"""States of a job that a party keeps."""


@final
class NumberedStates:
    """The files `<prefix>-<number>.pt` of a folder, each whole or absent.

    Args:
        folder: of one job; nobody else writes these files.
        prefix: letters, what the states are called.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix
        self._name = re.compile(re.escape(prefix) + r"-([0-9]+)\.pt")

    def numbers(self) -> list[int]:
        """The requests after which a state is kept, ascending."""
        names = (path.name for path in self._folder.glob(f"{self._prefix}-*.pt"))
        return sorted(int(match[1]) for name in names if (match := self._name.fullmatch(name)))

    def save(self, number: int, state: dict[str, Any]) -> None:
        """Store the state after request `number`, durably; keep it and the one before it.

        Later ones are of a run before the job went back to an earlier request: they go too. Nobody
        but the owner may read it (mode 600).

        Raises:
            OutputError: the disk refuses; what was there stays.
        """
        with secret_file(self._path(number)) as partial:
            save_torch(state, partial)
        found = self.numbers()
        kept = [other for other in found if other <= number][-KEPT_STATES:]
        self._remove(other for other in found if other not in kept)

    def load(self, number: int) -> dict[str, Any]:
        """The state after request `number`, on the CPU; nothing in the file is executed.

        Raises:
            DataError: it cannot be read.
        """
        path = self._path(number)
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, OSError
            raise DataError(f"{path}: expected a job's state, cannot read it") from error
        return state

    def drop_after(self, number: int) -> None:
        """Forget the states after request `number`; after -1: all of them."""
        self._remove(other for other in self.numbers() if other > number)

    def _remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._path(number).unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._prefix}-{number}.pt"
