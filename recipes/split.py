"""Split tuning as two processes: a vendor's server, and a customer who tunes and asks over TLS.

The vendor's side is the command line alone (`blindtune serve`, `blindtune admit`); the customer's
is this program, by the functions that `blindtune split-tune` and `blindtune predict` call. It ends
with a table: utility accuracy (UA) and empirical privacy (EP: the share of words that the
nearest-neighbour attack gets wrong) without noise, with word groups, and at three strengths of
noise, with contributing tokens spared (CTI) and without, beside tuning the whole model in one
place.

    python recipes/split.py --out demo-split
    python recipes/split.py --train mine.csv --test held-out.csv --public like-them.txt
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

import blindtune
from blindtune.split.bottom import open_bottom
from blindtune.split.customer.job import CustomerJob
from nearest_attack import attacked
from side_by_side import as_table, common_options, labelled_texts
from whole_model import tune_whole_model

TUNING = blindtune.TuningConfig(learning_rate=1e-3)
PASSES = blindtune.PassConfig(epochs=2)
NO_NOISE = blindtune.PrivatizerConfig(privatizer="none", unprotected=True)


def main() -> None:
    """Serve, tune, ask; leave split.json and everything of both parties in the output directory."""
    options, begin, say = parse_options(), time.perf_counter(), Console().print
    out = options.out
    learn, test = labelled_texts(options)

    say("\n[bold]Nobody[/] could do this: the whole model tuned on the texts as they are.")
    rows = [{"run": "whole model, no split"}]
    rows[0]["UA"] = tune_whole_model(options.model, learn, test, TUNING, PASSES, options.max_length)

    say("[bold]Vendor[/], a process of its own, cuts the model and serves the top.")
    with serving(options) as facts:
        say(f"  {facts['addresses'][0]}, certificate {facts['fingerprint'][:16]}...", style="dim")
        for name, privatizer in runs(options):
            say(f"[bold]Customer[/] privatizes once and tunes: {name}.")
            rows.append({"run": name} | one_job(options, facts, name, privatizer))
    (out / "split.json").write_text(json.dumps(rows, indent=2))
    say(as_table(rows, facts["cut"], facts["layers"]))
    say(f"{time.perf_counter() - begin:,.0f} s in all.")


def runs(options) -> Iterator[tuple[str, blindtune.PrivatizerConfig]]:
    """Names and privatizers of all jobs: no noise, groups, each strength without and with CTI."""
    yield "no noise", NO_NOISE
    if options.public:
        yield "word groups", blindtune.PrivatizerConfig(public_text=str(options.public))
    for share in options.changed:
        for cti in (0.0, 0.01):
            name = f"{share:.0%} of tokens changed" + (", CTI" if cti else "")
            yield (
                name,
                blindtune.PrivatizerConfig(
                    privatizer="token", changed_share=share, cti_fraction=cti
                ),
            )


@contextmanager
def serving(options) -> Iterator[dict]:
    """The vendor's server for as long as the block runs; yields what it printed."""
    command = [sys.executable, "-m", "blindtune.cli.main"]
    vendor = ["--out", options.out / "vendor"]
    serve = ["serve", options.model, "--cut", str(options.cut), *vendor, "--self-signed"]
    serve += ["--port", "0", "--max-length", str(options.max_length), "--json"]
    with (options.out / "vendor.log").open("w") as log:
        process = subprocess.Popen([*command, *serve], stdout=subprocess.PIPE, stderr=log)
        try:
            line = process.stdout.readline()
            if not line:
                sys.exit(f"the vendor did not start: see {log.name}")
            facts = json.loads(line)
            token = options.out / "token"
            token.unlink(missing_ok=True)
            subprocess.run(
                [*command, "admit", f"customer-{time.time_ns()}", *vendor, "--token-file", token],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            yield facts
        finally:
            process.terminate()
            process.wait()


def one_job(options, facts, name, privatizer) -> dict:
    """One job from opening to predicting: UA, EP, bytes and seconds."""
    begin, where = time.perf_counter(), options.out / "jobs" / name.replace(" ", "-")
    url, bottom = facts["addresses"][0], facts["bottom"]
    access = blindtune.AccessConfig(
        token_file=str(options.out / "token"), fingerprint=facts["fingerprint"]
    )
    tuned = blindtune.split_tune(
        url, bottom, options.train, where, privatizer, TUNING, PASSES, access=access
    )
    asked = blindtune.predict(url, where, options.test, access=access)
    package, job = open_bottom(bottom), CustomerJob(where)
    mechanism = privatizer.mechanism(job.record.eta)
    return {
        "UA": asked.scores["accuracy"],
        "EP": attacked(package, job.states(), mechanism, options.attacked),
        "eta": job.record.eta,
        "bytes a token": tuned.bytes_sent / tuned.tokens,
        "seconds": time.perf_counter() - begin,
    }


def parse_options() -> argparse.Namespace:
    """Those of both recipes, and of this one."""
    parser = common_options(__doc__)
    parser.add_argument("--public", type=Path, help="public text like them, for word groups")
    parser.add_argument("--changed", type=float, nargs="*", default=[0.1, 0.5, 0.9],
                        help="shares of tokens that shall come out as others")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    main()
