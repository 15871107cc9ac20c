"""`blindtune emulate`: the model owner's second act."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import duration, print_pairs, size
from blindtune.cli.trusting import WRITING, signer_of, signing_as
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate

HELP = """Make an emulator from a study, without training.

Run by the model owner, as often as needed. Three numbers decide: N_a adapter layers at each end
stay as they are, the share ALPHA of the middle layers becomes harmonizers, the other middle layers
keep the share BETA of the rank of their attention weights (with --reading removed they lose it).
Larger alpha and smaller beta protect the model better and serve the data owner less.

Finishes in one go: interrupted, it leaves nothing behind.

\b
Needs:   STUDY, from `blindtune study`, and the model, where it was then
         or where --model says.
Writes:  the emulator package, which goes to the data owner (look at it
         first: blindtune inspect); NAME.options.yaml beside it, which does
         not.

\b
Example:
  blindtune emulate study/ --adapter-layers 2 --alpha 0.25 --out emulator/
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from pathlib import Path

    from blindtune.offsite.model_owner.emulation import EmulatorConfig, emulate

    signer = signer_of(settings)
    made = emulate(
        settings["study"],
        settings["out"],
        settings.of(EmulatorConfig),
        model=settings["model"],
        overwrite=settings.overwrite,
        signer=signer,
    )
    return {
        "path": str(Path(settings["out"])),
        "id": made.id,
        "signed_by": signing_as(signer),
        "layers": made.kinds,
        "full_layers": made.full_layers,
        "parameters": made.parameters,
        "full_parameters": made.full_parameters,
        "bytes": made.bytes,
        "full_bytes": made.full_bytes,
        "seconds": made.seconds,
    }


def show(facts: Facts, console: Console) -> None:
    """Print what was made."""
    share = facts["parameters"] / facts["full_parameters"]
    layers = ", ".join(f"{count} {kind}" for kind, count in facts["layers"].items())
    pairs = [
        ("layers", f"{layers} (full model: {facts['full_layers']})"),
        ("parameters", f"{facts['parameters']:,} ({share:.1%} of the full model's)"),
        ("bytes", f"{size(facts['bytes'])} (full model: {size(facts['full_bytes'])})"),
        ("time", duration(facts["seconds"])),
        ("signed by", facts["signed_by"]),
        ("package id", facts["id"]),
        ("emulator", facts["path"]),
        ("options", facts["options"]),
    ]
    print_pairs(console, "Emulator written", pairs)


def estimate(settings: Settings) -> Estimate:
    """Estimate the act."""
    from blindtune.offsite.model_owner.emulation import EmulatorConfig
    from blindtune.offsite.model_owner.package_estimates import estimate_emulate

    return estimate_emulate(settings["study"], settings.of(EmulatorConfig), model=settings["model"])


VERB = Verb(
    name="emulate",
    help=HELP,
    parameters=(
        click.Argument(["study"], metavar="STUDY"),
        click.Option(
            ["--model"],
            metavar="MODEL",
            help="Where the studied model is now; default: where it was when it was studied.",
        ),
        click.Option(["--out"], required=True, metavar="DIR", help="Directory of the package."),
        *WRITING,
    ),
    groups=(
        Group(
            heading="Emulator",
            module="blindtune.offsite.model_owner.emulation",
            name="EmulatorConfig",
        ),
    ),
    act=act,
    show=show,
    estimate=estimate,
    mark="manifest.json",
)
