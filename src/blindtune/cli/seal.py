"""`blindtune seal`: a package that only its recipient can open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from blindtune.cli.output import Facts
from blindtune.cli.printing import print_pairs, size
from blindtune.cli.trusting import keyring
from blindtune.cli.verb import Settings, Verb
from blindtune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

HELP = """Seal a package into one file that only its recipient can open.

Run by either party: the model owner seals an emulator to the data owner, who seals the adapter to
the model owner. The file is an age file around a tar archive. Sealing hides a package, its
signature says who made it.

Finishes in one go: interrupted, it leaves nothing behind; there is no --resume.

\b
Needs:   PACKAGE, and the recipient among the keys that you trust.
Writes:  FILE.

\b
Example:
  blindtune seal adapter/ adapter.age --to acme
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from blindtune.exchange.packages.sealing import seal

    known = keyring().signers()
    unknown = [name for name in settings["to"] if name not in known]
    if unknown:
        raise ConfigError(
            f"expected a name that you trust ({', '.join(known) or 'nobody yet'}), got "
            f"`{unknown[0][:80]}`: blindtune keys trust NAME FILE"
        )
    recipients = {name: known[name] for name in settings["to"]}
    identity = seal(
        settings["package"], settings["file"], list(recipients.values()),
        overwrite=settings.overwrite,
    )  # fmt: skip
    return {
        "path": settings["file"],
        "id": identity,
        "recipients": {name: key.fingerprint for name, key in recipients.items()},
        "bytes": Path(settings["file"]).stat().st_size,
    }


def show(facts: Facts, console: Console) -> None:
    """Print what was sealed for whom."""
    pairs = [("for", f"{name} ({mark})") for name, mark in facts["recipients"].items()]
    pairs += [
        ("package id", facts["id"]),
        ("bytes", size(facts["bytes"])),
        ("file", facts["path"]),
    ]
    print_pairs(console, "Sealed", pairs)


VERB = Verb(
    name="seal",
    help=HELP,
    parameters=(
        click.Argument(["package"], metavar="PACKAGE"),
        click.Argument(["file"], metavar="FILE"),
        click.Option(
            ["--to"], required=True, multiple=True, metavar="NAME", help="Who can open it."
        ),
        click.Option(["--overwrite"], is_flag=True, help="Replace the file that is there."),
    ),
    act=act,
    show=show,
)
