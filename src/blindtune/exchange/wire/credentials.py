"""Who is who on the network: the vendor's certificate, the customers' tokens.

The vendor shows a certificate; a self-signed one needs an explicit word at both ends: a flag at
the vendor, the certificate's fingerprint at the customer. Customers show a bearer token of 256
random bits, of which the vendor keeps only the sha256, and optionally a certificate (mutual TLS).
Private keys and tokens are never logged.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import msgspec

from blindtune.atomic import put_in_order, secret_file
from blindtune.errors import ConfigError, NetworkError, VerificationError
from blindtune.exchange.wire.messages import Name, Sha256

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class ServerCredentials:
    """The vendor's side of TLS; files in PEM."""

    certificate: Path
    """The certificate chain, the vendor's own first; it names the hosts that customers call."""
    key: Path
    """The private key."""
    self_signed: bool = False
    """Whether a certificate that nobody but its owner vouches for is meant to be used."""
    customer_roots: Path | None = None
    """With it, customers must show a certificate that one of these issued (mutual TLS)."""

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """Key, certificate and customer roots, after a trial handshake in memory.

        Raises:
            ConfigError: a file is missing, the key is another one's, the certificate is expired,
                or it is self-signed and `self_signed` is not set.
        """
        facts = _trial(self.certificate, self.key)
        if facts["issuer"] == facts["subject"] and not self.self_signed:
            raise ConfigError(
                f"{self.certificate}: self-signed, so customers cannot tell whose it is: use one "
                "of an authority, or say that it is meant, and give customers its fingerprint"
            )
        roots = _read(self.customer_roots) if self.customer_roots else None
        return _read(self.key), _read(self.certificate), roots


@dataclass(frozen=True, kw_only=True)
class VendorTrust:
    """By what a customer knows the vendor, and shows itself."""

    token: str = field(repr=False)
    """The bearer token that the vendor gave."""
    roots: Path | None = None
    """Authorities in PEM that may vouch for the vendor; None: the well-known ones."""
    fingerprint: str | None = None
    """The sha256 of the vendor's self-signed certificate, in hex: that one, and no other."""
    certificate: Path | None = None
    """For mutual TLS: the customer's own certificate, in PEM."""
    key: Path | None = None
    """For mutual TLS: its private key, in PEM."""

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        if self.roots is not None and self.fingerprint is not None:
            raise ConfigError("give either roots or a fingerprint, not both")
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a certificate for mutual TLS needs its key, and the other way round")
        if self.fingerprint is not None and len(_plain(self.fingerprint)) != 64:
            raise ConfigError("a fingerprint is 64 hex digits, the sha256 of the certificate")
        if not self.token.isascii() or not self.token.isprintable() or len(self.token) < 32:
            raise ConfigError("a token has at least 32 printable characters: ask the vendor for it")

    def read(self, host: str, port: int, timeout_seconds: float) -> tuple[bytes | None, ...]:
        """Roots, own key and own certificate; a pinned certificate is its own only root.

        Raises:
            VerificationError: the server shows another certificate than the pinned one.
            NetworkError: it cannot be reached to look at its certificate.
        """
        roots = _read(self.roots) if self.roots else None
        if self.fingerprint is not None:
            roots = _pinned(host, port, _plain(self.fingerprint), timeout_seconds)
        key = _read(self.key) if self.key else None
        return roots, key, _read(self.certificate) if self.certificate else None


class Doorkeeper(Protocol):
    """Knows customers by their tokens."""

    def who(self, token: str) -> str | None:
        """The customer that has this token, or None."""

    def admits(self, customer: str, digest: str) -> bool:
        """Whether the token with this sha256 still is the customer's."""


class Customers:
    """The customers that a vendor serves: names and the sha256 of their tokens."""

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = dict(hashes)

    def who(self, token: str) -> str | None:
        """The customer that has this token; takes as long for a wrong one as for a right one."""
        digest, found = token_hash(token), None
        for name, known in self._hashes.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def admits(self, customer: str, digest: str) -> bool:
        """Whether the token with this sha256 still is the customer's."""
        return hmac.compare_digest(self._hashes.get(customer, ""), digest)


class CustomerFile:
    """The customers of a file that `add_customer` writes, as it is at every moment.

    Whose token is new is known at once; whose token was taken out or replaced is unknown at once,
    and a server ends the streams that came in with it. While the file cannot be read nobody comes
    in, and nobody who is in is sent away.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] = ()
        self._customers = Customers({})
        self._look()

    def who(self, token: str) -> str | None:
        """The customer that has this token, or None."""
        with self._lock:
            try:
                self._look()
            except ConfigError as error:
                logger.error("%s", error)
                self._seen, self._customers = (), Customers({})
            customers = self._customers
        return customers.who(token)

    def admits(self, customer: str, digest: str) -> bool:
        """Whether the token with this sha256 still is the customer's; True if nobody can say."""
        with self._lock:
            try:
                self._look()
            except ConfigError:
                return True
            customers = self._customers
        return customers.admits(customer, digest)

    def _look(self) -> None:
        try:
            facts = self._path.stat()
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be read ({error.strerror})") from error
        seen = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        if seen != self._seen:
            self._customers, self._seen = open_customers(self._path), seen


def open_customers(path: Path) -> Customers:
    """Read the file that `add_customer` writes; ConfigError if it is anything else."""
    return Customers(_hashes(path))


def add_customer(
    path: Path, name: str, deliver: Callable[[str], object] = lambda _token: None
) -> str:
    """Give a customer a new token, in the place of any older one, and return it; it is not kept.

    `deliver` gets it before the older one ends; if that fails, nothing has changed.
    """
    token = secrets.token_urlsafe(32)
    hashes = {**(_hashes(path) if path.exists() else {}), name: token_hash(token)}
    try:
        msgspec.convert(hashes, dict[Name, Sha256])
    except msgspec.ValidationError as error:
        raise ConfigError(f"`{name}` cannot name a customer ({error}): use letters") from error
    deliver(token)
    _write_hashes(path, hashes)
    return token


def remove_customer(path: Path, name: str) -> None:
    """Take a customer's token out; ConfigError if there is no such customer."""
    hashes = _hashes(path)
    if name not in hashes:
        known = ", ".join(sorted(hashes)) or "nobody"
        raise ConfigError(f"expected a customer of {path}, got `{name}`: known are {known}")
    del hashes[name]
    _write_hashes(path, hashes)


def _write_hashes(path: Path, hashes: dict[str, str]) -> None:
    with secret_file(path) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(hashes)))


def token_hash(token: str) -> str:
    """What a vendor keeps of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def fingerprint(certificate: bytes) -> str:
    """The sha256 of the first certificate of a PEM text, in hex."""
    text = certificate.decode("ascii", "replace")
    try:
        begin = text.index(ssl.PEM_HEADER)
        end = text.index(ssl.PEM_FOOTER) + len(ssl.PEM_FOOTER)
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(text[begin:end])).hexdigest()
    except ValueError as error:
        raise ConfigError(f"not a certificate in PEM ({error})") from error


def make_development_certificate(
    directory: Path,
    hosts: Sequence[str] = ("localhost", "127.0.0.1"),
    *,
    begins: datetime | None = None,
    days: int = 30,
) -> ServerCredentials:
    """Write a self-signed certificate and its key for trying things out.

    Args:
        directory: gets certificate.pem and key.pem (readable by the owner only).
        hosts: the names and addresses that customers will call.
        begins: first moment of validity; None: now.
        days: length of validity.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ConfigError(
            "making a certificate needs `cryptography`: pip install 'blindtune[network]'"
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "blindtune development")])
    begin = begins or datetime.now(UTC) - timedelta(minutes=5)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    plain = key.private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for file, content in (
        ("key.pem", plain),
        ("certificate.pem", certificate.public_bytes(encoding)),
    ):
        put_in_order(directory / file)
        with secret_file(directory / file) as partial:
            partial.write_bytes(content)
    return ServerCredentials(
        certificate=directory / "certificate.pem", key=directory / "key.pem", self_signed=True
    )


def certified_hosts(certificate: bytes) -> frozenset[str]:
    """The hosts and addresses that the first certificate of a PEM text names."""
    from cryptography import x509

    try:
        names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except (ValueError, x509.ExtensionNotFound) as error:
        raise ConfigError(f"not a certificate in PEM that names its hosts ({error})") from error
    return frozenset(str(name.value) for name in names.value)


def _general_name(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _trial(certificate: Path, key: Path) -> dict[str, Any]:
    """Shake hands with ourselves: the facts of a certificate that works with its key today."""
    _read(certificate), _read(key)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    upstream, downstream = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        # A password is asked for nowhere: a key that needs one is refused.
        server.load_cert_chain(certificate, key, password=lambda: b"")
        client.load_verify_locations(certificate)
        ends = (
            client.wrap_bio(downstream, upstream),
            server.wrap_bio(upstream, downstream, server_side=True),
        )
        for _round in range(3):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        return ends[0].getpeercert() or {}
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ConfigError(
            f"{certificate} and {key} cannot be used ({error}): expected a valid certificate and "
            "its key in PEM, without a password"
        ) from error


def _pinned(host: str, port: int, expected: str, timeout_seconds: float) -> bytes:
    """The certificate that a server shows, if it is the expected one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # its fingerprint is compared below
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_seconds) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            shown = secured.getpeercert(binary_form=True) or b""
    except ssl.SSLError as error:  # a connection that broke looks the same: it may be tried again
        raise NetworkError(
            f"{host}:{port} does not speak TLS 1.3, or the connection was damaged "
            f"({error.reason}): check the address, and try again"
        ) from error
    except OSError as error:
        raise NetworkError(
            f"{host}:{port} cannot be reached ({error}): check the address, and try again"
        ) from error
    found = hashlib.sha256(shown).hexdigest()
    if not hmac.compare_digest(found, expected):
        raise VerificationError(
            f"{host}:{port} shows another certificate ({found[:16]}...) than the pinned one "
            f"({expected[:16]}...): ask the vendor, somebody may be in between"
        )
    return ssl.DER_cert_to_PEM_cert(shown).encode()


def _hashes(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(_read(path), type=dict[Name, Sha256])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: not a file of customers ({error})") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            return handle.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}): check the path"
        ) from error


def _plain(digits: str) -> str:
    return digits.replace(":", "").lower()
