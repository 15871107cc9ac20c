"""SAP's claim, side by side: how much privacy for one point of accuracy, against which attack?

    python benchmarks/claim.py --data DIR --work DIR [--smoke] [sst2]

The paper: on SST, empirical privacy (EP) rises by 62 % of what it is without noise, for one point
of accuracy. Here `blindtune.split_frontier` sweeps weak noise, with and without contributing
tokens, at the embedding and behind four of MiniLM's six blocks, on the texts of `split.py sst2`;
the attacker has other film reviews. A row is one cut and one seed; within it every setting is kept
as it is done.
"""

import csv
from dataclasses import asdict

from blindtune.evaluation.audits.audit import AuditConfig
from blindtune.evaluation.frontiers.split import SplitFrontierConfig, Trial, split_frontier
from blindtune.split.customer.private_texts import ReadingConfig
from blindtune.split.customer.requests import PassConfig
from blindtune.split.terms import TuningConfig
from rows import parse_options, run_parts
from split import BATCH, EPOCHS, LENGTH, RATE, Bench, read, some_of

PARTS = ("sst2",)
ETAS = {0: (150.0, 120.0), 4: (150.0, 120.0, 110.0, 100.0)}
CTI = {0: (0.0, 0.01), 4: (0.0,)}
ROWS = ((0, 0), (4, 0), (0, 1), (0, 2), (4, 1), (4, 2))  # (cut, seed), most wanted first
PUBLIC, ATTACKED, ATTACK_SECONDS = 4000, 3000, 40.0


def claim_row(bench, cut, seed):
    """Every amount of noise at one cut."""
    place = bench.work / "claim" / f"{cut}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    learn, test = bench.reviews(seed)
    files = {"train": learn, "test": test}
    for name, texts in files.items():
        with (place / f"{name}.csv").open("w", newline="") as file:
            pairs = zip(texts[0], texts[1].tolist(), strict=True)
            csv.writer(file).writerows([("text", "label"), *pairs])
    known = set(learn[0]) | set(test[0])
    reviews = sorted({row["text"] for row in read(bench.data / "sst2_train.jsonl")} - known)
    public = [text for text in reviews if len(text.split()) >= 8]
    (place / "public.txt").write_text("\n".join(some_of(public, bench.amount(PUBLIC))))
    config = SplitFrontierConfig(
        privatizer="token", cut=(cut,), cti_fraction=CTI[cut],
        eta=ETAS[cut][-1:] if bench.smoke else ETAS[cut],
    )  # fmt: skip
    trial = Trial(
        tuning=TuningConfig(learning_rate=RATE, seed=seed),
        passes=PassConfig(epochs=EPOCHS, batch_size=BATCH, seed=seed),
        reading=ReadingConfig(max_length=LENGTH),
        trying=AuditConfig(
            test_tokens=bench.amount(ATTACKED), seed=seed,
            attack_seconds=2.0 if bench.smoke else ATTACK_SECONDS,
        ),
    )  # fmt: skip
    found = split_frontier(
        "minilm", place / "train.csv", place / "test.csv", place / "sweep", config,
        public=place / "public.txt", trial=trial, on_row=lambda *row: print("  ", *row, flush=True),
    )  # fmt: skip
    return {"settings": [asdict(setting) for setting in found.settings]}


def plan(bench):
    """The rows: (name, function)."""
    return [
        (f"cut-{cut}-{seed}", lambda _folder, cut=cut, seed=seed: claim_row(bench, cut, seed))
        for cut, seed in ROWS
    ]


def main():
    options = parse_options(__doc__, PARTS)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.data, options.work, options.smoke)
    run_parts("claim", options, lambda _: plan(bench), facts={"attack_seconds": ATTACK_SECONDS})


if __name__ == "__main__":
    main()
