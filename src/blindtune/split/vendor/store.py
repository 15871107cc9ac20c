"""Jobs on the vendor's disk: what was agreed, and the latest checkpoints, each whole or absent.

    jobs/<name>/job.json        owner, hash of the token, terms, state, use that was undone
    jobs/<name>/at-<number>.pt  everything after request <number>; the last two are kept

Never leaves the vendor, and is for its eyes only: jobs/ has mode 700, the files in it 600.
Checkpoints are read with `weights_only=True`.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Container
from pathlib import Path
from typing import Literal, final

import msgspec

from blindtune.atomic import (
    atomic_file,
    output_error,
    put_in_order,
    remove_directory,
    remove_left_overs,
    secret_file,
)
from blindtune.errors import OutputError
from blindtune.exchange.wire.messages import OpenJob
from blindtune.split.numbered_states import NumberedStates

logger = logging.getLogger(__name__)
_NAME = re.compile(r"job_[0-9a-f]{16}")


class Usage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job used of its vendor, as its limits count it."""

    steps: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0


class JobRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was agreed when a job was opened, and what must outlive its checkpoints. The token
    itself is not stored."""

    name: str
    owner: str
    token_sha256: str
    task: Literal["classification", "regression", "hidden"]
    outputs: int
    precision: Literal["float32", "float16", "int8"]
    options: dict[str, int | float | bool | str | None]
    state: Literal["open", "cancelled", "closed"] = "open"
    """cancelled by the customer; closed by the vendor: long unasked for, or no checkpoint was
    left."""
    undone: Usage = Usage()
    """What was used for requests that the customer went back from: it stays used."""

    def agrees(self, opening: OpenJob) -> bool:
        """Whether an opening asks for the same as before."""
        return (self.task, self.outputs, self.precision, self.options) == (
            opening.task, opening.outputs, opening.precision, opening.options,
        )  # fmt: skip


@final
class JobStore:
    """The jobs of one vendor.

    Args:
        root: a directory of the vendor's own; no other process writes jobs there.
        bottom: id of the bottom package; jobs of another one are refused.

    Raises:
        OutputError: the directory holds jobs of another model or cut, or cannot be written.
    """

    def __init__(self, root: str | Path, bottom: str) -> None:
        self._jobs = Path(root) / "jobs"
        self.unreadable: set[str] = set()
        """Names of jobs whose record cannot be read; nothing of them is touched."""
        mark = Path(root) / "bottom.sha256"
        if mark.exists() and mark.read_text() != bottom:
            raise OutputError(
                f"{root}: holds jobs of another model or cut: choose another directory"
            )
        put_in_order(mark)
        if not mark.exists():
            with atomic_file(mark) as partial:
                partial.write_text(bottom)
        try:
            self._jobs.mkdir(mode=0o700, exist_ok=True)
            self._jobs.chmod(0o700)  # it may be of an earlier version
        except OSError as error:
            raise output_error(self._jobs, error) from error
        remove_left_overs(self._jobs)
        for job in self._jobs.glob("*/"):
            remove_left_overs(job)

    def records(self) -> list[JobRecord]:
        """Every job that was opened; one whose record cannot be read is left as it lies, logged."""
        found = []
        for path in sorted(self._jobs.glob("*/job.json")):
            if not _NAME.fullmatch(path.parent.name):
                continue
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=JobRecord))
            except msgspec.MsgspecError as error:
                self.unreadable.add(path.parent.name)
                logger.error("%s is left out: it cannot be read (%s)", path, error)
        return found

    def write(self, record: JobRecord) -> None:
        """Store a job's record, durably."""
        with secret_file(self._jobs / record.name / "job.json") as partial:
            partial.write_bytes(msgspec.json.encode(record))

    def touch(self, name: str) -> None:
        """Note that a job was asked for now.

        Raises:
            FileNotFoundError: its record is gone.
        """
        now = time.time()
        os.utime(self._jobs / name / "job.json", (now, now))

    def idle_seconds(self, name: str) -> float:
        """Since when nobody asked for a job, or moved it; for ever, if its record is gone.

        By its directory and its record: a state that is being stored may be gone when looked at.
        """
        folder = self._jobs / name
        try:
            latest = max(path.stat().st_mtime for path in (folder, folder / "job.json"))
        except FileNotFoundError:
            return math.inf
        return time.time() - latest

    def states(self, name: str) -> NumberedStates:
        """What is kept of a job, by the requests after which it was stored."""
        return NumberedStates(self._jobs / name, "at")

    def remove(self, name: str) -> None:
        """Remove all of a job."""
        remove_directory(self._jobs / name)

    def remove_unopened(self, seconds: float, opening: Container[str]) -> None:
        """Remove jobs without a record that nobody has touched for so long: killed while opened.

        Those in `opening` are spared; meanwhile none but these may be opened, and none removed.
        """
        for folder in list(self._jobs.glob("*/")):
            spared = folder.name in opening or not _NAME.fullmatch(folder.name)
            if spared or (folder / "job.json").exists():
                continue
            if time.time() - folder.stat().st_mtime > seconds:
                self.remove(folder.name)

    def forget(self, record: JobRecord, state: Literal["cancelled", "closed"]) -> None:
        """Remove a job's states; what was agreed stays, with the state that it ended in.

        The states go first: killed meanwhile, a job may be open without any, but none is said to
        have ended while states of it lie here.
        """
        self.drop_states(record.name)
        self.write(msgspec.structs.replace(record, state=state))
        self.touch(record.name)

    def drop_states(self, name: str) -> None:
        """Remove all that a job has learned, half-written states too."""
        self.states(name).drop_after(-1)
        remove_left_overs(self._jobs / name)
