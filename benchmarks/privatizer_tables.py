"""The table of privatizers side by side, from what `privatizers.py` and `split.py` wrote."""

from figures import SEEDS, part, spread

ROWS = {
    "d_chi": "d_chi, token mode",
    "d_chi-CTI": "the same with contributing tokens",
    "d_chi-denoised": "d_chi, denoised",
    "exponential": "exponential mechanism",
    "exponential-equal": "the same, at d_chi's EP under these attacks",
    "exponential-CTI": "the same with contributing tokens",
    "exponential-denoised": "exponential, denoised",
    "context": "exponential, between contextual vectors",
    "meaning": "exponential, between these weighted by importance",
    "gaussian": "Gaussian of equal norm (control; no promise)",
    "shifted": "shifted and scaled noise, as PrivTune's (no promise)",
    "groups": "word groups (another promise)",
    "groups-equal": "word groups, at d_chi's EP under these attacks",
    "coarse": "coarse word groups",
}
ATTACKS = ("nearest neighbour", "Bayes", "Bayes, trigrams")
MODEL = "Bayes, language model"
READ = {
    "d_chi": "d_chi, token mode, eta 80",
    "exponential-equal": "exponential mechanism, eta {:.1f}",
    "groups": "word groups",
    "groups-equal": "word groups, {:.0%} of guesses wrong, rare words in twos",
    "coarse": "coarse word groups",
}
OF_SPLIT = {"d_chi": "token-80", "d_chi-CTI": "CTI-80"}
TASKS = {"sst2": ("SST-2", "leaks"), "fpb": ("Financial PhraseBank", "leaks-fpb")}


def strongest_ep(leak, of="EP"):
    """The least that an attack here leaves, of all tokens or of "rare" ones."""
    return min(leak[attack][of] for attack in ATTACKS)


def tuned(name, own, plain):
    """The rows of a privatizer's jobs, of every seed; d_chi's are those of `split.py`."""
    of, called = (plain, OF_SPLIT[name]) if name in OF_SPLIT else (own, name)
    return [of[f"{called}-{s}"] for s in SEEDS if f"{called}-{s}" in of]


def privatizer_table(found, task):
    """Privatizers at equal EP of the nearest neighbour; d_chi's accuracy is `split.py`'s.

    An eta is shown where it is a promise about distances between the model's word embeddings.
    """
    title, leaks = TASKS[task]
    leaks, plain = part(f"privatizers-{leaks}")["rows"], part(f"split-{task}")["rows"]
    costs = part("privatizers-cost")["rows"]
    lines = [
        f"| {title}, MiniLM, cut 0 | eta | tokens changed | EP, best of 3 attacks | of rare words "
        "| UA | tokens/s | MFLOPs a token | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, shown in ROWS.items():
        rows = [row for row in tuned(name, found["rows"], plain) if row["UA"] is not None]
        leak = leaks.get(name.removesuffix("-denoised"))
        if not rows and name not in leaks:
            continue
        cost = costs.get(name)
        etas = [r.get("strength") or r["setting"]["mechanism"]["eta"] for r in rows]
        etas = etas or [leak["strength"]]
        promised = name.startswith(("d_chi", "exponential"))
        cells = [
            shown,
            f"{sum(etas) / len(etas):.3g}" if promised else "",
            spread([r["changed in test"] for r in rows], 2),
            f"{strongest_ep(leak):.2f}" if leak else "",
            f"{strongest_ep(leak, 'rare'):.2f}" if leak else "",
            spread([r["UA"] for r in rows], 3),
            f"{leak['tokens a second']:,.0f}" if leak and "tokens a second" in leak else "",
            f"{cost['flops'] / cost['tokens'] / 1e6:.0f}" if cost else "",
            str(len(rows)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def language_table(found, task):
    """The same texts read by a language model too; UA of the whole test set."""
    lines = [
        f"| {TASKS[task][0]}, MiniLM, cut 0, 40 texts | EP, nearest neighbour | Bayes, trigrams "
        "| Bayes, language model | least, of rare words | UA |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    plain, others = part(f"split-{task}")["rows"], part(f"privatizers-{task}")["rows"]
    for name, shown in READ.items():
        leak = found["rows"].get(name)
        if leak is None:
            continue
        rows = tuned(name, others, plain)
        attacks = ("nearest neighbour", "Bayes, trigrams", MODEL)
        cells = [
            shown.format(leak["strength"]),
            *(f"{leak[attack]['EP']:.2f}" for attack in attacks),
        ]
        cells += [f"{min(leak[a]['rare'] for a in (*ATTACKS, MODEL)):.2f}"]
        cells += [spread([r["UA"] for r in rows], 3)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
