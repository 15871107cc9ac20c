"""Tables of the offsite benchmark: a list of lines each, from what `offsite.py` wrote."""

import math
import statistics

from blindtune.evaluation.pages import plots
from blindtune.evaluation.pages.figures import standalone
from figures import SEEDS, part, spread


def wiki_rows(main):
    """Name of the row -> nats of every seed."""
    rows, rate = main["rows"], best_rate(main)
    zero = rows["ZS"]["ZS"]

    def seeds(prefix, key):
        return [rows[f"{prefix}-{s}"][key] for s in SEEDS if f"{prefix}-{s}" in rows]

    return {
        "ZS": [zero],
        "Emulator ZS": seeds("ScaleOT", "Emulator ZS"),
        "Emulator FT": seeds("ScaleOT", "Emulator FT"),
        "Plug-in": seeds("ScaleOT", "Plug-in"),
        "Adapter tuned directly": seeds("direct", "Adapter tuned directly"),
        "FT": seeds(f"FT-{rate}", "FT"),
        "Uniform LayerDrop: emulator ZS": seeds("uniform", "Uniform ZS"),
        "Uniform LayerDrop: emulator FT": seeds("uniform", "Uniform FT"),
        "Uniform LayerDrop: plug-in": seeds("uniform", "Uniform plug-in"),
    }


def best_rate(main):
    """The learning rate of full fine-tuning with the lowest test loss at seed 0."""
    tried = {
        rate: main["rows"][f"FT-{rate}-0"]["FT"]
        for rate in main["rates"]["FT grid"]
        if f"FT-{rate}-0" in main["rows"]
    }
    return min(tried, key=tried.get)


def wiki_table(main):
    rows = wiki_rows(main)
    lines = ["| WikiText-2 | nats a token | perplexity |", "|---|---:|---:|"]
    for name, nats in rows.items():
        if nats:
            shown = f"**{name}**" if name == "Plug-in" else name
            lines.append(f"| {shown} | {spread(nats, 3)} | {math.exp(statistics.mean(nats)):.1f} |")
    zero = rows["ZS"][0]

    def recovery(of, against):
        pairs = zip(rows[of], rows[against], strict=False)
        return spread([(zero - a) / (zero - b) for a, b in pairs], 2)

    delta = [f - p for f, p in zip(rows["Emulator FT"], rows["Plug-in"], strict=True)]
    uniform = "Uniform LayerDrop: plug-in"
    beside = f"Uniform LayerDrop of as many layers recovers {recovery(uniform, 'FT')}. "
    lines += [
        "",
        f"Recovery, the share of full fine-tuning's gain that the plug-in reaches: "
        f"**{recovery('Plug-in', 'FT')}**; of the gain of tuning the same layers directly: "
        f"**{recovery('Plug-in', 'Adapter tuned directly')}**. The plug-in is "
        f"**{spread(delta, 2)}** nats better than the tuned emulator. "
        f"{beside if rows[uniform] else ''}{seeds_said(rows)}{grid_said(main)}",
    ]
    return lines


def grid_said(main):
    tried = [r for r in main["rates"]["FT grid"] if f"FT-{r}-0" in main["rows"]]
    if len(tried) == 1:
        return f"FT at learning rate {tried[0]:g}; the rest of its grid has not been run."
    rates = ", ".join(f"{rate:g}" for rate in tried)
    return f"FT at its best learning rate, {best_rate(main):g}, of {rates}."


def seeds_said(rows):
    count = len(rows["Plug-in"])
    return f"{count} seeds, mean ± deviation. " if count > 1 else "One seed. "


def arc_table(arc):
    rows = arc["rows"]
    names = {
        "ZS": ("ZS", "ZS"),
        "Emulator ZS": ("ScaleOT", "Emulator ZS"),
        "Emulator FT": ("ScaleOT", "Emulator FT"),
        "**Plug-in**": ("ScaleOT", "Plug-in"),
        "Adapter tuned directly": ("direct", "Adapter tuned directly"),
        "FT": ("FT", "FT"),
        "Uniform LayerDrop: emulator FT": ("uniform", "Emulator FT"),
        "Uniform LayerDrop: plug-in": ("uniform", "Plug-in"),
    }
    lines = ["| ARC-Easy, 400 questions | accuracy | by characters |", "|---|---:|---:|"]
    for shown, (row, key) in names.items():
        called = ("ZS",) if row == "ZS" else [f"{row}-{seed}" for seed in SEEDS]
        scores = [rows[name][key] for name in called if name in rows]
        percent = [
            spread([100 * score[kind] for score in scores], 1) for kind in ("acc", "acc_norm")
        ]
        lines.append(f"| {shown} | {percent[0]} % | {percent[1]} % |")
    return lines


def grid_table(grid):
    keys = [k for k, row in grid["rows"].items() if "Plug-in" in row]
    alphas = sorted({k.split("-")[0] for k in keys}, key=float)
    betas = sorted({k.split("-")[1] for k in keys}, key=float)
    header = "| alpha \\ rank removed | " + " | ".join(betas) + " |"
    lines = [header, "|---" * (len(betas) + 1) + "|"]
    for alpha in alphas:
        cells = []
        for beta in betas:
            row = grid["rows"].get(f"{alpha}-{beta}")
            cells.append(
                "" if row is None else " / ".join(
                    f"{math.exp(row[k]):.1f}" for k in ("Plug-in", "Emulator FT", "Emulator ZS")
                )
            )  # fmt: skip
        lines.append(f"| {alpha} | " + " | ".join(cells) + " |")
    return lines


def frontier_table(frontier):
    """Triplets at full length, against the main part's FT and directly tuned adapter."""
    main = part("main")
    rows, zero = wiki_rows(main), main["rows"]["ZS"]["ZS"]
    tuned, direct = rows["FT"], rows["Adapter tuned directly"]
    lines = [
        "| alpha | beta kept | layers replaced | plug-in, nats | recovery of FT "
        "| of the adapter tuned directly | gap to emulator FT, nats |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    triplets = dict.fromkeys(key.rpartition("-")[0] for key in frontier["rows"])
    for triplet in sorted(triplets, key=lambda t: [-float(x) for x in reversed(t.split("-"))]):
        seeds = {s: row for s in SEEDS if (row := frontier["rows"].get(f"{triplet}-{s}"))}
        plug = [row["Plug-in"] for row in seeds.values()]
        cells = [
            *triplet.split("-"),
            str(len(seeds[0]["replaced"])),
            spread(plug, 3),
            spread([(zero - r["Plug-in"]) / (zero - tuned[s]) for s, r in seeds.items()], 2),
            spread([(zero - r["Plug-in"]) / (zero - direct[s]) for s, r in seeds.items()], 2),
            spread([r["Emulator FT"] - r["Plug-in"] for r in seeds.values()], 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def grid_figure(grid):
    """Heat maps of the plug-in and of the tuned emulator over (alpha, share of rank removed)."""
    panels = {
        name: {
            tuple(map(float, key.split("-"))): row[name]
            for key, row in grid["rows"].items()
            if name in row
        }
        for name in ("Plug-in", "Emulator FT")
    }
    return standalone(plots.grid(panels, beta="rank removed"))


def ranking_table(ranking):
    lines = [
        "| study | rank correlation with the damage of each layer alone | emulator ZS, nats |",
        "|---|---:|---:|",
    ]
    for name, row in ranking["rows"].items():
        lines.append(
            f"| {name} | {row['spearman_with_single_damage']:.2f} | {row['emulator_nats']:.3f} |"
        )
    return lines


def cost_lines(cost):
    row = cost["rows"]["cost"]
    rates = {
        kind: (run["tokens_per_second"], run["peak_memory_bytes"] / 2**30)
        for kind, run in row["tuning"].items()
    }
    base_rate, base_memory = rates["full fine-tuning"]
    lines = ["| tuning, one thread | tokens/s | peak memory | against FT |", "|---|---:|---:|---:|"]
    for kind, (rate, memory) in rates.items():
        lines.append(
            f"| {kind} | {rate:.0f} | {memory:.1f} GiB | {rate / base_rate:.2f}x the speed, "
            f"{memory / base_memory:.2f}x the memory |"
        )
    lines += [
        "",
        "Harmonizers by regression (a study also orders layers and distils) take "
        f"{row['regression_over_forward']:.2f}x one forward pass over its tokens. A forward pass "
        f"takes {row['forward_over_floor']:.2f}x its floor (2 x parameters x tokens FLOPs at the "
        f"measured {row['matmul_gflops']:.0f} GFLOP/s).",
    ]
    return lines
