"""Figures of committed results: where they lie, and how a mean is written."""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)


def path_of(name):
    return RESULTS / f"{'' if '-' in name else 'offsite-'}{name}.json"


def part(name):
    return json.loads(path_of(name).read_text())


def seeds_of(rows, name):
    return [rows[f"{name}-{s}"] for s in SEEDS if f"{name}-{s}" in rows]


def spread(values, digits):
    """Mean and sample deviation, or the one value; nothing of nothing."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def efficient(points):
    """Names of the points that no other one is at least as good as in both ways."""
    return [
        name for name, (x, y) in points.items()
        if not any((a, b) != (x, y) and a >= x and b >= y for a, b in points.values())
    ]  # fmt: skip
