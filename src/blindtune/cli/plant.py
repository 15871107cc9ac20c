"""`blindtune plant`: made-up secrets in a copy of the data, for an audit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import print_pairs
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

HELP = """Plant made-up secrets in a copy of private data, to see which come out.

Run by the data owner. Each canary is a sentence about a person who does not exist, with a random
code. Some are planted several times, some once, some never. Tune on the copy, with the settings of
the real tuning, and audit: the audit ranks each code among others drawn alike. First of 256 is 8
bits of exposure; what was never planted has 1.4 on average.

The adapter that was tuned on the copy is for the audit. Tune the one that leaves on the data
itself. Under differential privacy, a canary planted 16 times is 16 records.

Finishes in one go: interrupted, it leaves nothing behind.

\b
Needs:   DATA, as tune reads it: .txt, .jsonl, .csv, .parquet, a hub data set.
Writes:  planted.jsonl (planted.txt of plain text) and canaries.json.

\b
Example:
  blindtune plant private.jsonl --out planted/
  blindtune tune emulator/ --data planted/planted.jsonl --out trial/
  blindtune audit trial/ --model emulator/ --data planted/planted.jsonl \\
      --canaries planted/canaries.json --out audit/
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from blindtune.training.canaries import CanaryConfig, plant

    done = plant(
        settings["data"],
        settings["out"],
        settings.of(CanaryConfig),
        overwrite=settings.overwrite,
    )
    return {
        "path": settings["out"],
        "data": str(done.data),
        "canaries": str(done.canaries),
        "records": done.records,
        "planted": done.planted,
    }


def show(facts: Facts, console: Console) -> None:
    """Print how much was planted, and where."""
    share = facts["planted"] / facts["records"]
    pairs = [
        ("records", f"{facts['records']:,}, {facts['planted']:,} of them canaries ({share:.0%})"),
        ("data", facts["data"]),
        ("canaries", facts["canaries"]),
        ("options", facts["options"]),
    ]
    print_pairs(console, "Planted", pairs)


VERB = Verb(
    name="plant",
    help=HELP,
    parameters=(
        click.Argument(["data"], metavar="DATA"),
        click.Option(["--out"], required=True, metavar="DIR", help="Directory of the copy."),
    ),
    groups=(Group(heading="Canaries", module="blindtune.training.canaries", name="CanaryConfig"),),
    act=act,
    show=show,
    mark="canaries.json",
    less_memory="plant in a part of the data",
)
