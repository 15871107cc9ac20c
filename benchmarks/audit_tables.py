"""The tables of what audits find on request, from what `audits.py` wrote."""

ATTACKS = {
    "attribute": ("attribute inference", "commonest value, no attack"),
    "dummies": ("nearest neighbour", "trained inverter", "dummy embeddings"),
    "prior": ("nearest neighbour", "Bayes", "Bayes, trigrams", "Bayes, language model"),
}


def audit_table(report, part):
    """EP of each attack with its interval, a line a row; nothing where none is done."""
    if not report["rows"]:
        return []
    attacks = ATTACKS[part]
    what = "EP of attribute" if part == "attribute" else "EP"
    lines = [
        f"| cut, noise | {' | '.join(f'{what}, {name}' for name in attacks)} |",
        f"|---|{'---|' * len(attacks)}",
    ]
    for name, row in report["rows"].items():
        cells = (_cell(_found(row["attacks"], attack)) for attack in attacks)
        lines.append(f"| {name.replace('cut-', '')} | {' | '.join(cells)} |")
    return lines


def _found(attacks, name):
    """Of word groups, where no noise has a likelihood, the word of the group stands for Bayes."""
    return attacks.get(name) or attacks[name.replace("Bayes", "word of the group")]


def _cell(found):
    return f"{found['EP']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
