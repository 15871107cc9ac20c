"""Tables of emulators by every method: lines, from what `competitors.py` and `offsite.py` wrote."""

import statistics

from blindtune.evaluation.pages import plots
from blindtune.evaluation.pages.figures import standalone
from figures import SEEDS, efficient, part, spread
from offsite_tables import best_rate

# Rows that `offsite.py` has: name -> (part, prefix, the names of its figures).
OFFSITE = {
    "ours (2, 0.25, 0.8)": ("main", "ScaleOT", ("Emulator ZS", "Emulator FT", "Plug-in")),
    "ours (2, 0.2, 1)": ("frontier", "0.2-1.0", ("Emulator ZS", "Emulator FT", "Plug-in")),
    "uniform": ("main", "uniform", ("Uniform ZS", "Uniform FT", "Uniform plug-in")),
}


# And on ARC-Easy; the other tasks have rows of these names in `competitors.py`.
ARC = {"ours": "ScaleOT", "uniform": "uniform", "FT": "FT", "Adapter tuned directly": "direct"}
# As `competitors.py` calls what has its setting in its name above.
HERE = {"ours (2, 0.25, 0.8)": "ours", "ours (2, 0.2, 1)": "ours, milder"}
BESIDE_OURS = ("ours, training-free", "ours, short study")
UNTUNED, TUNED, PLUGGED = KEYS = ("Emulator ZS", "Emulator FT", "Plug-in")
REFERENCES = ("ZS", "Adapter tuned directly", "FT")


def best_stop(healing):
    """(tokens, nats) of the best stop of a row of `healing`."""
    stops = ((tokens, loss["nats_per_token"]) for tokens, loss in healing["healed"])
    return min(stops, key=lambda stop: stop[1])


def best_healing(method):
    """The row of `healing` that brought an emulator the nearest to the full model, if any."""
    rows = part("competitors-healing")["rows"]
    mine = [row for name, row in rows.items() if name.rpartition("-")[0] == method]
    return min(mine, key=lambda row: best_stop(row)[1], default=None)


def healed(method, task):
    """Scores of a healed emulator on a task, of every seed.

    The first seed's nats on WikiText-2 are those of `healing`, to the digit. Rows that were healed
    at a rate that is no longer the best are not shown.
    """
    best, rows = best_healing(method), part("competitors-healed")["rows"]
    if best is None:
        return []
    mine = [rows[f"{method}-{s}"] for s in SEEDS if f"{method}-{s}" in rows]
    rate = best["config"]["learning_rate"]
    found = [row[task] for row in mine if row["config"]["learning_rate"] == rate]
    return found or [best_stop(best)[1]] * (task == "wiki")


def methods_of(rows):
    return dict.fromkeys(name.rpartition("-")[0] for name in rows)


def wiki_scores(wiki):
    """Method -> nats of every seed: emulator untouched, emulator tuned, plug-in."""
    found = {
        name: [[wiki["rows"][f"{name}-{s}"][k] for k in KEYS] for s in SEEDS
               if f"{name}-{s}" in wiki["rows"]]
        for name in methods_of(wiki["rows"])
    }  # fmt: skip
    for name, (where, prefix, theirs) in OFFSITE.items():
        rows = part(where)["rows"]
        found[name] = [[rows[f"{prefix}-{s}"][k] for k in theirs] for s in SEEDS
                       if f"{prefix}-{s}" in rows]  # fmt: skip
    return found


def wiki_figure(wiki):
    """Recovery and gap of every method, and who has no better beside it.

    Our cheaper studies lie beside our default and are in the table alone.
    """
    main = part("main")
    rows, rate = main["rows"], best_rate(main)
    zero = rows["ZS"]["ZS"]
    gain = zero - statistics.mean(rows[f"FT-{rate}-{s}"]["FT"] for s in SEEDS)
    direct = statistics.mean(rows[f"direct-{s}"]["Adapter tuned directly"] for s in SEEDS)
    points = {}
    for name, seeds in wiki_scores(wiki).items():
        if name in BESIDE_OURS:
            continue
        _, tuned, plugged = map(statistics.mean, zip(*seeds, strict=True))
        points[name] = ((zero - plugged) / gain, tuned - plugged)
    worth = {name: point for name, point in points.items() if point[0] > 0}
    plot = plots.frontier(worth, efficient(worth), bound=(zero - direct) / gain)
    return standalone(plot)


def wiki_table(wiki):
    """Plug-in and gap of every method, best plug-in first."""
    found = wiki_scores(wiki)
    lines = [
        "| WikiText-2, nats a token | emulator ZS | healed | emulator FT | plug-in | gap | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, seeds in sorted(found.items(), key=lambda item: item[1][0][2]):
        columns = [spread([row[i] for row in seeds], 3) for i in range(3)]
        columns.insert(1, spread(healed(HERE.get(name, name), "wiki"), 3))
        columns += [spread([row[1] - row[2] for row in seeds], 2), str(len(seeds))]
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return lines


def choice_table(report, name, task, questions=400):
    """Accuracy of every method on multiple choice, best plug-in first; then the full model's."""
    rows = report["rows"]
    if name == "ARC-Easy":
        theirs = part("arc")["rows"]
        rows = rows | {"ZS-0": theirs["ZS"]}
        for ours, other in ARC.items():
            rows |= {f"{ours}-{s}": theirs[f"{other}-{s}"] for s in SEEDS
                     if f"{other}-{s}" in theirs}  # fmt: skip
    seeds = {method: [rows[f"{method}-{s}"] for s in SEEDS if f"{method}-{s}" in rows]
             for method in methods_of(rows)}  # fmt: skip

    def percent(method, key, kind="acc"):
        return [100 * row[key][kind] for row in seeds[method]]

    lines = [
        f"| {name}, {questions} questions, % right | emulator ZS | healed | emulator FT | plug-in "
        "| gap | plug-in, by characters | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    methods = [m for m in seeds if m not in REFERENCES]
    for method in sorted(methods, key=lambda m: -statistics.mean(percent(m, PLUGGED))):
        gaps = [
            a - b for a, b in zip(percent(method, PLUGGED), percent(method, TUNED), strict=True)
        ]
        columns = [spread(percent(method, key), 1) for key in KEYS]
        columns.insert(1, spread([100 * score["acc"] for score in healed(method, task)], 1))
        columns += [spread(gaps, 1), spread(percent(method, PLUGGED, "acc_norm"), 1)]
        lines.append(f"| {method} | " + " | ".join(columns) + f" | {len(gaps)} |")
    for method in (m for m in REFERENCES if m in seeds):
        found = [spread(percent(method, method, kind), 1) for kind in ("acc", "acc_norm")]
        lines.append(f"| *{method}* | | | | {found[0]} | | {found[1]} | {len(seeds[method])} |")
    return lines


def cost_table(cost):
    """What making an emulator takes, and what it weighs."""
    lines = [
        "| making one emulator | seconds, one thread | TFLOPs | tokens read | MB | parameters |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in cost["rows"].items():
        share = row["parameters"] / row["full_parameters"]
        tokens = "" if row["tokens"] is None else f"{row['tokens']:,}"
        lines.append(
            f"| {name} | {row['seconds']:,.0f} | {row['flops'] / 1e12:,.1f} | {tokens} "
            f"| {row['bytes'] / 1e6:,.0f} | {share:.0%} |"
        )
    return lines


def pace_lines(pace):
    """Seconds of our short study beside those of distillation, taken in turn."""
    rows = pace["rows"].values()
    ours, theirs = (spread([row[key] for row in rows], 0) for key in ("short study", "distilled"))
    ratio = spread([row["ratio"] for row in rows], 1)
    return [
        f"In turn on one machine, {len(rows)} times (`competitors.py pace`): the short study with "
        f"its emulator {ours} s, 400 steps of distillation {theirs} s, reckoned from 12 that were "
        f"timed: {ratio} times as long."
    ]


def healing_table(healing):
    """Perplexity of an emulator trained on by whoever keeps it, and of the control."""
    lines = [
        "| healed | grown | rate | the full model | as shipped | healed, by tokens | the control |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for name, row in healing["rows"].items():
        config = row["config"]
        how = f"{name.rsplit('-', 1)[0]} | {config['regrow']} | {config['learning_rate']:.0e}"
        curves = [
            ", ".join(f"{loss['perplexity']:.1f} ({n // 1000}k)" for n, loss in row[key])
            for key in ("healed", "control")
        ]
        known = " | ".join(f"{row[key]['perplexity']:.1f}" for key in ("full", "emulator"))
        lines.append(f"| {how} | {known} | {curves[0]} | {curves[1]} |")
    return lines
