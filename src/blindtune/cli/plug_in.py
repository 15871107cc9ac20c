"""`blindtune plug-in`: the model owner's last act."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import print_columns, print_pairs
from blindtune.cli.trusting import OPENING, signed_by, trust_of
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate

HELP = """Put the returned adapter into the full model.

Run by the model owner. The adapter is another party's work, and is believed in nothing: somebody
whom you trust must have signed it; it must name this very model, hold exactly its adapter layers'
tensors, all finite, and change norms and spectra within bounds, and the loss on public text if some
is given. With --emulator it must also be of the layers that you shipped as adapter layers. The
result is an ordinary Hugging Face directory, which opens without this project.

Finishes in one go: interrupted, it leaves nothing behind.

\b
Needs:   MODEL, as it was studied; ADAPTER, the package that came back.
Writes:  a model directory; NAME.options.yaml beside it.

\b
Example:
  blindtune plug-in smollm2-135m adapter/ --emulator emulator/ --out tuned/
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from dataclasses import asdict

    from blindtune.offsite.model_owner.plugin import plug_in
    from blindtune.offsite.model_owner.vetting import ChangeBounds

    plugged = plug_in(
        settings["model"],
        settings["adapter"],
        settings["out"],
        dtype=settings["dtype"],
        overwrite=settings.overwrite,
        data=settings["data"],
        bounds=settings.of(ChangeBounds),
        accept_large_change=settings["accept_large_change"],
        emulator=settings["emulator"],
        trust=trust_of(settings),
    )
    return {
        "path": str(plugged.path),
        "adapter": plugged.adapter_id,
        "signed_by": signed_by(plugged.signature),
        "kind": plugged.kind,
        "adapter_layers": plugged.adapter_layers,
        "parameters": plugged.model.num_parameters(),
        "relative_change": plugged.relative_change,
        "changes": [asdict(change) for change in plugged.changes],
        "public_loss": plugged.public_loss,
    }


def show(facts: Facts, console: Console) -> None:
    """Print how far each adapter layer moved."""
    pairs = [
        ("adapter", f"{facts['adapter']} ({facts['kind']})"),
        ("signed by", facts["signed_by"]),
        ("adapter layers", f"{facts['adapter_layers']} at each end"),
        ("parameters", f"{facts['parameters']:,}"),
        ("model", facts["path"]),
        ("options", facts["options"]),
    ]
    if facts["public_loss"] is not None:
        before, after = facts["public_loss"]
        pairs.insert(2, ("loss on public text", f"{before:.4f} -> {after:.4f} nats/token"))
    print_pairs(console, "Plugged in", pairs)
    rows = [
        (
            str(change["layer"]),
            f"{change['relative']:.3%}",
            f"{change['spectral']:.3%}",
            change["weight"],
        )
        for change in facts["changes"]
    ]
    names = ("layer", "relative change", "largest spectral change", "of")
    print_columns(console, names, rows)


def estimate(settings: Settings) -> Estimate:
    """Estimate the act, and measure what the adapter would change, in memory."""
    from dataclasses import replace

    from blindtune.offsite.model_owner.package_estimates import estimate_plug_in
    from blindtune.offsite.model_owner.plugin import plug_in
    from blindtune.offsite.model_owner.vetting import ChangeBounds, refusal

    trust = trust_of(settings, remember=False)
    estimated = estimate_plug_in(
        settings["model"], settings["adapter"], dtype=settings["dtype"], data=settings["data"],
        trust=trust,
    )  # fmt: skip
    plugged = plug_in(
        settings["model"],
        settings["adapter"],
        None,
        dtype=settings["dtype"],
        data=settings["data"],
        accept_large_change=True,
        emulator=settings["emulator"],
        trust=trust,
    )
    bounds = settings.of(ChangeBounds)
    findings = {"signed by": signed_by(plugged.signature)}
    for change in plugged.changes:
        findings[f"layer {change.layer} would change"] = (
            f"{change.relative:.3%}; {change.weight} by {change.spectral:.3%} of its spectrum"
        )
    if plugged.public_loss is not None:
        before, after = plugged.public_loss
        findings["loss on public text"] = f"{before:.4f} -> {after:.4f} nats/token"
    reason = refusal(plugged.changes, plugged.public_loss, bounds, settings["adapter"])
    findings["verdict"] = reason or "within bounds"
    return replace(estimated, findings=findings)


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
        click.Option(
            ["--data"], metavar="FILE", help="Public text: its loss before and after is compared."
        ),
        click.Option(
            ["--emulator"],
            metavar="DIR",
            help="Take only an adapter of this emulator, the package that you shipped (or its id, "
            "and then the adapter is believed about its layers).",
        ),
        click.Option(
            ["--accept-large-change"],
            is_flag=True,
            help="Measure what the adapter changes, but refuse nothing.",
        ),
        *OPENING,
    ),
    groups=(
        Group(
            heading="How much the adapter may change",
            module="blindtune.offsite.model_owner.vetting",
            name="ChangeBounds",
        ),
    ),
    act=act,
    show=show,
    estimate=estimate,
)
