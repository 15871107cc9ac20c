"""The table of what adapters leak, from what `leakage.py` wrote."""

import statistics

from figures import SEEDS, spread

REPEATS = ("0", "1", "4", "16")
ON_EMULATOR, ON_MODEL = "membership, emulator", "membership, full model"


def leakage_table(arc):
    """Utility, membership and exposure of every tuning: means over its seeds."""
    lines = [
        "| tuned | emulator | plug-in | AUC, on the emulator | AUC, on the full model "
        "| TPR at 1 % FPR | exposure, bits: never / 1 / 4 / 16 times | seeds |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    rows = arc["rows"]
    if "untuned" in rows:
        cells = (f"{rows['untuned'][key]:.3f}" for key in ("Emulator", "Plug-in"))
        lines.append("| untuned | " + " | ".join(cells) + " | | | | | |")
    for name in dict.fromkeys(name.rpartition("-")[0] for name in rows if name != "untuned"):
        seeds = [rows[f"{name}-{seed}"] for seed in SEEDS if f"{name}-{seed}" in rows]
        bits = (statistics.mean(row["canaries"][r]["bits"] for row in seeds) for r in REPEATS)
        cells = (
            *(spread([row[key] for row in seeds], 3) for key in ("Emulator", "Plug-in")),
            *(_area([row[key] for row in seeds]) for key in (ON_EMULATOR, ON_MODEL)),
            spread([row[ON_EMULATOR]["found"] for row in seeds], 3),
            " / ".join(f"{b:.1f}" for b in bits)
            + f" of {seeds[0]['canaries']['0']['most_bits']:.0f}",
            str(len(seeds)),
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _area(found):
    """With the interval of the one seed, or the deviation of several."""
    mean = spread([one["auc"] for one in found], 3)
    return (
        mean
        if len(found) > 1
        else f"{mean} [{found[0]['auc_low']:.3f}, {found[0]['auc_high']:.3f}]"
    )
