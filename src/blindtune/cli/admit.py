"""`blindtune admit`: the vendor gives a customer a token, or ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.output import Facts
from blindtune.cli.printing import print_pairs
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

HELP = """Give a customer a token to come in with.

Run by the vendor, before or while `blindtune serve` runs: it knows the customer at once. The token
is shown once; the vendor keeps its hash alone. Admitting the same name again gives a new token and
ends the old one; jobs belong to the name and stay. Hand the token over as you would a password.
With --revoke the name's token ends, and what came in with it is told so
and cut off within a second; its jobs stay until they expire (`serve --max-idle-days`).

Finishes in one go; there is no --resume.

\b
Needs:   NAME, which appears in the vendor's log: letters, digits, _ . + -
Writes:  the name and the token's hash into DIR/customers.json; with
         --revoke it removes them there.

\b
Example:
  blindtune admit alice --out vendor/ --token-file alice.token
  blindtune admit alice --out vendor/ --revoke
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from blindtune.errors import ConfigError
    from blindtune.split.vendor.door import admit, revoke

    file = settings["token_file"]
    if settings["revoke"]:
        if file is not None:
            raise ConfigError("expected --revoke without --token-file: no token is given")
        revoke(settings["name"], settings["out"])
        return {"name": settings["name"], "path": settings["out"], "revoked": True}
    token = admit(settings["name"], settings["out"], token_file=file)
    shown = {"token": token} if file is None else {"token_file": file}
    return {"name": settings["name"], "path": settings["out"], **shown}


def show(facts: Facts, console: Console) -> None:
    """Print the token, or where it is."""
    pairs = [("customer", facts["name"])]
    if facts.get("revoked"):
        pairs.append(("token", "ended; admit the name again for a new one"))
        print_pairs(console, "Revoked", pairs)
        return
    if "token" in facts:
        pairs.append(("token", facts["token"]))
        pairs.append(("", "shown this once: the customer sets BLINDTUNE_TOKEN, or keeps a file"))
    else:
        pairs.append(("token", f"in {facts['token_file']}"))
    pairs.append(("give it", "by a safe way; with the address, its fingerprint, and bottom/"))
    print_pairs(console, "Admitted", pairs)


VERB = Verb(
    name="admit",
    help=HELP,
    parameters=(
        click.Argument(["name"], metavar="NAME"),
        click.Option(["--out"], required=True, metavar="DIR", help="The vendor's directory."),
        click.Option(
            ["--token-file"],
            metavar="FILE",
            help="New file for the token, readable by its owner alone; it is not printed then.",
        ),
        click.Option(["--revoke"], is_flag=True, help="End the name's token instead."),
    ),
    act=act,
    show=show,
    goes_on=True,
)
