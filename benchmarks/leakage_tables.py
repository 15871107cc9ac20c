"""The table of what adapters leak, from what `leakage.py` wrote."""

REPEATS = ("0", "1", "4", "16")


def leakage_table(arc):
    """Utility, membership and exposure of every tuning."""
    lines = [
        "| tuned | emulator | plug-in | AUC, on the emulator | AUC, on the full model "
        "| TPR at 1 % FPR | exposure, bits: never / 1 / 4 / 16 times |",
        "|---|---:|---:|---|---|---:|---|",
    ]
    rows = arc["rows"]
    if "untuned" in rows:
        cells = (f"{rows['untuned'][key]:.3f}" for key in ("Emulator", "Plug-in"))
        lines.append("| untuned | " + " | ".join(cells) + " | | | | |")
    for name, row in rows.items():
        if name == "untuned":
            continue
        inside, full = row["membership, emulator"], row["membership, full model"]
        bits = " / ".join(f"{row['canaries'][r]['bits']:.1f}" for r in REPEATS)
        most = row["canaries"]["0"]["most_bits"]
        cells = (
            f"{row['Emulator']:.3f}",
            f"{row['Plug-in']:.3f}",
            _area(inside),
            _area(full),
            f"{inside['found']:.3f}",
            f"{bits} of {most:.0f}",
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _area(found):
    return f"{found['auc']:.3f} [{found['auc_low']:.3f}, {found['auc_high']:.3f}]"
