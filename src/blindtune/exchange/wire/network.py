"""The customer's end of the network: a transport over one gRPC stream of raw frames.

TLS always; there is no switch that turns it off. gRPC agrees on TLS 1.3 with any peer that has
it (its Python interface cannot forbid 1.2 to one that has not). This is the only module that
imports grpc, and it does so when first needed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from blindtune.errors import (
    BlindtuneError,
    ConfigError,
    NetworkError,
    PolicyError,
    VerificationError,
)
from blindtune.exchange.files import printable
from blindtune.exchange.wire.codec import FRAME_BYTES, FrameReader, MessageLimits, encode
from blindtune.exchange.wire.credentials import VendorTrust
from blindtune.exchange.wire.guard import PUSHBACK
from blindtune.exchange.wire.messages import REPLIES, WINDOW, Message
from blindtune.exchange.wire.transport import BusyError, LostError, Tap, settle

SERVICE = "blindtune.Exchange"
STREAM, HEALTH = f"/{SERVICE}/Stream", f"/{SERVICE}/Health"
DEFAULT_PORT = 7443


@dataclass(frozen=True, kw_only=True)
class ConnectionConfig:
    """Times of one connection."""

    connect_timeout_seconds: float = 10.0
    """To look at a pinned certificate, and for the health check."""
    reply_timeout_seconds: float = 120.0
    """Without any frame while a reply is due: the connection counts as lost."""
    keepalive_seconds: float = 20.0
    """A silent connection is probed this often, and lost when the probe is not answered."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        times = (
            self.connect_timeout_seconds,
            self.reply_timeout_seconds,
            self.keepalive_seconds,
        )
        if min(times) <= 0:
            raise ConfigError("the times of a connection must be above 0 seconds")


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says of itself to anybody."""

    status: str
    version: int
    streams: int


def import_grpc() -> Any:
    """The grpc module, or ConfigError that says how to get it."""
    try:
        import grpc  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ConfigError(
            "split tuning over a network needs `grpcio`: pip install 'blindtune[network]'"
        ) from error
    return grpc


def channel_options(keepalive_seconds: float) -> list[tuple[str, int]]:
    """What both ends tell gRPC: sizes, probes, and to leave retries to us."""
    return [
        ("grpc.max_receive_message_length", FRAME_BYTES),
        ("grpc.max_send_message_length", FRAME_BYTES),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.keepalive_time_ms", int(keepalive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.enable_retries", 0),
    ]


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `https://host:port` or `host:port`; ConfigError for anything else."""
    whole = address if "://" in address else f"https://{address}"
    try:
        parts = urlsplit(whole)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    plain = host and parts.scheme == "https" and parts.path in ("", "/") and not parts.username
    if not host or not plain or parts.query or parts.fragment:
        raise ConfigError(
            f"{printable(address)}: expected an address such as https://vendor.example:7443"
        )
    return host, port or DEFAULT_PORT


class Connection:
    """One stream to a vendor: a transport that fails when the connection does.

    Use it inside `resuming.ResumingTransport`, which outlives it.

    Args:
        address: `https://host:port`.
        trust: by what the vendor is known, and the customer's token.
        config: times.
        limits: of replies.
        tap: is shown every frame.

    Raises:
        ConfigError: the address or a file is malformed.
        VerificationError: the vendor shows another certificate than the pinned one.
        LostError: the vendor cannot be reached (later: from `submit` and its futures).
    """

    def __init__(
        self,
        address: str,
        trust: VendorTrust,
        *,
        config: ConnectionConfig | None = None,
        limits: MessageLimits | None = None,
        tap: Tap | None = None,
    ) -> None:
        self._config = config or ConnectionConfig()
        self._tap = tap
        self._reader = FrameReader(accepts=REPLIES, limits=limits)
        self._pending: dict[int, Future[Message]] = {}
        self._room = threading.Condition()
        self._outgoing: queue.SimpleQueue[Iterator[bytes] | None] = queue.SimpleQueue()
        self._exchange = 0
        self._lost: BlindtuneError | None = None
        self._heard = time.monotonic()
        self._ended = threading.Event()
        self._channel = _channel(address, trust, self._config)
        stream = self._channel.stream_stream(STREAM)
        self._call = stream(self._frames(), metadata=(("authorization", f"Bearer {trust.token}"),))
        for work in (self._read, self._watch):
            threading.Thread(target=work, name=f"blindtune-{work.__name__}", daemon=True).start()

    def submit(self, message: Message) -> Future[Message]:
        """Send a request; waits while eight are unanswered."""
        future: Future[Message] = Future()
        with self._room:
            self._room.wait_for(lambda: self._lost or len(self._pending) < WINDOW)
            if self._lost is not None:
                raise self._lost
            self._exchange += 1
            frames = encode(message, self._exchange)
            if not self._pending:
                self._heard = time.monotonic()
            self._pending[self._exchange] = future
            self._outgoing.put(frames)
        return future

    def call(self, message: Message) -> Message:
        """Send a request and wait for its reply."""
        return self.submit(message).result()

    def close(self) -> None:
        """End the stream."""
        self._lose(LostError("this connection was closed: open another one"))

    def _frames(self) -> Iterator[bytes]:
        while (frames := self._outgoing.get()) is not None:
            for frame in frames:
                if self._tap is not None:
                    self._tap("request", frame)
                self._heard = time.monotonic()
                yield frame

    def _read(self) -> None:
        grpc = import_grpc()
        error: BlindtuneError = LostError("the vendor ended the stream: connect again")
        try:
            for frame in self._call:
                self._heard = time.monotonic()
                if self._tap is not None:
                    self._tap("reply", frame)
                arrived = self._reader.feed(frame)
                if arrived is not None:
                    self._answer(*arrived)
        except grpc.RpcError as failure:
            error = _translate(failure, grpc)
        except BlindtuneError as failure:
            error = failure
        self._lose(error)

    def _answer(self, exchange: int, reply: Message) -> None:
        if exchange == 0:  # about the stream, not about one request
            about: Future[Message] = Future()
            settle(about, reply)
            raise about.exception() or VerificationError(f"{reply!r} answers no request")
        with self._room:
            future = self._pending.pop(exchange, None)
            self._room.notify_all()
        if future is None:
            raise VerificationError(f"{reply!r} answers request {exchange}, which is not waiting")
        settle(future, reply)

    def _watch(self) -> None:
        limit = self._config.reply_timeout_seconds
        while not self._ended.wait(min(limit / 4, 1.0)):
            silence = time.monotonic() - self._heard
            if self._pending and silence > limit:
                self._lose(LostError(f"no reply for {limit:g} seconds: the work can be resumed"))

    def _lose(self, error: BlindtuneError) -> None:
        with self._room:
            if self._lost is not None:
                return
            self._lost = error
            pending, self._pending = self._pending, {}
            self._room.notify_all()
        self._ended.set()
        self._outgoing.put(None)
        self._call.cancel()
        self._channel.close()
        for future in pending.values():
            future.set_exception(error)


def health(address: str, trust: VendorTrust, *, config: ConnectionConfig | None = None) -> Health:
    """Ask a server how it is.

    Raises:
        NetworkError: it cannot be reached.
        VerificationError: it is not the one that is trusted, or its answer is malformed.
    """
    grpc, config = import_grpc(), config or ConnectionConfig()
    with _channel(address, trust, config) as channel:
        try:
            answer = channel.unary_unary(HEALTH)(b"", timeout=config.connect_timeout_seconds)
            return msgspec.json.decode(answer, type=Health)
        except grpc.RpcError as error:
            raise _translate(error, grpc) from error
        except msgspec.MsgspecError as error:
            raise VerificationError(f"{printable(address)}: a malformed health answer") from error


def _channel(address: str, trust: VendorTrust, config: ConnectionConfig) -> Any:
    grpc = import_grpc()
    host, port = parse_address(address)
    try:
        roots, key, certificate = trust.read(host, port, config.connect_timeout_seconds)
    except NetworkError as error:
        raise LostError(str(error)) from error
    credentials = grpc.ssl_channel_credentials(roots, key, certificate)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return grpc.secure_channel(target, credentials, channel_options(config.keepalive_seconds))


def _pushback_seconds(text: Any) -> float:
    """The seconds that a server names in milliseconds, a day at most; 1 if it names none."""
    plain = isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 10
    return min(int(text) / 1000, 86400.0) if plain else 1.0


def _translate(error: Any, grpc: Any) -> BlindtuneError:
    code, details = error.code(), printable(error.details() or "")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return PolicyError("the vendor does not accept this token: ask the vendor for a new one")
    pushback = dict(error.trailing_metadata() or ()).get(PUSHBACK)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and (pushback or "Concurrent" in details):
        return BusyError(_pushback_seconds(pushback))
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return VerificationError("the server is not a blindtune vendor: check the address")
    # gRPC names the reason of a failed handshake in its text alone.
    untrusted = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification", "not in peer certificate")
    if any(reason in (error.details() or "") for reason in untrusted):
        return VerificationError(
            "the vendor's certificate is expired, names another host, or comes from an authority "
            "that is not trusted: if it is self-signed, give --fingerprint (read to you by the "
            "vendor), or --roots; else ask the vendor"
        )
    if "CERTIFICATE_REQUIRED" in (error.details() or ""):
        return PolicyError(
            "the vendor asks for a client's certificate: give --client-certificate and --client-key"
        )
    return LostError(f"the connection was lost ({code.name}: {details}): the work can be resumed")
