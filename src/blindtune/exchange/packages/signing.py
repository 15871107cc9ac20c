"""Who made a package, and whether that is somebody whom the reader trusts.

A signed package holds one more file, `signature.json` (docs/package-format.md): a statement of the
package's format, a serial number and the signer's public key, and an Ed25519 signature over that
statement and the manifest's exact bytes. The manifest pins every other file, so the signature pins
the package: it fits no other package, no other kind, no other serial number.

Guarantee: with a `Trust` in force, not one byte of the manifest is parsed, and no weight is read,
unless a trusted key signed it. Serial numbers grow with every package that a party signs for the
same model (or, for adapters, the same emulator); a reader remembers the highest one that it has
seen, and refuses older ones.

What is not covered: a signer who is trusted can send anything that a package can hold. An old
package is only known as old to a reader who has seen a newer one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, Protocol, final

import msgspec
from msgspec import Meta

from blindtune.errors import PackageError, PolicyError
from blindtune.exchange.files import open_regular, printable, read_exactly
from blindtune.exchange.packages.keys import AgeRecipient, Hex32, PrivateKey, PublicKey
from blindtune.exchange.packages.manifest import (
    AdapterManifest,
    Manifest,
    canonical_bytes,
    package_id,
)

SIGNATURE_NAME = "signature.json"
MAX_SIGNATURE_BYTES = 4096
_DOMAIN = b"blindtune package signature 1\0"


class _Statement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal["blindtune-signature"] = "blindtune-signature"
    version: Literal[1] = 1
    package: Literal["blindtune-emulator", "blindtune-adapter", "blindtune-bottom"]
    package_version: Literal[1] = 1
    serial: Annotated[int, Meta(ge=1, le=2**53)]
    signing_key: Hex32
    receiving_key: AgeRecipient
    signature: Annotated[str, Meta(pattern=r"\A[0-9a-f]{128}\Z")]


@final
@dataclass(frozen=True, kw_only=True)
class Signature:
    """A signature that was checked: who signed, and which of its packages this is."""

    key: PublicKey
    package: str
    """The format of the package that was signed."""
    serial: int
    """1, 2, 3, ...: the signer's count of packages about this subject."""
    name: str | None = None
    """What the reader calls the signer; None: nobody whom it trusts."""

    def __str__(self) -> str:
        return f"{self.name or 'an unknown key'} ({self.key.fingerprint})"


@final
@dataclass(frozen=True, kw_only=True)
class Signer:
    """Signs packages with one key."""

    key: PrivateKey
    number: Callable[[str, str], int] = field(default=lambda subject, identity: 1)
    """(subject, package id) -> serial; the same id always has the same one."""

    def sign(self, manifest: Manifest, manifest_bytes: bytes) -> bytes:
        """The bytes of the package's signature file."""
        public = self.key.public
        statement = _Statement(
            package=manifest.format,
            serial=self.number(subject_of(manifest), package_id(manifest_bytes)),
            signing_key=public.signing_key,
            receiving_key=public.receiving_key,
            signature="0" * 128,
        )
        signature = self.key.sign(_message(statement, manifest_bytes)).hex()
        signed = msgspec.structs.replace(statement, signature=signature)
        return canonical_bytes(msgspec.to_builtins(signed))


class Memory(Protocol):
    """Remembers the newest package of every signer and subject."""

    def newest(self, subject: str, key: PublicKey) -> tuple[int, str] | None:
        """Serial and package id of the newest package seen."""

    def remember(self, subject: str, key: PublicKey, serial: int, identity: str) -> None:
        """Keep a package as seen."""


@final
@dataclass(frozen=True, kw_only=True)
class Trust:
    """Whose packages a reader opens.

    A reader that has no Trust (None) opens packages of anybody: then a signature is checked if
    there is one, and nobody is known by name.
    """

    signers: Mapping[str, PublicKey]
    """The keys that are trusted, by the names that the reader gave them."""
    allow_unsigned: bool = False
    """Open packages that nobody signed, or somebody who is not trusted."""
    allow_older: bool = False
    """Open a package although a newer one of the same signer and subject was seen."""
    memory: Memory | None = None
    """What was seen before; None: nothing is remembered, and no package is too old."""
    own_name: str | None = None
    """What the reader calls itself: of its own packages none is too old."""

    def admit(self, path: Path, signature: Signature | None) -> Signature | None:
        """The signature with the signer's name.

        Raises:
            PolicyError: nobody signed the package, or nobody who is trusted.
        """
        if signature is not None:
            for name, key in self.signers.items():
                if key == signature.key:
                    return replace(signature, name=name)
        if self.allow_unsigned:
            return signature
        if signature is None:
            raise PolicyError(
                f"{path}: expected a package with a signature, nobody signed it: ask its maker to "
                "sign it, or say that you take it as it is (--allow-unsigned)"
            )
        raise PolicyError(
            f"{path}: signed by a key that you do not trust, fingerprint "
            f"{signature.key.fingerprint}: compare it with the maker by voice, then "
            f"`blindtune keys trust NAME {path}`"
        )

    def check_order(
        self, path: Path, signature: Signature | None, manifest: Manifest, identity: str
    ) -> None:
        """Refuse a package that is older than one seen before, and remember a newer one.

        Raises:
            PolicyError: it is older, or another one of the same number.
        """
        if self.memory is None or signature is None:
            return
        if signature.name in (None, self.own_name):
            return
        subject = subject_of(manifest)
        serial, known = self.memory.newest(subject, signature.key) or (0, "")
        if (serial, known) == (signature.serial, identity):
            return
        if signature.serial > serial:
            self.memory.remember(subject, signature.key, signature.serial, identity)
        elif not self.allow_older:
            raise PolicyError(
                f"{path}: number {signature.serial} of {signature.name} for this subject, you have "
                f"opened number {serial} ({known[:19]}...) before: somebody may have put an old "
                "package in the place of a new one; if it is meant, say so (--allow-older)"
            )


def subject_of(manifest: Manifest) -> str:
    """What serial numbers count: packages of one format about one model, or one emulator."""
    about = manifest.emulator if isinstance(manifest, AdapterManifest) else manifest.model
    return f"{manifest.format} {about}"


def read_signature(directory: Path, manifest_bytes: bytes) -> Signature:
    """Read a package's signature file, and check it against the manifest's bytes.

    Raises:
        PackageError: it is malformed, or not a signature of this manifest.
    """
    path = directory / SIGNATURE_NAME
    handle, size = open_regular(path)
    with handle:
        if size > MAX_SIGNATURE_BYTES:
            raise _refused(path, f"{size} bytes, at most {MAX_SIGNATURE_BYTES} are allowed")
        data = read_exactly(handle, size, path)
    try:
        statement = msgspec.json.decode(data, type=_Statement)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _refused(path, f"malformed ({error})") from error
    if canonical_bytes(msgspec.to_builtins(statement)) != data:
        raise _refused(path, "not in canonical form")
    key = PublicKey(signing_key=statement.signing_key, receiving_key=statement.receiving_key)
    if not key.verifies(bytes.fromhex(statement.signature), _message(statement, manifest_bytes)):
        raise _refused(path, "not a signature of this package")
    return Signature(key=key, package=statement.package, serial=statement.serial)


def _message(statement: _Statement, manifest_bytes: bytes) -> bytes:
    """What is signed: a domain, the statement without its signature, the manifest as it stands."""
    stated = msgspec.to_builtins(statement)
    del stated["signature"]
    return b"%s%s\0%s" % (_DOMAIN, canonical_bytes(stated), manifest_bytes)


def _refused(path: Path, reason: str) -> PackageError:
    return PackageError(f"{path}: {printable(reason)}: ask for the package again")
