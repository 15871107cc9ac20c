"""A party's keyring: its own key, the signers whom it trusts, and what it has signed and seen.

A directory that only its owner can read (mode 700): `private.key` (mode 600, sealed with a
passphrase if one was given), `public.key`, `signers/NAME.key`, `issued.json` and `seen.json`.
Nothing is trusted that was not put there by an explicit act, but for the party's own key.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import msgspec

from blindtune.atomic import output_error, secret_file
from blindtune.errors import ConfigError, OutputError, PackageError
from blindtune.exchange.packages.keys import (
    MAX_KEY_BYTES,
    PrivateKey,
    PublicKey,
    decode_private_key,
    decode_public_key,
    is_locked,
    new_private_key,
)
from blindtune.exchange.packages.signing import Signer, Trust

HOME_VARIABLE = "BLINDTUNE_HOME"
OWN_NAME = "you"
"""What a reader calls its own key, which it trusts."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_RECORD_BYTES = 64 << 20
_RecordT = TypeVar("_RecordT")


def default_home() -> Path:
    """$BLINDTUNE_HOME, or where this platform keeps a user's configuration."""
    if configured := os.environ.get(HOME_VARIABLE):
        return Path(configured).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "blindtune"
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA", Path.home() / "AppData" / "Roaming")) / "blindtune"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "blindtune"


@final
@dataclass(frozen=True)
class Keyring:
    """The keyring in one directory; the directory is made when something is first kept."""

    directory: Path

    @property
    def private_path(self) -> Path:
        """Where the party's own private key is, if it has one."""
        return self.directory / "private.key"

    def new(self, passphrase: str | None = None) -> PublicKey:
        """Make the party's own key.

        Raises:
            ConfigError: there is one; packages signed with it are known by it.
            OutputError: it cannot be kept.
        """
        with self._locked():
            if self.private_path.exists():
                raise ConfigError(
                    f"{self.private_path}: you have a key, and others may trust it: move it away "
                    "first if you mean to start anew"
                )
            key = new_private_key()
            self._write("public.key", key.public.encode())
            self._write("private.key", key.encode(passphrase))
        return key.public

    def public(self) -> PublicKey | None:
        """The party's own public key, if it has a key; needs no passphrase."""
        data = _read(self.directory / "public.key")
        return None if data is None or not self.private_path.exists() else decode_public_key(data)

    def private(self, ask: Callable[[], str]) -> PrivateKey | None:
        """The party's own private key, if it has one.

        Args:
            ask: gives the passphrase; called only if the key has one.

        Raises:
            ConfigError: others than its owner can read the file, or it is no key.
            PolicyError: the passphrase is wrong.
        """
        data = _read(self.private_path)
        if data is None:
            return None
        mode = stat.S_IMODE(self.private_path.stat().st_mode)
        if os.name == "posix" and mode & 0o077:
            raise ConfigError(
                f"{self.private_path}: expected a file that only you can read (mode 600), its "
                f"mode is {mode:o}: chmod 600 it, and think of who may have read it"
            )
        return decode_private_key(data, ask() if is_locked(data) else None)

    def signer(self, ask: Callable[[], str]) -> Signer | None:
        """What signs with the party's own key, if it has one; errors as of `private`."""
        key = self.private(ask)
        return None if key is None else Signer(key=key, number=self._number)

    def trust_signer(self, name: str, key: PublicKey) -> None:
        """Trust a signer from now on, under this name.

        Raises:
            ConfigError: the name is no name, or belongs to another key.
            PackageError: nothing can be sealed to the key. A package's signature has one that
                nobody tried.
        """
        _check_name(name)
        decode_public_key(key.encode())
        with self._locked():
            known = _read(self._signer_path(name))
            if known is not None and decode_public_key(known) != key:
                raise ConfigError(
                    f"`{name}` is another key, fingerprint {decode_public_key(known).fingerprint}: "
                    f"choose another name, or `blindtune keys forget {name}` first"
                )
            self._write(f"signers/{name}.key", key.encode())

    def forget_signer(self, name: str) -> PublicKey:
        """Trust a signer no more; ConfigError if nobody has that name."""
        _check_name(name)
        data = _read(self._signer_path(name))
        if data is None:
            known = ", ".join(self.signers()) or "nobody"
            raise ConfigError(f"expected the name of a trusted signer ({known}), got `{name}`")
        self._signer_path(name).unlink()
        return decode_public_key(data)

    def signers(self) -> dict[str, PublicKey]:
        """Every trusted signer by name, the party itself not among them; errors name the file."""
        found = {}
        for path in sorted((self.directory / "signers").glob("*.key")):
            data = _read(path)
            if data is not None and _NAME.fullmatch(path.stem):
                try:
                    found[path.stem] = decode_public_key(data)
                except PackageError as error:
                    raise ConfigError(
                        f"{path}: {error}; or `blindtune keys forget {path.stem}`"
                    ) from error
        return found

    def trust(
        self, *, allow_unsigned: bool = False, allow_older: bool = False, remember: bool = True
    ) -> Trust:
        """The trust that this keyring stands for.

        Args:
            allow_unsigned, allow_older: as in `Trust`.
            remember: refuse packages older than those seen before, and note the newest ones.
        """
        own = self.public()
        return Trust(
            signers=self.signers() | ({} if own is None else {OWN_NAME: own}),
            allow_unsigned=allow_unsigned,
            allow_older=allow_older,
            memory=self if remember else None,
            own_name=OWN_NAME,
        )

    def newest(self, subject: str, key: PublicKey) -> tuple[int, str] | None:
        """Serial and package id of the newest package of a signer about a subject."""
        return self._record("seen.json", dict[str, tuple[int, str]]).get(_seen_key(subject, key))

    def remember(self, subject: str, key: PublicKey, serial: int, identity: str) -> None:
        """Keep a package as the newest one seen."""
        with self._locked():
            seen = self._record("seen.json", dict[str, tuple[int, str]])
            known, _ = seen.get(_seen_key(subject, key), (0, ""))
            if serial > known:
                self._keep("seen.json", seen | {_seen_key(subject, key): (serial, identity)})

    def _number(self, subject: str, identity: str) -> int:
        """The serial of a package among those that were signed about its subject."""
        with self._locked():
            issued = self._record("issued.json", dict[str, list[str]])
            own = issued.get(subject, [])
            if identity not in own:
                own = [*own, identity]
                self._keep("issued.json", issued | {subject: own})
        return own.index(identity) + 1

    def _signer_path(self, name: str) -> Path:
        return self.directory / "signers" / f"{name}.key"

    def _record(self, name: str, kind: type[_RecordT]) -> _RecordT:
        data = _read(self.directory / name, _MAX_RECORD_BYTES)
        try:
            return msgspec.json.decode(data or b"{}", type=kind)
        except msgspec.MsgspecError as error:
            raise ConfigError(
                f"{self.directory / name}: expected what was kept there, got something else "
                f"({error}): move it away; what it knew of older packages is lost with it"
            ) from error

    def _keep(self, name: str, record: Mapping[str, Any]) -> None:
        self._write(name, msgspec.json.encode(record))

    def _write(self, name: str, data: bytes) -> None:
        path = self.directory / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with secret_file(path) as partial:
            partial.write_bytes(data)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time changes the keyring; the directory is made."""
        from filelock import FileLock

        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self.directory / ".lock", timeout=60, mode=0o600):
                yield
        except TimeoutError as error:
            raise OutputError(
                f"{self.directory}: another process has been changing it for a minute: wait for "
                "it, or end it"
            ) from error
        except OSError as error:
            raise output_error(self.directory, error) from error


def _seen_key(subject: str, key: PublicKey) -> str:
    return f"{key.signing_key} {subject}"


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name == OWN_NAME:
        raise ConfigError(
            f"expected a name of letters, digits, `-`, `_` and `.`, not `{OWN_NAME}`, got "
            f"`{name[:80]}`: choose another"
        )


def _read(path: Path, limit: int = MAX_KEY_BYTES) -> bytes | None:
    """A file of the keyring, None if there is none."""
    try:
        with path.open("rb") as handle:
            data = handle.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}): check its permissions"
        ) from error
    if len(data) > limit:
        raise ConfigError(f"{path}: more than {limit} bytes, that is no file of a keyring")
    return data


def read_public_key(path: Path) -> PublicKey:
    """The key in a public key file, or the one that signed a package (its directory is given).

    Raises:
        PackageError, ConfigError: it is neither.
    """
    from blindtune.exchange.packages.package import open_package

    if path.is_dir():
        signature = open_package(path).signature
        if signature is None:
            raise PackageError(f"{path}: nobody signed this package: ask its maker for their key")
        return signature.key
    data = _read(path)
    if data is None:
        raise ConfigError(
            f"{path}: expected a public key or a signed package, nothing is there: check the path"
        )
    return decode_public_key(data)
