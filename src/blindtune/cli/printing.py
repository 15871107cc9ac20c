"""What verbs print: calm tables on stdout, one JSON object on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate

PLAIN_WIDTH = 120
OnStage = Callable[[str, int, int], None]
"""(what is being done, how much is done, how much there is)."""


def stdout_console() -> Console:
    """A console on stdout; where that is no terminal, plain text of a fixed width."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(highlight=False, width=width, emoji=False)


def print_json(facts: Mapping[str, Any]) -> None:
    """One line on stdout."""
    print(json_line(facts), flush=True)


def json_line(facts: Mapping[str, Any]) -> str:
    """One line of JSON; numbers that it has no word for become null."""
    return json.dumps(plain(facts), allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def print_pairs(console: Console, title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """A heading and names with their values."""
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(f"  {name}", escape(value))
    console.print(f"[bold]{escape(title)}[/bold]")
    console.print(table)


def print_columns(console: Console, names: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table with a head; every column but the first is flush right."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(names):
        table.add_column(name, justify="right" if k else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def print_estimate(verb: str, estimate: Estimate, *, as_json: bool) -> None:
    """What a dry run found, and that it is an estimate."""
    if as_json:
        print_json({"verb": verb, "dry_run": True, "estimate": asdict(estimate)})
        return
    rate = estimate.rate
    threads = "1 thread" if rate.threads == 1 else f"{rate.threads} threads"
    pairs = [
        ("memory", f"up to {size(estimate.memory_bytes)}"),
        ("output", size(estimate.written_bytes)),
        ("scratch space", size(estimate.scratch_bytes)),
        ("tokens", f"{estimate.tokens:,}"),
        ("time", f"about {duration(estimate.seconds)}"),
        *((f"  {part}", duration(seconds)) for part, seconds in estimate.parts.items()),
        *((name, size(count)) for name, count in estimate.sizes.items()),
        *estimate.findings.items(),
    ]
    console = stdout_console()
    print_pairs(console, f"{verb}: an estimate, nothing was done", pairs)
    console.print(
        f"  Times are computed from {rate.flops_per_second / 1e9:,.0f} GFLOP/s, measured just now "
        f"on matrix products at {threads}.",
        style="dim",
    )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def stages() -> Iterator[OnStage]:
    """A bar a stage on stderr, with the time left; where that is no terminal, lines now and then.

    Where (done, total) is reported, `partial(show, "score")` makes a bar of that name.
    """
    if not sys.stderr.isatty():
        from blindtune.training.progress import SpacedLines

        yield SpacedLines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield show
