"""The scoreboard as text: cells for any table, tables for the terminal, and its verdict."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from blindtune.evaluation.utility.scoreboard import (
    FT,
    PLUG_IN,
    ZS,
    Cost,
    Scoreboard,
    Spread,
    as_perplexity,
)

if TYPE_CHECKING:
    from rich.console import Group

Cells = tuple[list[str], list[list[str]]]
"""Header and rows; the first column names the row."""


def score_cells(board: Scoreboard) -> Cells:
    """Header and rows of the table of scores, as text; the first column is the row's name."""
    if board.measure == "nats":
        header = ["", "Perplexity", "Nats per token", "Gain over ZS"]
    else:
        header = ["", "Accuracy, %", "Gain over ZS, points"]
    rows = []
    for name in board.rows:
        row = board.spread(name)
        if board.measure == "nats":
            cells = [name, f"{as_perplexity(row.mean):,.2f}", f"{row:.3f}"]
        else:
            cells = [name, f"{_scaled(row, 100):.1f}"]
        rows.append([*cells, _gain(board, name)])
    return header, rows


def cost_cells(costs: Sequence[Cost]) -> Cells:
    """Header and rows of the table of costs; a column that no cost fills is left out."""
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "parameters": ("Parameters", _count),
        "bytes": ("Size", _mebibytes),
        "tokens": ("Tokens", _count),
        "seconds": ("Seconds", lambda value: f"{value:,.1f}"),
        "memory_bytes": ("Peak memory", _mebibytes),
    }
    used = [field for field in columns if any(getattr(c, field) is not None for c in costs)]
    header = ["", *(columns[field][0] for field in used)]
    rows = []
    for cost in costs:
        values = [(columns[field][1], getattr(cost, field)) for field in used]
        cells = ["" if value is None else show(value) for show, value in values]
        rows.append([cost.name, *cells])
    return header, rows


def verdict(board: Scoreboard) -> list[str]:
    """Recovery and delta as sentences; says so when recovery means nothing."""
    sentences = []
    recovery, delta = board.recovery(), board.delta()
    if recovery is not None:
        percent = _scaled(recovery, 100)
        sentences.append(f"The plug-in reaches {percent:.1f} % of the gain of full fine-tuning.")
    elif {ZS, PLUG_IN, FT} <= board.rows.keys():
        sentences.append("Recovery is undefined: full fine-tuning gains nothing over ZS here.")
    if delta is not None:
        unit = "nats per token" if board.measure == "nats" else "accuracy points"
        side = "better" if delta.mean >= 0 else "worse"
        size = _scaled(delta, 1 if delta.mean >= 0 else -1)
        digits = ".2f" if board.measure == "nats" else ".1f"
        sentences.append(f"The plug-in is {size:{digits}} {unit} {side} than the tuned emulator.")
    return sentences


def score_table(board: Scoreboard) -> Group:
    """The scores and the verdict for the terminal."""
    runs = f" ({board.runs} runs, mean ± deviation)" if board.runs > 1 else ""
    return _rich(score_cells(board), f"{board.data}{runs}", verdict(board))


def cost_table(board: Scoreboard) -> Group:
    """Sizes and times for the terminal."""
    return _rich(cost_cells(board.costs), "Sizes and times", [])


def _rich(cells: Cells, title: str, sentences: Sequence[str]) -> Group:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in cells[1]:
        table.add_row(*(Text(cell) for cell in row))
    return Group(Text(title, style="bold"), table, *(Text(sentence) for sentence in sentences))


def _scaled(spread: Spread, factor: float) -> Spread:
    deviation = None if spread.deviation is None else abs(factor) * spread.deviation
    return Spread(mean=factor * spread.mean, deviation=deviation, runs=spread.runs)


def _gain(board: Scoreboard, name: str) -> str:
    if name == ZS or ZS not in board.rows:
        return ""
    pairs = zip(board.scores(name), board.scores(ZS), strict=True)
    mean = statistics.fmean(score - start for score, start in pairs)
    text = f"{mean:+.3f}" if board.measure == "nats" else f"{100 * mean:+.1f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _count(value: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)


def _mebibytes(value: int) -> str:
    return f"{value / 2**20:,.1f} MiB"
