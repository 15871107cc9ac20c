"""`blindtune bottom`: the vendor's first act of split tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import print_pairs, size
from blindtune.cli.trusting import WRITING, signer_of, signing_as
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate

HELP = """Cut a model, and write the bottom that customers of split tuning get.

Run by the vendor. The bottom is the embedding, the first CUT blocks and the tokenizer; in the
U-shape also the last part and the head. Customers run private text through it, add noise, and send
what comes out. A deeper cut gives them more of the model, and makes simple attacks harder.
`blindtune serve` writes the same package when it is not there: this verb is for looking at it
first, or for handing it out from another machine.

Finishes in one go: interrupted, it leaves nothing behind.

\b
Needs:   MODEL, a local directory, a hub name, or an embedded model
         (smollm2-135m, minilm).
Writes:  the bottom package; NAME.options.yaml beside it.

\b
Example:
  blindtune bottom smollm2-135m --cut 6 --out bottom/
"""
CUT = click.Option(
    ["--cut"],
    type=click.IntRange(min=0),
    required=True,
    help="Blocks of the customers' bottom; 0: the embedding alone.",
)
GROUP = Group(heading="Customers get", module="blindtune.split.vendor.service", name="BottomConfig")


def partition_facts(facts: Facts) -> str:
    """Who holds what, in a line."""
    last = f", {facts['last']} at the end" if facts["partition"] == "u-shape" else ""
    return f"{facts['partition']}: {facts['cut']} of {facts['layers']} blocks at customers{last}"


def act(settings: Settings) -> Facts:
    """Call the act."""
    from blindtune.split.vendor.service import BottomConfig, bottom

    signer = signer_of(settings)
    made = bottom(
        settings["model"],
        settings["out"],
        settings["cut"],
        settings.of(BottomConfig),
        overwrite=settings.overwrite,
        signer=signer,
    )
    return {
        "path": str(made.path),
        "id": made.id,
        "signed_by": signing_as(signer),
        "partition": made.cut.partition,
        "cut": made.cut.cut,
        "last": made.cut.last,
        "layers": made.cut.layers,
        "bytes": made.bytes,
    }


def show(facts: Facts, console: Console) -> None:
    """Print what was made."""
    pairs = [
        ("split", partition_facts(facts)),
        ("bytes", size(facts["bytes"])),
        ("signed by", facts["signed_by"]),
        ("bottom id", facts["id"]),
        ("bottom", facts["path"]),
        ("options", facts["options"]),
    ]
    print_pairs(console, "Bottom written", pairs)


def estimate(settings: Settings) -> Estimate:
    """Estimate the act."""
    from blindtune.split.vendor.estimates import estimate_bottom
    from blindtune.split.vendor.service import BottomConfig

    return estimate_bottom(settings["model"], settings["cut"], settings.of(BottomConfig))


VERB = Verb(
    name="bottom",
    help=HELP,
    parameters=(
        click.Argument(["model"], metavar="MODEL"),
        CUT,
        click.Option(["--out"], required=True, metavar="DIR", help="Directory of the package."),
        *WRITING,
    ),
    groups=(GROUP,),
    act=act,
    show=show,
    estimate=estimate,
    mark="manifest.json",
)
