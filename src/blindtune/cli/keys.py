"""`blindtune keys`: a party's own key, and whose packages it opens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from blindtune.cli.output import Facts
from blindtune.cli.printing import print_columns, print_pairs
from blindtune.cli.trusting import PASSPHRASE_VARIABLE, ask_passphrase, keyring
from blindtune.cli.verb import Settings, Verb
from blindtune.errors import ConfigError, OutputError, PolicyError
from blindtune.places import located

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.exchange.packages.keys import PublicKey

HELP = """Keep your key, and the keys of those whose packages you open.

Run by either party. Packages are signed with the writer's key, which the first verb that writes one
makes; they are opened if you trust the signer's key. Trust is one explicit act for each partner:
the signer reads the fingerprint aloud (`blindtune keys show`), you compare and trust it.

Finishes in one go: interrupted, it leaves nothing behind; there is no --resume.

\b
Needs:   a directory for your keyring: $BLINDTUNE_HOME, or your platform's
         place for configuration (~/.config/blindtune).
Writes:  the keyring; private.key in it is readable by you alone.

\b
Example:
  blindtune keys show
  blindtune keys trust acme emulator/

Every verb: blindtune keys VERB --help.
"""
_ENDING = """
Finishes in one go: interrupted, it leaves nothing behind; there is no --resume.
"""


def _new(settings: Settings) -> Facts:
    own = keyring()
    if own.private_path.exists():
        raise ConfigError(
            f"{own.private_path}: you have a key, and others may trust it: move it away first if "
            "you mean to start anew"
        )
    public = own.new(_new_passphrase() if settings["passphrase"] else None)
    return {"keyring": str(own.directory), **_facts_of(public)}


def _new_passphrase() -> str:
    import os

    if os.environ.get(PASSPHRASE_VARIABLE) or not sys.stdin.isatty():
        given = ask_passphrase()
    else:
        given = click.prompt("New passphrase", hide_input=True, confirmation_prompt=True, err=True)
    if not given:
        raise ConfigError("expected a passphrase, got an empty one: give one, or --no-passphrase")
    return given


def _facts_of(key: PublicKey) -> Facts:
    return {
        "fingerprint": key.fingerprint,
        "signing_key": key.signing_key,
        "receiving_key": key.receiving_key,
    }


def _show(settings: Settings) -> Facts:
    from blindtune.atomic import atomic_file

    own = keyring()
    public = own.public()
    if public is None:
        raise ConfigError(f"{own.directory}: you have no key yet: blindtune keys new")
    if settings["save"] is not None:
        path = located(settings["save"])
        if path.exists() and not (path.is_file() and path.read_bytes() == public.encode()):
            raise OutputError(
                f"{path}: expected a new file, something else is there: choose another name"
            )
        with atomic_file(path) as partial:
            partial.write_bytes(public.encode())
    return {"saved": settings["save"], **_facts_of(public)}


def _trust(settings: Settings) -> Facts:
    from blindtune.exchange.packages.keyring import read_public_key

    name, key = settings["name"], read_public_key(Path(settings["file"]))
    spoken = settings["fingerprint"]
    if (own := keyring().public()) is not None and own.fingerprint == key.fingerprint:
        raise ConfigError(
            f"{settings['file']}: signed with your own key, which you trust already: nothing to do"
        )
    if spoken is not None:
        if "".join(c for c in spoken if c.isdigit()) != key.fingerprint.replace(" ", ""):
            raise PolicyError(
                f"{settings['file']}: has the fingerprint {key.fingerprint}, not the one that you "
                "gave: do not use it, somebody may have exchanged the key"
            )
    elif sys.stdin.isatty():
        click.echo(f"Fingerprint of the key in {settings['file']}:\n  {key.fingerprint}", err=True)
        if not click.confirm(f"Has {name} read the same one to you?", err=True):
            raise PolicyError(f"{name} is not trusted: compare the fingerprint first")
    else:
        raise ConfigError(
            f"{settings['file']}: has the fingerprint {key.fingerprint}: compare it with {name}, "
            "and give it with --fingerprint"
        )
    keyring().trust_signer(name, key)
    return {"name": name, **_facts_of(key)}


def _forget(settings: Settings) -> Facts:
    return {"name": settings["name"], **_facts_of(keyring().forget_signer(settings["name"]))}


def _list(settings: Settings) -> Facts:
    own = keyring()
    public = own.public()
    return {
        "keyring": str(own.directory),
        "own": None if public is None else public.fingerprint,
        "signers": {name: key.fingerprint for name, key in own.signers().items()},
    }


def _print_key(title: str) -> object:
    def show(facts: Facts, console: Console) -> None:
        pairs = [("fingerprint", facts["fingerprint"])]
        names = {"name": "name", "keyring": "keyring", "saved": "saved"}
        pairs += [(shown, str(facts[n])) for n, shown in names.items() if facts.get(n)]
        print_pairs(console, title, pairs)

    return show


def _print_list(facts: Facts, console: Console) -> None:
    pairs = [("you", facts["own"] or "no key yet"), ("keyring", facts["keyring"])]
    print_pairs(console, "Keyring", pairs)
    if facts["signers"]:
        print_columns(console, ("trusted signer", "fingerprint"), facts["signers"].items())
    else:
        console.print("  You trust nobody but yourself.")


_NAME = click.Argument(["name"], metavar="NAME")
_VERBS = {
    "new": Verb(
        name="keys new",
        help="Make your key. With a passphrase, it is asked for whenever you sign or unseal.\n"
        + _ENDING,
        parameters=(
            click.Option(
                ["--passphrase/--no-passphrase"],
                default=False,
                show_default=True,
                help=f"Seal it with a passphrase, asked for or from {PASSPHRASE_VARIABLE}.",
            ),
        ),
        act=_new,
        show=_print_key("Key made"),  # type: ignore[arg-type]
    ),
    "show": Verb(
        name="keys show",
        help="Show your key's fingerprint, to be read aloud; save the public key for others.\n"
        + _ENDING,
        parameters=(
            click.Option(["--save"], metavar="FILE", help="Write the public key to a file."),
        ),
        act=_show,
        show=_print_key("Your key"),  # type: ignore[arg-type]
    ),
    "trust": Verb(
        name="keys trust",
        help="Trust the key in FILE, a public key or a package that its owner signed, as NAME.\n\n"
        "Compare the fingerprint with the owner by voice first.\n" + _ENDING,
        parameters=(
            _NAME,
            click.Argument(["file"], metavar="FILE"),
            click.Option(
                ["--fingerprint"],
                metavar="DIGITS",
                help="As its owner read it to you; without it, you are asked.",
            ),
        ),
        act=_trust,
        show=_print_key("Trusted"),  # type: ignore[arg-type]
    ),
    "forget": Verb(
        name="keys forget",
        help="Trust NAME no more.\n" + _ENDING,
        parameters=(_NAME,),
        act=_forget,
        show=_print_key("Forgotten"),  # type: ignore[arg-type]
    ),
    "list": Verb(
        name="keys list",
        help="List your key and whom you trust.\n" + _ENDING,
        parameters=(),
        act=_list,
        show=_print_list,
    ),
}


class _Keys:
    """The group of verbs, made when it is used."""

    verbs = _VERBS
    writes = goes_on = False

    def command(self) -> click.Command:
        """The group as a click command."""
        group = click.Group(name="keys", help=HELP)
        for name, verb in _VERBS.items():
            group.add_command(verb.command(), name=name)
        return group


VERB = _Keys()
