"""`blindtune unseal`: open what was sealed for you."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.output import Facts
from blindtune.cli.printing import print_pairs
from blindtune.cli.trusting import OPENING, ask_passphrase, keyring, signed_by, trust_of
from blindtune.cli.verb import Settings, Verb
from blindtune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

HELP = """Open a sealed file that was made for you, and write the package in it.

Run by the recipient. Everything is verified before the package appears: that the file was not
altered, that it holds a package and nothing else, and that somebody whom you trust signed it.

Finishes in one go: interrupted, it leaves nothing behind; there is no --resume.

\b
Needs:   FILE, sealed to your key.
Writes:  the package, as its maker wrote it.

\b
Example:
  blindtune unseal adapter.age adapter/
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from blindtune.exchange.packages.sealing import unseal

    key = keyring().private(ask_passphrase)
    if key is None:
        raise ConfigError(
            "expected a key of yours that it was sealed to, you have none: blindtune keys new"
        )
    identity, signature = unseal(
        settings["file"], settings["package"], key, trust=trust_of(settings),
        overwrite=settings.overwrite,
    )  # fmt: skip
    return {"path": settings["package"], "id": identity, "signed_by": signed_by(signature)}


def show(facts: Facts, console: Console) -> None:
    """Print what came out."""
    pairs = [
        ("signed by", facts["signed_by"]),
        ("package id", facts["id"]),
        ("package", facts["path"]),
    ]
    print_pairs(console, "Unsealed", pairs)


VERB = Verb(
    name="unseal",
    help=HELP,
    parameters=(
        click.Argument(["file"], metavar="FILE"),
        click.Argument(["package"], metavar="PACKAGE"),
        click.Option(["--overwrite"], is_flag=True, help="Replace the package that is there."),
        *OPENING,
    ),
    act=act,
    show=show,
)
