"""`blindtune inspect`: what a package holds and reveals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.output import Facts
from blindtune.cli.printing import print_columns, print_pairs, size
from blindtune.cli.trusting import keyring
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate

HELP = """Tell what a package holds and what it reveals.

Run by either party, on an emulator, an adapter or a bottom (of split tuning): before sending it,
and before trusting it. Every byte is checked against the package's manifest, and no weight of an
emulator or a bottom is used. It tells who signed the package, also if you do not trust them yet.

Finishes in one go: interrupted, it leaves nothing behind. It is never taken as done: whom you trust
may have changed.

\b
Needs:   PACKAGE, the directory of an emulator, an adapter or a bottom.
Writes:  nothing; with --out what it tells as JSON, as --json prints it, and
         FILE.options.yaml beside it.

\b
Example:
  blindtune inspect emulator/
"""
_LETTERS = {"adapter": "A", "raw": "R", "compressed": "c", "harmonizer": "h"}
_COLOURS = {"adapter": "bold green", "raw": "yellow", "compressed": "cyan", "harmonizer": "dim"}


def act(settings: Settings) -> Facts:
    """Call the act."""
    from dataclasses import asdict

    from blindtune.evaluation.inspection import inspect

    trust = keyring().trust(allow_unsigned=True, remember=False)
    inspected = inspect(settings["package"], trust=trust)
    facts = asdict(inspected)
    signature = facts.pop("signature")
    facts["signed_by"] = None if signature is None else str(inspected.signature)
    facts["trusted"] = signature is not None and signature["name"] is not None
    facts["package"] = str(facts.pop("path"))
    return facts if settings["out"] is None else {"path": settings["out"], **facts}


def show(facts: Facts, console: Console) -> None:
    """Print what fits the kind of package."""
    _SHOWN[facts["kind"]](facts, console)
    console.print("[bold]It reveals[/bold]")
    for line in facts["reveals"]:
        console.print(f"  - {line}", markup=False)
    if "path" in facts:
        pairs = [("told", facts["path"]), ("options", facts["options"])]
        print_pairs(console, "Written", pairs)


def estimate(settings: Settings) -> Estimate:
    """Estimate the act."""
    from blindtune.offsite.model_owner.package_estimates import estimate_inspect

    return estimate_inspect(settings["package"])


def _show_emulator(facts: Facts, console: Console) -> None:
    pairs = [
        ("package id", facts["id"]),
        ("signed by", _signer(facts)),
        ("model", f"{facts['model_type']}, fingerprint {facts['model'][:16]}..."),
        ("weights", facts["dtype"]),
        ("tokenizer", facts["tokenizer"]),
        ("max length", f"{facts['max_length']:,} tokens" if facts["max_length"] else "not stated"),
        ("parameters", _of(facts, "parameters", "{:,}".format)),
        ("bytes", _of(facts, "bytes", size)),
        ("made by", facts["created_by"]),
    ]
    print_pairs(console, f"Emulator {facts['package']}", pairs)
    strip = "".join(
        f"[{_COLOURS[layer['kind']]}]{_LETTERS[layer['kind']]}[/]" for layer in facts["layers"]
    )
    legend = ", ".join(f"{letter} {kind}" for kind, letter in _LETTERS.items())
    console.print(f"[bold]Layers[/bold] {strip}   ({legend})")
    rows = [
        (
            str(layer["index"]),
            layer["kind"],
            _ranks(layer),
            f"{layer['parameters']:,}",
            size(layer["bytes"]),
        )
        for layer in facts["layers"]
    ]
    print_columns(console, ("layer", "kind", "rank", "parameters", "bytes"), rows)


def _show_adapter(facts: Facts, console: Console) -> None:
    kind = "all weights of the adapter layers"
    if facts["training"] == "lora":
        targets = ", ".join(facts["lora_targets"])
        kind = f"LoRA, rank {facts['lora_rank']}, alpha {facts['lora_alpha']:g}, in {targets}"
    pairs = [
        ("package id", facts["id"]),
        ("signed by", _signer(facts)),
        ("tuned on", facts["emulator"]),
        ("model", f"{facts['model_type']}, fingerprint {facts['model'][:16]}..."),
        ("kind", kind),
        ("differential privacy", _privacy(facts["privacy"])),
        ("weights", facts["dtype"]),
        ("parameters", f"{facts['parameters']:,}"),
        ("bytes", size(facts["bytes"])),
        ("made by", facts["created_by"]),
    ]
    print_pairs(console, f"Adapter {facts['package']}", pairs)
    rows = [
        (str(layer["index"]), f"{layer['parameters']:,}", f"{layer['norm']:.4g}")
        for layer in facts["layers"]
    ]
    norm = "norm of the update" if facts["training"] == "lora" else "norm"
    print_columns(console, ("layer", "parameters", norm), rows)


def _show_bottom(facts: Facts, console: Console) -> None:
    above = f", and {facts['last']} above it" if facts["last"] else ""
    pairs = [
        ("package id", facts["id"]),
        ("signed by", _signer(facts)),
        ("model", f"{facts['model_type']}, fingerprint {facts['model'][:16]}..."),
        ("split", facts["partition"]),
        ("layers here", f"{facts['cut']} below the vendor's{above}, of {facts['layers']}"),
        ("weights", facts["dtype"]),
        ("tokenizer", facts["tokenizer"]),
        ("before a text", ", ".join(facts["before"]) or "nothing"),
        ("after a text", ", ".join(facts["after"]) or "nothing"),
        ("special tokens", ", ".join(facts["special_tokens"]) or "none"),
        ("max length", f"{facts['max_length']:,} tokens" if facts["max_length"] else "not stated"),
        ("parameters", f"{facts['parameters']:,}"),
        ("bytes", size(facts["bytes"])),
        ("made by", facts["created_by"]),
    ]
    print_pairs(console, f"Bottom {facts['package']}", pairs)


_SHOWN = {"emulator": _show_emulator, "adapter": _show_adapter, "bottom": _show_bottom}


def _privacy(stated: Facts | None) -> str:
    if stated is None:
        return "none"
    return (
        f"epsilon {stated['epsilon']:.2f}, delta {stated['delta']:.1e} a {stated['unit']}, as its "
        "maker states; nobody else can check it"
    )


def _signer(facts: Facts) -> str:
    if facts["signed_by"] is None:
        return "nobody"
    return str(facts["signed_by"]) + ("" if facts["trusted"] else ", whom you do not trust yet")


def _of(facts: Facts, name: str, show_number: object) -> str:
    assert callable(show_number)
    own, full = facts[name], facts[f"full_{name}"]
    return f"{show_number(own)}, {own / full:.1%} of the full model's {show_number(full)}"


def _ranks(layer: Facts) -> str:
    ranks = [f"{_short(path)} {'+'.join(map(str, r))}" for path, r in layer["ranks"].items()]
    dense = ", ".join(_short(path) for path in layer["dense"])
    shown = [", ".join(ranks), f"{dense}: dense product, rank not stated" if dense else ""]
    return "; ".join(filter(None, shown)) or "full"


def _short(path: str) -> str:
    return path.rpartition(".")[2]


VERB = Verb(
    name="inspect",
    help=HELP,
    parameters=(
        click.Argument(["package"], metavar="PACKAGE"),
        click.Option(["--out"], metavar="FILE", help="Also write what it tells, as JSON."),
    ),
    act=act,
    show=show,
    estimate=estimate,
    out_is_file=True,
    untold=("package",),  # whom the keyring trusts
)
