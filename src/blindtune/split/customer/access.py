"""How a customer reaches its vendor: certificate, token, retries, and a count of the bytes.

A token is read from a file or the environment, never from a command line, where others on the
machine could see it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

from blindtune.errors import ConfigError, NetworkError, PolicyError
from blindtune.exchange.wire.credentials import VendorTrust
from blindtune.exchange.wire.messages import ResumeJob
from blindtune.exchange.wire.network import Connection, parse_address
from blindtune.exchange.wire.resuming import Backoff, ResumingTransport, RetryConfig
from blindtune.exchange.wire.transport import BusyError, Direction, Tap, Transport
from blindtune.split.customer.requests import check_open
from blindtune.version import PROGRAM

TOKEN_VARIABLE = "BLINDTUNE_TOKEN"  # noqa: S105 (a name)
_MAX_TOKEN_BYTES = 4096
Connect = Callable[[], Transport]
"""Makes a connection to the vendor."""
Reached = TypeVar("Reached")


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    """By what the vendor is known, how the customer shows itself, and how long it tries."""

    token_file: str | None = None
    """File with the token that the vendor gave; without it, the variable BLINDTUNE_TOKEN."""
    fingerprint: str | None = None
    """sha256 of the vendor's self-signed certificate, in hex: that one and no other."""
    roots: str | None = None
    """PEM file of authorities that may vouch for the vendor; default: the well-known ones."""
    client_certificate: str | None = None
    """For mutual TLS: your own certificate (PEM)."""
    client_key: str | None = None
    """For mutual TLS: its private key (PEM)."""
    give_up_after_seconds: float = 300.0
    """Time without any reply after which the work stops; the same command goes on later."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not self.give_up_after_seconds >= 0:
            raise ConfigError("give_up_after_seconds must not be negative")

    def trust(self) -> VendorTrust:
        """What a connection needs to know.

        Raises:
            ConfigError: no token, a file that cannot be read, options that contradict each other.
        """
        return VendorTrust(
            token=self._token(),
            roots=_path(self.roots),
            fingerprint=self.fingerprint,
            certificate=_path(self.client_certificate),
            key=_path(self.client_key),
        )

    def retries(self) -> RetryConfig:
        """Pauses and limits of a transport."""
        return RetryConfig(give_up_after_seconds=self.give_up_after_seconds)

    def _token(self) -> str:
        if self.token_file is None:
            token = os.environ.get(TOKEN_VARIABLE, "").strip()
            if not token:
                raise ConfigError(
                    f"expected the vendor's token in {TOKEN_VARIABLE} or in token_file "
                    "(--token-file), got neither: the vendor makes one with `blindtune admit`"
                )
            return token
        try:
            with Path(self.token_file).open("rb") as file:
                return file.read(_MAX_TOKEN_BYTES).decode("ascii", "replace").strip()
        except OSError as error:
            raise ConfigError(
                f"{self.token_file}: expected a file with the vendor's token, cannot read it "
                f"({error.strerror or error}): check the path"
            ) from error


@final
class Traffic:
    """Bytes that crossed; a tap of connections.

    Attributes:
        sent, received: how many.
        tap: is shown every frame too.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0
        self.tap: Tap | None = None

    def __call__(self, direction: Direction, frame: bytes) -> None:
        """Count a frame."""
        if self.tap is not None:
            self.tap(direction, frame)
        if direction == "request":
            self.sent += len(frame)
        else:
            self.received += len(frame)


def connector(
    vendor: str | Connect,
    access: AccessConfig | None,
    traffic: Traffic,
    *,
    record: bool = False,
) -> Connect:
    """What makes connections.

    Args:
        vendor: its address, `https://host:port`; or a function that makes a transport, for a vendor
            in this process or behind another network.
        access: needed with an address alone.
        traffic: counts what crosses; with a function it stays at 0.
        record: whether what crosses shall be kept, which needs an address.

    Raises:
        ConfigError: a malformed address, no token, contradictions.
    """
    if not isinstance(vendor, str):
        if record:
            raise ConfigError("expected an address to record: your own transport takes a Recorder")
        return vendor
    parse_address(vendor)
    trust = (access or AccessConfig()).trust()
    return lambda: Connection(vendor, trust, tap=traffic)


def patiently(reach: Callable[[], Reached], retries: RetryConfig) -> Reached:
    """Open a job's transport; while the vendor says that it is busy, wait and ask again.

    Raises:
        BusyError: it still is after `give_up_after_seconds`. Others: as `reach` does.
    """
    backoff = Backoff(retries)
    while True:
        try:
            return reach()
        except BusyError as error:
            seconds = backoff.pause_seconds(error)
            if seconds is None:
                raise
            time.sleep(seconds)


def resume_job(connect: Connect, token: str, retries: RetryConfig) -> ResumingTransport:
    """Go on with a job that must exist at the vendor, and must not be cancelled.

    Raises:
        NetworkError: the vendor cannot be reached. PolicyError: it has no such job.
    """
    transport = patiently(
        lambda: ResumingTransport(
            connect, ResumeJob(token=token), program=PROGRAM, retries=retries
        ),
        retries,
    )
    check_open(transport)
    return transport


@contextmanager
def saying_what_next() -> Iterator[None]:
    """Add to errors of the network what a customer does now."""
    try:
        yield
    except NetworkError as error:
        raise NetworkError(f"{error}; run the same command again, it goes on") from error
    except PolicyError as error:
        if "(unknown-job)" not in str(error):
            raise
        raise PolicyError(
            "the vendor has no such job of yours: it has forgotten it, or your token is another "
            "customer's: ask the vendor, or begin another job with another --out"
        ) from error


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
