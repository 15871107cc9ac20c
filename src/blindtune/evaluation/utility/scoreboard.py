"""The five rows of offsite-tuning side by side, and what follows from them.

Xiao, Lin, Han 2023 (arXiv 2302.04870): ZS is the full model untouched, FT the full model
fine-tuned, Emulator ZS and Emulator FT the emulator before and after tuning, Plug-in the full
model with the returned adapter. Further rows (other emulators, other ways of tuning) may stand
beside them under names of their own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from blindtune.atomic import atomic_file
from blindtune.errors import DataError

ZS = "ZS"
EMULATOR_ZS = "Emulator ZS"
EMULATOR_FT = "Emulator FT"
PLUG_IN = "Plug-in"
FT = "FT"
FIVE_ROWS = (ZS, EMULATOR_ZS, EMULATOR_FT, PLUG_IN, FT)

LEAST_GAIN = 1e-3
"""Nats or accuracy that the better reference must gain over ZS for recovery to mean anything."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Mean and sample standard deviation over runs; no deviation for a single run."""

    mean: float
    deviation: float | None
    runs: int

    def __format__(self, spec: str) -> str:
        """``mean ± deviation``, each in the given format; the mean alone if runs do not differ."""
        mean = format(self.mean, spec)
        return mean if not self.deviation else f"{mean} ± {format(self.deviation, spec)}"


class Cost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one thing (the full model, the emulator) or one act (study, emulate, tune) takes."""

    name: str
    parameters: int | None = None
    bytes: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    """Peak memory of the process."""


class Scoreboard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scores of the five rows and of any others, in one measure on one data set.

    Raises:
        DataError: a score is not finite or out of range, or the rows have different numbers of
            runs.
    """

    measure: Literal["nats", "accuracy"]
    """``nats`` per token, lower is better; or ``accuracy`` from 0 to 1, higher is better."""
    data: str
    """What was scored, in words."""
    rows: dict[str, tuple[float, ...]]
    """Name of the row -> one score a run (a seed); a single score stands for every run."""
    costs: tuple[Cost, ...] = ()

    def __post_init__(self) -> None:
        """Refuse scores that cannot be compared."""
        highest = math.inf if self.measure == "nats" else 1.0
        for name, scores in self.rows.items():
            if len(scores) not in {1, self.runs}:
                raise DataError(
                    f"expected 1 or {self.runs} scores for {name!r}, got {len(scores)}; "
                    "score every row in the same runs"
                )
            if not all(math.isfinite(score) and 0 <= score <= highest for score in scores):
                raise DataError(
                    f"expected scores in {self.measure} from 0 to {highest} for {name!r}, "
                    f"got {scores}"
                )

    @property
    def runs(self) -> int:
        """Number of runs."""
        return max((len(scores) for scores in self.rows.values()), default=0)

    def spread(self, name: str) -> Spread:
        """Mean and spread of a row's scores."""
        return _spread(self.rows[name])

    def scores(self, name: str) -> tuple[float, ...]:
        """One score a run, oriented so that higher is better."""
        scores = self.rows[name] * (self.runs if len(self.rows[name]) == 1 else 1)
        return tuple(-score for score in scores) if self.measure == "nats" else scores

    def recovery(self, of: str = PLUG_IN, against: str = FT) -> Spread | None:
        """Share of the gain of ``against`` over ZS that ``of`` reaches.

        (ln ZS - ln Plug-in) / (ln ZS - ln FT) for perplexity, (Plug-in - ZS) / (FT - ZS) for
        accuracy; run by run, then averaged. None when a row is missing or ``against`` gains
        less than ``LEAST_GAIN`` over ZS in any run.
        """
        if not {ZS, of, against} <= self.rows.keys():
            return None
        triples = zip(self.scores(ZS), self.scores(of), self.scores(against), strict=True)
        gains = [(reached - start, best - start) for start, reached, best in triples]
        if any(best < LEAST_GAIN for _, best in gains):
            return None
        return _spread([reached / best for reached, best in gains])

    def delta(self) -> Spread | None:
        """How much better Plug-in is than Emulator FT: nats per token, or accuracy points.

        Positive is what the model owner wants: the emulator alone is worth less. None when a row
        is missing.
        """
        if not {PLUG_IN, EMULATOR_FT} <= self.rows.keys():
            return None
        factor = 1.0 if self.measure == "nats" else 100.0
        pairs = zip(self.scores(PLUG_IN), self.scores(EMULATOR_FT), strict=True)
        return _spread([factor * (plug_in - emulator) for plug_in, emulator in pairs])


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What follows from a scoreboard; written beside it."""

    rows: dict[str, Spread]
    perplexity: dict[str, float] | None
    """exp of the mean nats of each row; None for accuracy."""
    recovery: Spread | None
    delta: Spread | None


def summarise(board: Scoreboard) -> Summary:
    """Mean and spread of every row, recovery and delta."""
    rows = {name: board.spread(name) for name in board.rows}
    nats = board.measure == "nats"
    return Summary(
        rows=rows,
        perplexity={name: as_perplexity(row.mean) for name, row in rows.items()} if nats else None,
        recovery=board.recovery(),
        delta=board.delta(),
    )


def to_json(board: Scoreboard) -> bytes:
    """The scoreboard and its summary as indented JSON."""
    both = {"scoreboard": board, "summary": summarise(board)}
    return msgspec.json.format(msgspec.json.encode(both), indent=2) + b"\n"


def save(board: Scoreboard, path: str | Path) -> None:
    """Write a scoreboard as JSON, replacing what is there.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_bytes(to_json(board))


def _spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), deviation=deviation, runs=len(values))


def as_perplexity(nats: float) -> float:
    """exp(nats); infinite when that overflows."""
    return math.exp(nats) if nats < 700 else math.inf
