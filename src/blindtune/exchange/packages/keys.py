"""A party's keys: one to sign with, one to be sent secrets, one fingerprint for both.

Signatures are Ed25519 (the `cryptography` package), secrets are sealed with age's X25519 recipients
(the `pyrage` package). This project writes no cryptography of its own, it only says what is signed
and what is sealed. Private keys have no text form that a log could catch by accident.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, final

import msgspec
from msgspec import Meta

from blindtune.errors import ConfigError, PackageError, PolicyError
from blindtune.exchange.packages.manifest import canonical_bytes

MAX_KEY_BYTES = 64 << 10
_FINGERPRINT_DOMAIN = b"blindtune public key 1\0"
_AGE = b"age-encryption.org/v1\n"

Hex32 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
AgeRecipient = Annotated[str, Meta(pattern=r"\Aage1[0-9a-z]{58}\Z")]
_AgeIdentity = Annotated[str, Meta(pattern=r"\AAGE-SECRET-KEY-1[0-9A-Z]{58}\Z")]


class _PublicFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal["blindtune-public-key"] = "blindtune-public-key"
    version: Literal[1] = 1
    signing_key: Hex32
    receiving_key: AgeRecipient


class _PrivateFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal["blindtune-private-key"] = "blindtune-private-key"
    version: Literal[1] = 1
    signing_key: Hex32
    receiving_key: _AgeIdentity


@final
@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """What others know a party by."""

    signing_key: str
    """Ed25519 public key, 64 hex digits: its signatures are checked with it."""
    receiving_key: str
    """age recipient: what is sealed to it, only the party can open."""

    @property
    def fingerprint(self) -> str:
        """Eight groups of five digits (132 bits of a sha256 over both keys), to be read aloud."""
        text = f"{self.signing_key}\0{self.receiving_key}".encode()
        number = int.from_bytes(hashlib.sha256(_FINGERPRINT_DOMAIN + text).digest())
        digits = f"{number % 10**40:040d}"
        return " ".join(digits[i : i + 5] for i in range(0, 40, 5))

    def encode(self) -> bytes:
        """The bytes of a public key file: one line of canonical JSON."""
        file = _PublicFile(signing_key=self.signing_key, receiving_key=self.receiving_key)
        return canonical_bytes(msgspec.to_builtins(file)) + b"\n"

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether this party's key made the signature of the message."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.signing_key))
            key.verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


@final
@dataclass(frozen=True, kw_only=True)
class PrivateKey:
    """A party's secret; prints as nothing but its kind."""

    signing_seed: str = field(repr=False)
    """Ed25519 seed, 64 hex digits."""
    receiving_secret: str = field(repr=False)
    """age identity, as age spells it."""

    @cached_property
    def public(self) -> PublicKey:
        """The public half."""
        from pyrage import x25519

        signing = self._signing().public_key().public_bytes_raw().hex()
        receiving = str(x25519.Identity.from_str(self.receiving_secret).to_public())
        return PublicKey(signing_key=signing, receiving_key=receiving)

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature, 64 bytes; the same message always has the same one."""
        signature: bytes = self._signing().sign(message)
        return signature

    def encode(self, passphrase: str | None = None) -> bytes:
        """The bytes of a private key file; with a passphrase, sealed by age's scrypt recipient."""
        file = _PrivateFile(signing_key=self.signing_seed, receiving_key=self.receiving_secret)
        plain = canonical_bytes(msgspec.to_builtins(file)) + b"\n"
        if not passphrase:
            return plain
        from pyrage import passphrase as age

        sealed: bytes = age.encrypt(plain, passphrase)
        return sealed

    def _signing(self) -> Any:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(self.signing_seed))


def new_private_key() -> PrivateKey:
    """A fresh key, from the operating system's randomness."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from pyrage import x25519

    return PrivateKey(
        signing_seed=Ed25519PrivateKey.generate().private_bytes_raw().hex(),
        receiving_secret=str(x25519.Identity.generate()),
    )


def decode_public_key(data: bytes) -> PublicKey:
    """Read a public key file that another party gave; PackageError if it is anything else."""
    try:
        file = msgspec.json.decode(data[:MAX_KEY_BYTES], type=_PublicFile)
        key = PublicKey(signing_key=file.signing_key, receiving_key=file.receiving_key)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PackageError(f"expected a public key file, got something else ({error})") from error
    if key.encode() != data:
        raise PackageError(
            "expected a public key as `blindtune keys show` writes it, got other spelling"
        )
    from pyrage import RecipientError
    from pyrage.x25519 import Recipient

    try:
        Recipient.from_str(key.receiving_key)
    except RecipientError as error:
        raise PackageError(
            f"expected a public key that packages can be sealed to, got a damaged one ({error}): "
            "ask for it again"
        ) from error
    return key


def is_locked(data: bytes) -> bool:
    """Whether the bytes of a private key file need a passphrase."""
    return data.startswith(_AGE)


def decode_private_key(data: bytes, passphrase: str | None = None) -> PrivateKey:
    """Read a party's own private key file.

    Raises:
        PolicyError: the passphrase is wrong.
        ConfigError: it is no private key file.
    """
    if is_locked(data):
        from pyrage import DecryptError
        from pyrage import passphrase as age

        try:
            data = age.decrypt(data, passphrase or "")
        except DecryptError as error:
            raise PolicyError("the passphrase does not open the private key: try again") from error
    try:
        file = msgspec.json.decode(data, type=_PrivateFile)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ConfigError(
            "expected a private key file of `blindtune keys new`, got something else: restore it "
            "from a copy, or make a new key elsewhere"
        ) from None  # the cause would quote what is secret
    return PrivateKey(signing_seed=file.signing_key, receiving_secret=file.receiving_key)
