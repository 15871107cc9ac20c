"""What a run reports while it runs: a progress bar, a callback, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The state of a run after an optimizer step."""

    step: int
    """Optimizer steps done."""
    max_steps: int
    """Optimizer steps of the whole run."""
    tokens: int
    """Tokens seen by all processes since the run began."""
    tokens_per_second: float
    """Tokens of all processes over wall time, since this process began."""
    train_loss: float | None
    """Newest logged training loss, nats a token."""
    validation_loss: float | None
    """Newest validation loss, nats a token."""
    bytes_sent: int | None = None
    """To the other party, where there is one."""


OnProgress = Callable[[StepReport], None]


@contextmanager
def progress_bar(max_steps: int, silent: bool) -> Iterator[OnProgress]:
    """A bar on stderr with time left, tokens/s and losses; where no terminal is, `SpacedLines`."""
    console = Console(stderr=True)
    if silent:
        yield lambda report: None
        return
    if not console.is_terminal:
        lines = SpacedLines()
        yield lambda report: lines("tuning", report.step, report.max_steps)
        return
    columns = (
        TextColumn("tuning"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=max_steps)

        def show(report: StepReport) -> None:
            parts = [f"{report.tokens_per_second:,.0f} tok/s"]
            if report.train_loss is not None:
                parts.append(f"loss {report.train_loss:.3f}")
            if report.validation_loss is not None:
                parts.append(f"validation {report.validation_loss:.3f}")
            if report.bytes_sent is not None:
                parts.append(f"{report.bytes_sent / 1e6:,.1f} MB sent")
            bar.update(task, completed=report.step, description=" · ".join(parts))

        yield show


class SpacedLines:
    """Progress for a log: a line on stderr from time to time, none of what is soon done."""

    def __init__(self, every_seconds: float = 30.0) -> None:
        """Start the clock; the first line comes after as long."""
        self._every_seconds = every_seconds
        self._last = time.perf_counter()
        self._begun: dict[str, tuple[float, int]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say how far a stage is, and how long the rest will take at its pace so far."""
        now = time.perf_counter()
        begun, before = self._begun.setdefault(stage, (now, done))
        if now - self._last < self._every_seconds:
            return
        self._last = now
        pace = (now - begun) / (done - before) if done > before else None
        left = "" if pace is None else f", {pace * (total - done):,.0f} s left"
        print(f"{stage}: {done:,} of {total:,}{left}", file=sys.stderr, flush=True)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        """Start."""
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self._start


def reset_peak_memory() -> None:
    """Begin a new measurement; where the kernel refuses, the process's peak stays."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """GPU: most memory allocated on the current device. CPU: peak resident set of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
