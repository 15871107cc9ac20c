"""`blindtune cancel`: the customer's last act of split tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.output import Facts
from blindtune.cli.printing import print_pairs
from blindtune.cli.split_tune import ACCESS
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

HELP = """End a job at the vendor.

Run by the customer of split tuning. The vendor removes the job's adapter, head, optimizer and
checkpoints, and the job can neither go on nor be asked any more. What the vendor has copied before
stays copied. Your own directory stays; delete it when you no longer need it.

Finishes in one go; there is no --resume.

\b
Needs:   URL of the vendor, the job's directory, your token as for
         `blindtune split-tune`.
Writes:  nothing but a mark in the job's directory.

\b
Example:
  blindtune cancel https://vendor.example:7443 --job job/ \\
    --fingerprint 3f9c...
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from dataclasses import asdict

    from blindtune.split.customer.access import AccessConfig
    from blindtune.split.customer.cancellation import cancel

    ended = cancel(settings["url"], settings["job"], access=settings.of(AccessConfig))
    return asdict(ended) | {"kept": str(ended.kept)}


def show(facts: Facts, console: Console) -> None:
    """Print what was removed, and what was not."""
    removed = "nothing: the vendor never had this job"
    if facts["job"] is not None:
        removed = (
            f"adapter, head, optimizer and checkpoints of {facts['job']} "
            f"({facts['steps']:,} steps, {facts['tokens']:,} tokens)"
        )
    pairs = [
        ("removed", removed),
        ("stays here", f"{facts['kept']}, with your texts: delete it when no longer needed"),
    ]
    print_pairs(console, "Job cancelled", pairs)


VERB = Verb(
    name="cancel",
    help=HELP,
    parameters=(
        click.Argument(["url"], metavar="URL"),
        click.Option(["--job"], required=True, metavar="DIR", help="The job's directory."),
    ),
    groups=(ACCESS,),
    act=act,
    show=show,
    goes_on=True,
    interrupted="run the same command again",
)
