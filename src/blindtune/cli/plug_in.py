"""`blindtune plug-in`: the model owner's last act."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.output import Facts
from blindtune.cli.printing import print_columns, print_pairs
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate

HELP = """Put the returned adapter into the full model.

Run by the model owner. The adapter is another party's work, and is believed in nothing: it must
name this very model, and hold exactly the adapter layers' tensors, all finite. The result is an
ordinary Hugging Face directory, which opens without this project.

Finishes in one go: interrupted, it leaves nothing behind.

\b
Needs:   MODEL, as it was studied; ADAPTER, the package that came back.
Writes:  a model directory; NAME.options.yaml beside it.

\b
Example:
  blindtune plug-in smollm2-135m adapter/ --out tuned/
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from blindtune.offsite.plugin import plug_in

    plugged = plug_in(
        settings["model"],
        settings["adapter"],
        settings["out"],
        dtype=settings["dtype"],
        overwrite=settings.overwrite,
    )
    return {
        "path": str(plugged.path),
        "adapter": plugged.adapter_id,
        "kind": plugged.kind,
        "parameters": plugged.model.num_parameters(),
        "relative_change": plugged.relative_change,
    }


def show(facts: Facts, console: Console) -> None:
    """Print how far each adapter layer moved."""
    pairs = [
        ("adapter", f"{facts['adapter']} ({facts['kind']})"),
        ("parameters", f"{facts['parameters']:,}"),
        ("model", facts["path"]),
        ("options", facts["options"]),
    ]
    print_pairs(console, "Plugged in", pairs)
    rows = [(str(i), f"{change:.3%}") for i, change in facts["relative_change"].items()]
    print_columns(console, ("layer", "relative change"), rows)


def estimate(settings: Settings) -> Estimate:
    """Estimate the act."""
    from blindtune.offsite.package_estimates import estimate_plug_in

    return estimate_plug_in(settings["model"], settings["adapter"], dtype=settings["dtype"])


VERB = Verb(
    name="plug-in",
    help=HELP,
    parameters=(
        click.Argument(["model"], metavar="MODEL"),
        click.Argument(["adapter"], metavar="ADAPTER"),
        click.Option(["--out"], required=True, metavar="DIR", help="Directory of the model."),
        click.Option(
            ["--dtype"],
            type=click.Choice(["float32", "float16", "bfloat16"]),
            default="float32",
            show_default=True,
            help="Of the written weights.",
        ),
    ),
    act=act,
    show=show,
    estimate=estimate,
    mark="config.json",
)
