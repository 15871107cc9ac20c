"""What verbs share about keys: options, the party's own key, and how a signer is named."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from blindtune.cli.verb import Settings, process_rank
from blindtune.errors import ConfigError

if TYPE_CHECKING:
    from blindtune.exchange.packages.keyring import Keyring
    from blindtune.exchange.packages.signing import Signature, Signer, Trust

PASSPHRASE_VARIABLE = "BLINDTUNE_PASSPHRASE"  # noqa: S105  # its name, not its value
OPENING = (
    click.Option(
        ["--allow-unsigned"],
        is_flag=True,
        help="Open a package that nobody signed, or somebody whom you do not trust.",
    ),
    click.Option(
        ["--allow-older"],
        is_flag=True,
        help="Open a package although you have seen a newer one of the same signer.",
    ),
)
"""Options of verbs that open the other party's package."""
WRITING = (click.Option(["--unsigned"], is_flag=True, help="Do not sign the package."),)
"""Options of verbs that write a package for the other party."""


def keyring() -> Keyring:
    """The keyring of whoever runs the command."""
    from blindtune.exchange.packages.keyring import Keyring, default_home

    return Keyring(default_home())


def ask_passphrase() -> str:
    """The passphrase of the private key, from the environment or the terminal.

    Raises:
        ConfigError: there is neither.
    """
    if PASSPHRASE_VARIABLE in os.environ:
        return os.environ[PASSPHRASE_VARIABLE]
    if not sys.stdin.isatty():
        raise ConfigError(
            f"expected the passphrase of your private key in {PASSPHRASE_VARIABLE}, or a terminal "
            "to ask for it"
        )
    given: str = click.prompt("Passphrase of your private key", hide_input=True, err=True)
    return given


def trust_of(settings: Settings, *, remember: bool = True) -> Trust:
    """Whom the options and the keyring trust; a dry run does not remember what it has seen."""
    return keyring().trust(
        allow_unsigned=settings["allow_unsigned"],
        allow_older=settings["allow_older"],
        remember=remember,
    )


def signer_of(settings: Settings) -> Signer | None:
    """What signs the verb's package; a party that has no key gets one now, and is told so.

    Of several launched processes, the first writes, and signs.
    """
    if settings["unsigned"] or process_rank() != 0:
        return None
    own = keyring()
    signer = own.signer(ask_passphrase)
    if signer is None:
        public = own.new()
        click.echo(
            f"A key was made for you in {own.directory}; packages are signed with it. Others trust "
            f"it after comparing its fingerprint: {public.fingerprint}",
            err=True,
        )
        signer = own.signer(ask_passphrase)
    return signer


def signed_by(signature: Signature | None) -> str:
    """Who signed a package that was opened, in words."""
    if signature is None:
        return "NOBODY: unsigned, taken as it is (--allow-unsigned)"
    if signature.name is None:
        return f"{signature}: NOT TRUSTED, taken as it is (--allow-unsigned)"
    return str(signature)


def signing_as(signer: Signer | None) -> str:
    """With which key a package was signed, in words."""
    return "nobody (--unsigned)" if signer is None else f"you ({signer.key.public.fingerprint})"
