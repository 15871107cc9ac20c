"""Who may come in, and by what they know the vendor: tokens and the certificate of a service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from blindtune.atomic import put_in_order, secret_file
from blindtune.errors import ConfigError, OutputError
from blindtune.exchange.wire.credentials import (
    ServerCredentials,
    add_customer,
    certified_hosts,
    make_development_certificate,
    remove_customer,
)
from blindtune.kinds import check_kinds
from blindtune.places import located

CUSTOMERS = "customers.json"
"""The file of customers in a vendor's directory; every vendor's directory has one."""
_BEFORE = {"bottom", "bottom.options.yaml", "bottom.done.json", "serve.log"}
"""What may be in the directory before it is a vendor's."""
_TLS = "tls"
_SELF_SIGNED_DAYS = 365
_EVERYWHERE = ("0.0.0.0", "::", "")  # noqa: S104 (to compare with)


@dataclass(frozen=True, kw_only=True)
class CertificateConfig:
    """The certificate that a service shows, and whether customers need one."""

    self_signed: bool = False
    """Show a certificate that nobody but its fingerprint vouches for; it is made once and kept in
    the vendor's directory."""
    certificate: str | None = None
    """The certificate chain in PEM, the vendor's own first."""
    key: str | None = None
    """Its private key in PEM."""
    certificate_names: tuple[str, ...] = ()
    """Hosts or addresses that a self-signed certificate names, as customers will call them;
    localhost and the host that is listened at are always among them."""
    customer_roots: str | None = None
    """Authorities in PEM; with them, customers must also show a certificate of one of them."""

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        check_kinds(self)
        given = [name is not None for name in (self.certificate, self.key)]
        if given[0] != given[1] or (given[0] and self.self_signed):
            raise ConfigError("expected a certificate and its key, or self_signed without both")
        if self.certificate_names and not self.self_signed:
            raise ConfigError("certificate_names are for a self-signed certificate: leave them out")

    def check_whole(self) -> None:
        """Raise ConfigError unless the config says which certificate is shown."""
        if self.certificate is None and not self.self_signed:
            raise ConfigError(
                "expected a certificate and its key, or self_signed, got neither: to try things "
                "out self_signed will do, customers then need the certificate's fingerprint"
            )


def credentials_of(access: CertificateConfig, directory: Path, host: str) -> ServerCredentials:
    """The certificate of a service; a self-signed one is made when there is none.

    Args:
        directory: the vendor's.
        host: where it listens.

    Raises:
        ConfigError: it cannot be used, is expired, or does not name the hosts that it should.
    """
    roots = Path(access.customer_roots) if access.customer_roots else None
    if access.certificate is not None and access.key is not None:
        found = ServerCredentials(
            certificate=Path(access.certificate), key=Path(access.key), customer_roots=roots
        )
        found.read()
        return found
    access.check_whole()
    names = ["localhost", "127.0.0.1", *([] if host in _EVERYWHERE else [host])]
    wanted = list(dict.fromkeys([*names, *access.certificate_names]))
    place = directory / _TLS
    if not (place / "certificate.pem").exists():
        make_development_certificate(place, wanted, days=_SELF_SIGNED_DAYS)
    found = ServerCredentials(
        certificate=place / "certificate.pem",
        key=place / "key.pem",
        self_signed=True,
        customer_roots=roots,
    )
    anew = f"remove {place} to have a new one made, and give customers its fingerprint"
    try:
        found.read()
    except ConfigError as error:
        raise ConfigError(f"{error}; {anew}") from error
    missing = sorted(set(wanted) - certified_hosts(found.certificate.read_bytes()))
    if missing:
        raise ConfigError(
            f"{found.certificate}: expected a certificate for {', '.join(wanted)}, got one that "
            f"does not name {', '.join(missing)}: {anew}"
        )
    return found


def prepare(directory: Path) -> Path:
    """Make a vendor's directory, with no customers yet, if it is not there; its file of customers.

    Raises:
        OutputError: something else is there, or it cannot be written.
    """
    file = directory / CUSTOMERS
    if not file.exists():
        put_in_order(file)
        there = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
        if directory.is_file() or there - _BEFORE:
            raise OutputError(
                f"{directory}: expected a vendor's directory (with {CUSTOMERS}) or a new one, "
                "something else is there: choose another"
            )
        with secret_file(file) as partial:
            partial.write_text("{}\n")
    return file


def admit(name: str, out: str | Path, *, token_file: str | Path | None = None) -> str:
    """Give a customer a new token, in the place of any older one; a running service knows it.

    Args:
        name: letters, digits, and `_.+ -`.
        out: the vendor's directory; it is made if it is not there.
        token_file: a new file, for the owner's eyes only, that gets the token.

    Returns:
        The token. The vendor keeps its hash only: it cannot be shown again.

    Raises:
        ConfigError: that is no name. OutputError: a file cannot be written, or is there already.
    """
    target = None if token_file is None else Path(token_file)
    if target is not None and target.exists():
        raise OutputError(f"{target}: expected a new file for the token, something is there")
    customers = prepare(located(out))

    def deliver(token: str) -> None:
        if target is not None:
            with secret_file(target) as partial:
                partial.write_text(token + "\n")

    with FileLock(customers.with_suffix(".lock"), mode=0o600):
        put_in_order(customers)
        return add_customer(customers, name, deliver)


def revoke(name: str, out: str | Path) -> None:
    """End a customer's token; a running service ends the streams that came in with it.

    Its jobs stay until they expire: admitted again, the same name goes on with them.

    Args:
        name: of the customer.
        out: the vendor's directory.

    Raises:
        ConfigError: there is no such customer, or no vendor's directory.
    """
    customers = located(out) / CUSTOMERS
    if not customers.exists():
        raise ConfigError(f"{out}: expected a vendor's directory, there is no {CUSTOMERS} in it")
    with FileLock(customers.with_suffix(".lock"), mode=0o600):
        put_in_order(customers)
        remove_customer(customers, name)


def told_hosts(host: str, port: int, names: Sequence[str]) -> list[str]:
    """The addresses that customers may call, as far as the vendor can know them."""
    hosts = names or (["localhost"] if host in _EVERYWHERE else [host])
    return [f"https://{f'[{name}]' if ':' in name else name}:{port}" for name in hosts]
