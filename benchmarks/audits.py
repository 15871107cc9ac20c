"""What audits of split tuning find on request: a language model, an attribute, dummy embeddings.

    python benchmarks/audits.py --data DIR --work DIR [--smoke] [attribute|dummies|prior ...]

Every row is one call of `audit_split` on a bottom package, as `blindtune audit` makes it. Part
`attribute`: who of 11 presidents gave a speech (State of the Union), MiniLM; of each president
every other speech is private (34 speeches, 3,061 paragraphs), the rest public (28 and 2,733). Part
`dummies`: sentences of SST-2 behind layers of MiniLM. Part `prior`: sentences of SST-2 at the
embedding of SmolLM2-135M, SmolLM2-135M itself as the prior. Rows are kept as `rows.py` says.
"""

import json

from blindtune.evaluation.audits.audit import AdversaryConfig, AuditConfig
from blindtune.evaluation.audits.split import audit_split
from blindtune.models.encoders import load_any
from blindtune.split.bottom import write_bottom
from blindtune.split.customer.private_texts import ReadingConfig
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.partition import Cut, stack_of
from rows import parse_options, run_parts

MODELS = {"attribute": "minilm", "dummies": "minilm", "prior": "smollm2-135m"}
FINER = "finer groups"
ROWS = {
    "attribute": [(0, None), (4, None), (0, 80.0), (0, 50.0)],
    "dummies": [(4, None), (5, None), (4, 80.0)],
    "prior": [(0, FINER), (0, 45.0), (0, 35.0), (0, "exponential")],
}
"""Of each part: (cut, noise). Noise: None; the eta of token mode; the exponential mechanism, at
which `CHANGED` of the tokens come out as others; or word groups of which 0.6 of the guesses by
frequency are wrong, counted in the public text."""
CHANGED = 0.4
TEST = {"attribute": 4000, "dummies": 800, "prior": 800}
PUBLIC = {"attribute": 30_000, "dummies": 15_000, "prior": 15_000}
SECONDS = {"attribute": 60.0, "dummies": 120.0, "prior": 120.0}
LENGTH = 48
KEPT = (
    "nearest neighbour", "trained inverter", "dummy embeddings", "Bayes", "Bayes, trigrams",
    "Bayes, language model", "trained inverter, trigrams", "trained inverter, language model",
    "word of the group", "word of the group, trigrams", "word of the group, language model",
    "attribute inference", "commonest value, no attack",
)  # fmt: skip


def files(options, part, folder):
    """Private and public rows; no text is in both, word for word."""
    if part == "attribute":
        mine, theirs = speeches(rows_in(options.data / "state_union.jsonl", longer=10))
    else:
        mine = rows_in(options.data / "sst2_dev.jsonl")
        theirs = rows_in(options.data / "sst2_train.jsonl", longer=8)
    both = {words_of(row) for row in mine} & {words_of(row) for row in theirs}
    for name, some in (("private", mine), ("public", theirs)):
        lines = [json.dumps(row) + "\n" for row in some if words_of(row) not in both]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder / "private.jsonl", folder / "public.jsonl"


def speeches(rows):
    """Private and public paragraphs: of each speaker every other speech, by years.

    Whole speeches, as a paragraph's neighbours would tell of which speech it is, and so who gave
    it. Speakers with one speech are left out.
    """
    years = {}
    for row in rows:
        years.setdefault(row["speaker"], set()).add(row["year"])
    sides = [[], []]
    for row in rows:
        if len(years[row["speaker"]]) > 1:
            place = sorted(years[row["speaker"]]).index(row["year"])
            sides[place % 2].append(row)
    return sides


def rows_in(path, longer=0):
    """Rows of more words than `longer`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if len(row["text"].split()) > longer]


def words_of(row):
    """What makes two texts the same."""
    return tuple(row["text"].lower().split())


def privatizer(noise, public):
    """How a row's texts are noised."""
    if noise == FINER:
        return PrivatizerConfig(public_text=str(public), wrong_guesses=0.6)
    if noise is None:
        return PrivatizerConfig(privatizer="none", unprotected=True)
    if noise == "exponential":
        return PrivatizerConfig(privatizer=noise, changed_share=CHANGED)
    return PrivatizerConfig(privatizer="token", eta=noise)


def shown(noise):
    """A row's noise in its name."""
    return f"eta {noise:g}" if isinstance(noise, float) else noise or "no noise"


def row(options, part, cut, noise, folder):
    """One audit."""
    few = 10 if options.smoke else 1
    model, tokenizer = load_any(MODELS[part])
    layers = stack_of(model).layer_count
    write_bottom(model, tokenizer, folder / "bottom", Cut(layers=layers, cut=cut))
    private, public = files(options, part, folder)
    adversary = {
        "attribute": AdversaryConfig(attribute_column="speaker"),
        "dummies": AdversaryConfig(dummies=True),
        "prior": AdversaryConfig(prior=MODELS["prior"]),
    }
    audit = audit_split(
        folder / "bottom", data=private, public=public,
        privatizer=privatizer(noise, public),
        reading=ReadingConfig(max_length=LENGTH),
        config=AuditConfig(test_tokens=TEST[part] // few, public_tokens=PUBLIC[part] // few,
                           attack_seconds=SECONDS[part] / few, fresh_draws=1),
        adversary=adversary[part],
    )  # fmt: skip
    found = {
        f.attack: {"EP": f.value, "low": f.low, "high": f.high, "meaning": f.meaning}
        for f in audit.findings
        if f.measure in ("EP", "EP of attribute") and f.attack in KEPT
    }
    return {"attacks": found, "settled": audit.settled, "texts": audit.facts["attacked"]}


def rows_of(options, part):
    """The rows of a part: (name, function)."""
    return [
        (
            f"cut-{cut}, {shown(noise)}",
            lambda folder, cut=cut, noise=noise: row(options, part, cut, noise, folder),
        )
        for cut, noise in ROWS[part]
    ]


def main():
    options = parse_options(__doc__, tuple(ROWS))
    facts = {"test_tokens": TEST, "public_tokens": PUBLIC, "attack_seconds": SECONDS}
    run_parts("audits", options, lambda part: rows_of(options, part), facts=facts)


if __name__ == "__main__":
    main()
