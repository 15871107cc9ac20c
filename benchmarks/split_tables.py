"""Tables of split tuning: a list of lines each, from what `split.py` wrote."""

import math
import statistics
from statistics import NormalDist

from blindtune.evaluation.pages import plots
from blindtune.evaluation.pages.figures import standalone
from figures import SEEDS, efficient, part, seeds_of, spread
from privatizer_tables import strongest_ep

ATTACKED = {"token-80": "d_chi"}  # names in privatizers-leaks
SPLIT_ROWS = {
    "centralised": "LoRA in one place",
    "no-noise": "split, no noise",
    "groups": "word groups (`--public-text`)",
    "fine": "finer word groups (`--wrong-guesses 0.6`)",
    "exponential": "exponential mechanism, eta 15",
    "exponential-equal": "the same, eta 14.7: as hidden from trigrams as eta 80 below",
    "token-100": "d_chi, token mode, eta 100",
    "token-80": "d_chi, token mode, eta 80",
    "token-65": "d_chi, token mode, eta 65",
    "CTI-80": "the same EP in training as eta 80, with contributing tokens",
    "CTI-65": "the same EP in training as eta 65, with contributing tokens",
    "no-noise-cut-4": "split at 4 of 6 layers, no noise",
    "token-80-cut-4": "split at 4, token mode, eta 80",
}


def split_table(sst2):
    """Utility and empirical privacy of split tuning; EP of what leaves at cut 0."""
    lines = [
        "| SST-2, MiniLM, two-part split | tokens changed | EP, strongest attack | UA | seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    leaks, read = part("privatizers-leaks")["rows"], part("privatizers-language")["rows"]
    found = sst2["rows"] | part("privatizers-sst2")["rows"]
    for name, shown in SPLIT_ROWS.items():
        rows = [r for s in SEEDS if (r := found.get(f"{name}-{s}"))]
        wrong = [r["changed in test"] for r in rows if r.get("changed in test") is not None]
        called = ATTACKED.get(name, name)
        found_EP = [strongest_ep(seeds_of(rows, called)) for rows in (leaks, read)]
        strongest = spread(min(filter(None, found_EP), key=statistics.mean, default=[]), 2)
        scores = spread([r["UA"] for r in rows], 3)
        lines.append(f"| {shown} | {spread(wrong, 2)} | {strongest} | {scores} | {len(rows)} |")
    return lines


DRAWN = {
    "no-noise": "no noise",
    "exponential": "exponential, eta 15",
    "token-100": "d_chi, eta 100",
    "token-80": "d_chi, eta 80",
    "token-65": "d_chi, eta 65",
    "CTI-80": "eta 80, CTI",
    "CTI-65": "eta 65, CTI",
    "groups": "word groups (another promise)",
    "fine": "finer word groups (another promise)",
}


def split_figure(sst2):
    """What each setting keeps of utility, and what it hides; of those with the same promise."""
    found = sst2["rows"] | part("privatizers-sst2")["rows"]
    points = {}
    for name, shown in DRAWN.items():
        rows = seeds_of(found, name)
        hidden = statistics.mean(r["changed in test"] or 0.0 for r in rows)
        points[shown] = (statistics.mean(r["UA"] for r in rows), hidden)
    promised = {name: at for name, at in points.items() if "promise" not in name}
    plot = plots.frontier(
        points, efficient(promised), xlabel="utility: accuracy (UA)", ylabel="tokens changed"
    )
    return standalone(plot)


NEWS_ROWS = {
    "no-noise": "no noise",
    "token-80": "d_chi, token mode, eta 80",
    "CTI-80": "the same EP in training, with contributing tokens",
}


def news_table(news):
    """Three classes, and what of the loss contributing tokens save."""
    lines = [
        "| Financial PhraseBank, MiniLM, two-part | EP | UA | points lost | seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    clean = {s: news["rows"].get(f"no-noise-{s}") for s in SEEDS}
    for name, shown in NEWS_ROWS.items():
        found = {s: r for s in SEEDS if (r := news["rows"].get(f"{name}-{s}")) and r["UA"]}
        wrong = [r["changed in test"] for r in found.values() if r["changed in test"] is not None]
        lost = [100 * (clean[s]["UA"] - r["UA"]) for s, r in found.items()]
        cells = [shown, spread(wrong, 2), spread([r["UA"] for r in found.values()], 3)]
        cells += ["" if name == "no-noise" else spread(lost, 1), str(len(found))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def decoder_table(found):
    """The film reviews on a decoder, labels at home."""
    lines = [
        "| SST-2, SmolLM2-135M, U-shape | tokens that change | UA | seeds |",
        "|---|---:|---:|---:|",
    ]
    for noise in (0, 0.1, 0.5):
        rows = seeds_of(found["rows"], f"changed-{noise}")
        changed = [r["changed in test"] for r in rows if r["changed in test"] is not None]
        name = f"d_chi, token mode, for {noise:.0%}" if noise else "no noise"
        cells = [name, spread(changed, 2), spread([r["UA"] for r in rows], 3), str(len(rows))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def language_table(found):
    """What noise costs a language model, and that the split itself costs nothing."""
    lines = [
        "| WikiText-2, SmolLM2-135M, U-shape | tokens that change | perplexity before | after |",
        "|---|---:|---:|---:|",
    ]
    names = {"centralised": "in one place", "changed-0": "split, no noise"}
    names |= {f"changed-{n}": f"d_chi, token mode, for {n:.0%}" for n in (0.1, 0.3, 0.6)}
    for name, shown in names.items():
        for row in seeds_of(found["rows"], name):
            changed = row.get("changed in test")
            cells = [shown, "" if changed is None else f"{changed:.2f}"]
            cells += [f"{math.exp(row[key]):.2f}" for key in ("nats before", "nats after")]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def label_table(found, data, classes):
    """What hiding labels costs: drawn once, or DP-SGD at the customer."""
    lines = [
        f"| {data}, MiniLM, U-shape: {classes} classes | epsilon of a label | UA | EP of labels, "
        "gradients | activations too | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    names = {"as-they-are": "as they are"}
    names |= {f"response-{e}": "drawn anew, once" for e in (4, 2, 1)}
    names |= {f"dp-{e}": "as they are, DP-SGD" for e in (8, 4, 2)}
    for name, shown in names.items():
        rows = seeds_of(found["rows"], name)
        if rows:
            epsilon = rows[0]["epsilon"]
            cells = [shown, "" if epsilon is None else f"{epsilon:g}"]
            cells += [spread([r["UA"] for r in rows], 3)]
            cells += [spread([_label_privacy(r, classes) for r in rows], 2)]
            cells += [spread([_least_privacy(r, classes) for r in rows], 2)]
            lines.append("| " + " | ".join([*cells, str(len(rows))]) + " |")
    return lines


def _label_privacy(row, classes):
    """EP of labels; where gradients had noise, under who undoes all but the noise of every pass.

    That attacker has each label as one 1 among zeros with the noise of all passes' mean, and takes
    the largest number: it is right with a chance of E[Phi(t + 1 / sigma)^(C - 1)], t normal.
    """
    plan = row.get("DP-SGD")
    if plan is None:
        return row["EP labels"]
    sigma = plan["noise_multiplier"] * plan["sensitivity"] / math.sqrt(plan["passes"])
    normal, step = NormalDist(), 1e-3
    right = 0.0
    for t in (i * step for i in range(-8000, 8001)):
        right += step * normal.pdf(t) * normal.cdf(t + 1 / sigma) ** (classes - 1)
    return min(1 - right, row["EP labels"])


def _least_privacy(row, classes):
    """The same, or the EP of an attack that has the vendor's own outputs, whichever is less."""
    by_outputs = [row[name] for name in ("EP activations", "EP corrected") if name in row]
    return min([_label_privacy(row, classes), *by_outputs])


def word_table(found):
    """Predicting true words, and those that were sent."""
    lines = [
        "| targets | words that change | perplexity before | after | EP of words, from gradients "
        "| seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    names = {f"{targets}-{eta}": targets for eta in (60, 45, 35) for targets in ("true", "sent")}
    for name, targets in (names | {"dp-8": "true, DP-SGD, epsilon 8 of a window"}).items():
        rows = seeds_of(found["rows"], name)
        if rows:
            cells = [targets, spread([r["changed in training"] for r in rows], 2)]
            for key in ("nats before", "nats after"):
                cells.append(spread([math.exp(r[key]) for r in rows], 1))
            cells += [spread([r["EP words"] for r in rows], 2), str(len(rows))]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def leak_table(leaks):
    """EP of the nearest-neighbour attack by depth of the cut."""
    cuts = sorted({int(name.rpartition("-")[2]) for name in leaks["rows"]})
    lines = [
        "| EP of the nearest neighbour | " + " | ".join(f"cut {cut}" for cut in cuts) + " |",
        "|---" + "|---:" * len(cuts) + "|",
    ]
    for name, shown in {"no-noise": "no noise", "token-80": "token mode, eta 80"}.items():
        rows = [leaks["rows"].get(f"{name}-cut-{cut}") for cut in cuts]
        cells = ["" if row is None else f"{row['EP nearest neighbour']:.2f}" for row in rows]
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return lines


def depth_table(depth):
    """EP without noise by depth of the cut: a kind attack beside a trained one."""
    lines = [
        "| layers before the cut | EP, nearest neighbour | EP, trained inverter "
        "| texts read whole by it |",
        "|---|---:|---:|---:|",
    ]
    for name, row in depth["rows"].items():
        kind, trained = (row["attacks"][k] for k in ("nearest neighbour", "trained inverter"))
        span = f" ({trained['low']:.2f} to {trained['high']:.2f})"
        lines.append(
            f"| {name.rpartition('-')[2]} | {kind['EP']:.2f} | {trained['EP']:.2f}{span} "
            f"| {trained['whole texts read']:.0%} |"
        )
    return lines


def claim_table(claim):
    """Weak noise: what it costs, and what it gives against a kind attack and the strongest."""
    lines = [
        "| SST-2, MiniLM | UA | points lost | EP, nearest neighbour | EP, strongest | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    found = {}
    for row in claim["rows"].values():
        clean = next(s["ua"] for s in row["settings"] if s["eta"] is None)
        for s in row["settings"]:
            key = (s["cut"], s["cti_fraction"], -(s["eta"] or 1e9))
            found.setdefault(key, []).append(s | {"lost": 100 * (clean - s["ua"])})
    for (cut, cti, eta), settings in sorted(found.items()):
        where = "at the embedding" if not cut else f"behind {cut} of 6 layers"
        noise = "no noise" if eta == -1e9 else f"eta {-eta:g}" + (", CTI" if cti else "")
        cells = [
            f"{noise}, {where}",
            spread([s["ua"] for s in settings], 3),
            "" if eta == -1e9 else spread([s["lost"] for s in settings], 1),
            spread([s["ep_nearest"] for s in settings], 3),
            spread([s["ep"] for s in settings], 3),
            str(len(settings)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def search_table(search):
    """Exact nearest rows: tokens a second, beside the products that no search does without."""
    lines = [
        "| vocabulary | D | tokens/s, search | of the matmul's rate | tokens/s, token mode |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(search["rows"], key=lambda r: (r["vocabulary"], r["hidden"])):
        lines.append(
            f"| {row['vocabulary']:,} | {row['hidden']:,} "
            f"| {row['search_tokens_per_second']:,.0f} | {row['search_over_floor']:.2f} "
            f"| {row['token_mode_tokens_per_second']:,.0f} |"
        )
    return lines
