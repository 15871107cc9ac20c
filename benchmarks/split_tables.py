"""Tables of split tuning: a list of lines each, from what `split.py` wrote."""

from figures import SEEDS, spread

SPLIT_ROWS = {
    "centralised": "LoRA in one place",
    "no-noise": "split, no noise",
    "token-100": "d_chi, token mode, eta 100",
    "token-80": "d_chi, token mode, eta 80",
    "token-65": "d_chi, token mode, eta 65",
    "CTI-80": "the same EP in training as eta 80, with contributing tokens",
    "CTI-65": "the same EP in training as eta 65, with contributing tokens",
    "groups-0.6-2": "word groups (another promise: docs/privacy.md)",
    "no-noise-cut-4": "split at 4 of 6 layers, no noise",
    "token-80-cut-4": "split at 4, token mode, eta 80",
}


def split_table(sst2):
    """Utility and empirical privacy of split tuning; EP of what leaves at cut 0."""
    lines = ["| SST-2, MiniLM, two-part split | EP | UA | seeds |", "|---|---:|---:|---:|"]
    for name, shown in SPLIT_ROWS.items():
        rows = [r for s in SEEDS if (r := sst2["rows"].get(f"{name}-{s}"))]
        wrong = [r["changed in test"] for r in rows if r.get("changed in test") is not None]
        cells = [shown, spread(wrong, 2), spread([r["UA"] for r in rows], 3), str(len(rows))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
