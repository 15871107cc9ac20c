"""The table of privatizers side by side, from what `privatizers.py` and `split.py` wrote."""

import statistics

from figures import part, seeds_of, spread

ROWS = {
    "d_chi": "d_chi, token mode",
    "vector": "d_chi, vector mode",
    "d_chi-CTI": "d_chi, token mode, with contributing tokens",
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
    "fine": "finer word groups (`--wrong-guesses 0.6`)",
}
ATTACKS = ("nearest neighbour", "Bayes", "Bayes, trigrams")
MODEL = "Bayes, language model"
READ = {
    "d_chi": "d_chi, token mode, eta 80",
    "exponential-equal": "exponential mechanism, eta {:.1f}",
    "groups": "word groups",
    "fine": "finer word groups (`--wrong-guesses 0.6`)",
}
OF_SPLIT = {"d_chi": "token-80", "vector": "vector-80", "d_chi-CTI": "CTI-80"}
TASKS = {"sst2": ("SST-2", "leaks"), "fpb": ("Financial PhraseBank", "leaks-fpb")}


def strongest_ep(leaks, of="EP"):
    """What the attack leaves that leaves the least, of all tokens or of "rare" ones; all seeds."""
    attacks = [attack for attack in (*ATTACKS, MODEL) if all(attack in leak for leak in leaks)]
    found = ([leak[attack][of] for leak in leaks] for attack in attacks)
    return min(found, key=statistics.mean) if leaks else []


def tuned(name, own, plain):
    """The rows of a privatizer's jobs, of every seed; d_chi's are those of `split.py`."""
    return seeds_of(*((plain, OF_SPLIT[name]) if name in OF_SPLIT else (own, name)))


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
        read = seeds_of(leaks, name.removesuffix("-denoised"))
        if not rows and not seeds_of(leaks, name):
            continue
        cost, speeds = costs.get(name), [leak["tokens a second"] for leak in read]
        etas = [r.get("strength") or r["setting"]["mechanism"]["eta"] for r in rows]
        etas = etas or [leak["strength"] for leak in read]
        promised = name.startswith(("d_chi", "vector", "exponential"))
        cells = [
            shown,
            f"{sum(etas) / len(etas):.3g}" if promised else "",
            spread([r["changed in test"] for r in rows if r["changed in test"] is not None], 2),
            spread(strongest_ep(read), 2),
            spread(strongest_ep(read, "rare"), 2),
            spread([r["UA"] for r in rows], 3),
            f"{max(speeds):,.0f}" if speeds else "",
            f"{cost['flops'] / cost['tokens'] / 1e6:.0f}" if cost else "",
            str(len(rows) or len(read)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def language_table(found, task):
    """The same texts read by a language model too; UA of the whole test set."""
    lines = [
        f"| {TASKS[task][0]}, MiniLM, cut 0, 40 texts | EP, nearest neighbour | Bayes, trigrams "
        "| Bayes, language model | least, of rare words | UA | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    plain, others = part(f"split-{task}")["rows"], part(f"privatizers-{task}")["rows"]
    for name, shown in READ.items():
        read = seeds_of(found["rows"], name)
        if not read:
            continue
        rows = tuned(name, others, plain)
        cells = [shown.format(statistics.mean(leak["strength"] for leak in read))]
        for attack in ("nearest neighbour", "Bayes, trigrams", MODEL):
            cells += [spread([leak[attack]["EP"] for leak in read], 2)]
        cells += [spread(strongest_ep(read, "rare"), 2)]
        cells += [spread([r["UA"] for r in rows], 3), str(len(read))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
