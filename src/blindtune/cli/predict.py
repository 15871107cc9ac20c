"""`blindtune predict`: the customer's second act of split tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import duration, print_columns, print_pairs, size, stages
from blindtune.cli.split_tune import ACCESS
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

HELP = """Ask a tuned job about new texts.

Run by the customer of split tuning. The texts get noise as the training texts did, all tokens in
full, and the vendor's tuned layers answer. The noise is drawn once and kept: the same texts asked
about again send the same states. With labels in the file it says how many answers are right; a
language model's job gives the perplexity of text. Run again after an interruption: there is no
--resume.

\b
Needs:   URL of the vendor, the job from `blindtune split-tune`, texts in the
         same columns, your token as for that command.
Writes:  with --out the predictions, a JSON object a line; the states of the
         texts in the job's directory.

\b
Example:
  blindtune predict https://vendor.example:7443 --job job/ --data new.csv \\
    --fingerprint 3f9c... --out predictions.jsonl
"""
_SHOWN = 10


def act(settings: Settings) -> Facts:
    """Call the act."""
    from dataclasses import asdict
    from functools import partial

    from blindtune.split.customer.access import AccessConfig
    from blindtune.split.customer.prediction import AskingConfig, predict

    with stages() as show:
        found = predict(
            settings["url"],
            settings["job"],
            settings["data"],
            settings["out"],
            bottom=settings["bottom"],
            asking=settings.of(AskingConfig),
            access=settings.of(AccessConfig),
            on_statement=lambda statement: click.echo(f"{statement}\n", err=True),
            on_progress=partial(show, "predict"),
        )
    return asdict(found) | {"path": None if found.path is None else str(found.path)}


def show(facts: Facts, console: Console) -> None:
    """Print the first predictions and the scores."""
    texts = facts["texts"]
    rows = []
    for told in texts[:_SHOWN]:
        if "probabilities" in told:
            rows.append(
                (str(told["row"]), told["label"], f"{max(told['probabilities'].values()):.3f}")
            )
        elif "value" in told:
            rows.append((str(told["row"]), f"{told['value']:.4f}", ""))
        else:
            nats = f"{told['nats_per_token']:.4f}"
            rows.append((str(told["row"]), f"{told['tokens']} tokens", f"{nats} nats/token"))
    print_columns(console, ("row", "prediction", ""), rows)
    if len(texts) > _SHOWN:
        console.print(f"  and {len(texts) - _SHOWN:,} more", style="dim")
    pairs = [(name.replace("_", " "), f"{value:.4f}") for name, value in facts["scores"].items()]
    if facts["reused"]:
        pairs.append(("noise", "drawn before for these texts: nothing more was spent"))
    pairs += [
        ("sent", size(facts["bytes_sent"])),
        ("time", duration(facts["seconds"])),
        ("predictions", facts["path"] or "not written: give --out"),
    ]
    print_pairs(console, f"Predicted {len(texts):,} texts", pairs)


VERB = Verb(
    name="predict",
    help=HELP,
    parameters=(
        click.Argument(["url"], metavar="URL"),
        click.Option(["--job"], required=True, metavar="DIR", help="The tuned job."),
        click.Option(["--data"], required=True, metavar="FILE", help="New texts."),
        click.Option(["--out"], metavar="FILE", help="New file for the predictions (.jsonl)."),
        click.Option(
            ["--bottom"], metavar="DIR", help="Bottom package; default: where it was in tuning."
        ),
    ),
    groups=(
        Group(heading="Texts", module="blindtune.split.customer.prediction", name="AskingConfig"),
        ACCESS,
    ),
    act=act,
    show=show,
    goes_on=True,
    less_memory="lower --batch-size",
    interrupted="the noise that was drawn is kept: run the same command again",
)
