"""A vendor's log: one JSON object a line, made of events and of what this project's modules report.

Names of customers and jobs are in it, with counts, sizes and times; no text, state, label or token
is, because no event and no message of `exchange` holds one. Of other libraries' messages only the
kind of error is written: what they put into their texts is not ours to vouch for.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, final

from blindtune.errors import OutputError
from blindtune.exchange.wire.events import (
    Answered,
    Crossed,
    Event,
    JobCancelled,
    JobClosed,
    JobOpened,
    Worked,
)

LINE_SECONDS = 1.0
"""Between two lines of a customer about the same kind of event."""
_WATCHED = ("blindtune", "grpc")
_AT_WILL = ("blindtune.exchange.wire", "grpc")
"""What logs faults that a customer can cause as often as it likes."""


@final
class EventLog:
    """An observer of events that writes lines; also takes over the logging of this process's
    `blindtune` and `grpc` until it is closed.

    Requests that were answered well are not written; the metrics count them. Of what a customer
    can bring about as often as it likes, one line a second is written of each kind (the event, and
    its answer or reason; or the fault and where it was logged), with `left_out`, how many of them
    there were since the line before.

    Args:
        path: a file to append to; None: standard error.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._lock = threading.Lock()
        self._told: dict[tuple[str | None, ...], tuple[float, int]] = {}
        """By kind: when a line was last written, and how many were left out since."""
        self._file: TextIO = sys.stderr
        if path is not None:
            try:
                self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 (until it is closed)
            except OSError as error:
                raise OutputError(
                    f"{path}: cannot be written ({error.strerror}): choose another log file"
                ) from error
        self._handler = _Records(self)
        self._before: list[tuple[logging.Logger, bool]] = []
        for name in _WATCHED:
            logger = logging.getLogger(name)
            self._before.append((logger, logger.propagate))
            logger.addHandler(self._handler)
            logger.propagate = False

    def __call__(self, event: Event) -> None:
        """Write an event, unless it is one of those that come with every request."""
        plain = isinstance(event, Answered) and event.answer == "ok"
        if plain or isinstance(event, Crossed | Worked):
            return
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", type(event).__name__).lower()
        facts = asdict(event)
        if not isinstance(event, JobOpened | JobCancelled | JobClosed):  # once a stream at most
            kind = (name, event.customer, facts.get("answer"), facts.get("reason"))
            if (left_out := self.left_out(kind)) is None:
                return
            if left_out:
                facts["left_out"] = left_out
        self.write(name, facts)

    def left_out(self, kind: tuple[str | None, ...]) -> int | None:
        """How many of a kind had no line since the last one; None: this one gets none either."""
        now = time.monotonic()
        with self._lock:
            last, count = self._told.get(kind, (-math.inf, 0))
            if now < last + LINE_SECONDS:
                self._told[kind] = (last, count + 1)
                return None
            self._told[kind] = (now, 0)
            return count

    def write(self, name: str, facts: dict[str, Any]) -> None:
        """Write a line; a log that cannot be written stops nothing."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in facts.items()}
        line = json.dumps({"time": now, "event": name, **rounded})
        with self._lock, suppress(OSError, ValueError):
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Give the logging back, and close the file."""
        for logger, propagate in self._before:
            logger.removeHandler(self._handler)
            logger.propagate = propagate
        if self._file is not sys.stderr:
            self._file.close()


class _Records(logging.Handler):
    """Python's log records as lines."""

    def __init__(self, log: EventLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        facts: dict[str, Any] = {"logger": record.name, "level": record.levelname.lower()}
        if record.name.partition(".")[0] == "blindtune":
            facts["message"] = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            facts["error"] = record.exc_info[0].__name__
            facts["place"] = "".join(traceback.format_tb(record.exc_info[2]))
        if record.name.startswith(_AT_WILL):
            left_out = self._log.left_out((record.name, str(record.lineno), facts.get("error")))
            if left_out is None:
                return
            facts |= {"left_out": left_out} if left_out else {}
        self._log.write("message", facts)
