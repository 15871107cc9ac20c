"""The vendor's end of the network: many customers, bounded in every direction.

Each stream (exchange.wire.stream) has a reader, which puts messages together while the handler
computes, and a queue of at most eight requests. Whoever sends more than that, or more than its
share of the server's memory for requests (exchange.wire.request_memory), is told to come back
later; whoever stalls is dropped. Other streams do not notice.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import ceil
from typing import Any, NoReturn

import msgspec

from blindtune.errors import ConfigError
from blindtune.exchange.wire.credentials import Doorkeeper, ServerCredentials, token_hash
from blindtune.exchange.wire.events import Observer, StreamOpened, TurnedAway, ignore
from blindtune.exchange.wire.guard import PUSHBACK, Guard, GuardConfig, allow_files, network_of
from blindtune.exchange.wire.messages import PROTOCOL_VERSION, Busy, Refusal
from blindtune.exchange.wire.network import SERVICE, Health, channel_options, import_grpc
from blindtune.exchange.wire.request_memory import RequestMemory, Share
from blindtune.exchange.wire.stream import Stream
from blindtune.exchange.wire.transport import Handler
from blindtune.kinds import check_kinds

logger = logging.getLogger(__name__)

REVOKED = "the vendor has withdrawn your token: ask it for a new one, the job is kept meanwhile"
"""What a customer is told whose token was revoked or replaced."""
_AWAY = {"room": "no room for another stream", "rate": "too many calls a second"}
Sessions = Callable[[str], AbstractContextManager[Handler]]
"""Opens a handler for one stream of the named, authenticated customer; left when it ends."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What a server listens to, and how much of it."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for every network of the machine."""
    port: int = 7443
    """Port to listen at; 0: any free one."""
    max_streams: int = 64
    """Streams open at once."""
    max_streams_per_customer: int = 4
    """Of these, for one customer."""
    max_payload_bytes: int = 67_108_864
    """Tensors of one message."""
    max_buffered_bytes: int = 1_073_741_824
    """Requests that wait or are worked on, of all streams together; one customer may take half of
    what the others have left, or one largest message."""
    stall_timeout_seconds: float = 30.0
    """Time for one frame, once a message has begun, in either direction."""
    idle_timeout_seconds: float = 900.0
    """Time without any request."""
    retry_after_seconds: float = 1.0
    """What those who are refused for lack of room are told to wait."""
    keepalive_seconds: float = 30.0
    """A silent connection is probed this often."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_kinds(self)
        least = min(
            self.max_streams, self.max_streams_per_customer, self.stall_timeout_seconds,
            self.idle_timeout_seconds, self.keepalive_seconds,
        )  # fmt: skip
        if least <= 0 or not 0 <= self.port <= 65535 or not 0 <= self.retry_after_seconds <= 86400:
            raise ConfigError("a server's limits and times must be above 0, its port up to 65535")
        if self.max_buffered_bytes < self.max_payload_bytes:
            raise ConfigError("max_buffered_bytes must have room for one max_payload_bytes")


class Server:
    """Serves customers until it is closed; use it as a context manager.

    Args:
        sessions: opens the handler of a stream; handlers of different streams run at once.
        customers: who may come in.
        credentials: the certificate.
        config: limits of streams and messages.
        guard: limits of connections and rates.
        observer: is told what happens.

    Raises:
        ConfigError: the certificate cannot be used, the address is taken, or the system allows
            fewer connections.
    """

    def __init__(
        self,
        sessions: Sessions,
        customers: Doorkeeper,
        credentials: ServerCredentials,
        *,
        config: ServerConfig | None = None,
        guard: GuardConfig | None = None,
        observer: Observer = ignore,
    ) -> None:
        self.config = config or ServerConfig()
        guard = guard or GuardConfig()
        self.guard = Guard(guard)
        self._sessions = sessions
        self._customers = customers
        self._tell = observer
        self._streams: set[Stream] = set()
        self._lock = threading.Lock()
        self._memory = RequestMemory(self.config.max_buffered_bytes, self.config.max_payload_bytes)
        self._stopping = threading.Event()
        self._grpc = import_grpc()
        self._server, self.port = self._listen(credentials, guard)
        self._server.start()
        threading.Thread(target=self._watch, name="blindtune-watch", daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self, grace_seconds: float = 10.0) -> None:
        """Answer the requests that are worked on, tell all streams to come back, and stop."""
        self._stopping.set()
        busy = Busy(retry_after_seconds=self.config.retry_after_seconds)
        with self._lock:
            for stream in self._streams:
                stream.halt("stopping", busy)
        self._server.stop(grace_seconds).wait()

    def _listen(self, credentials: ServerCredentials, guard: GuardConfig) -> tuple[Any, int]:
        grpc = self._grpc
        key, certificate, roots = credentials.read()
        allow_files(guard.max_connections)
        workers = self.config.max_streams + 8
        server = grpc.server(
            ThreadPoolExecutor(workers, thread_name_prefix="blindtune-serve"),
            maximum_concurrent_rpcs=workers,
            options=[
                *channel_options(self.config.keepalive_seconds),
                *guard.channel_options(),
                ("grpc.max_concurrent_streams", workers),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.so_reuseport", 0),
            ],
        )
        handlers = {
            "Stream": grpc.stream_stream_rpc_method_handler(self._serve),
            # As a stream of requests, so that no thread waits for the one that never comes.
            "Health": grpc.stream_unary_rpc_method_handler(self._tell_health),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        tls = grpc.ssl_server_credentials([(key, certificate)], roots, roots is not None)
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        try:
            return server, server.add_secure_port(f"{host}:{self.config.port}", tls)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen at {host}:{self.config.port}: it is taken, or not this machine's"
            ) from error

    def _serve(self, frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        given = dict(context.invocation_metadata()).get("authorization", "")
        scheme, _, token = str(given).partition(" ")
        customer = self._customers.who(token) if scheme == "Bearer" else None
        if customer is None:
            self._limit_strangers(context)
            self._tell(TurnedAway(reason="token"))
            context.abort(self._grpc.StatusCode.UNAUTHENTICATED, "unknown token")
        assert customer is not None
        if wait := self.guard.calls.take(customer):
            self._turn_away(context, TurnedAway(reason="rate", customer=customer), wait)
        stream = Stream(
            customer, token_hash(token), context.cancel,
            share=Share(self._memory, customer), rates=self.guard.requests, tell=self._tell,
            max_payload_bytes=self.config.max_payload_bytes,
            retry_after_seconds=self.config.retry_after_seconds,
        )  # fmt: skip
        if not self._enter(stream):
            away = TurnedAway(reason="room", customer=customer)
            self._turn_away(context, away, self.config.retry_after_seconds)
        self._tell(StreamOpened(customer=customer))
        try:
            with self._sessions(customer) as handler:
                yield from stream.run(frames, handler)
        except GeneratorExit:
            raise
        except Exception as error:
            stream.halt("failed", None)
            logger.error("a stream of %s ended with %s", customer, type(error).__name__)
            raise
        finally:
            with self._lock:
                self._streams.discard(stream)
            self._tell(stream.ended())

    def _tell_health(self, _requests: Iterator[bytes], context: Any) -> bytes:
        self._limit_strangers(context)
        return msgspec.json.encode(self.health())

    def _limit_strangers(self, context: Any) -> None:
        if wait := self.guard.strangers.take(network_of(context.peer())):
            self._turn_away(context, TurnedAway(reason="rate"), wait)

    def _turn_away(self, context: Any, event: TurnedAway, wait: float) -> NoReturn:
        """End a call that did not begin, by a status: a reply could be left unread for ever."""
        self._tell(event)
        context.set_trailing_metadata(((PUSHBACK, str(ceil(wait * 1000))),))
        context.abort(
            self._grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"{_AWAY[event.reason]}: try again in {wait:.3f} seconds",
        )
        raise AssertionError("abort raises")

    def _enter(self, stream: Stream) -> bool:
        with self._lock:
            counts = Counter(other.customer for other in self._streams)
            room = (
                not self._stopping.is_set()
                and len(self._streams) < self.config.max_streams
                and counts[stream.customer] < self.config.max_streams_per_customer
            )
            if room:
                self._streams.add(stream)
            return room

    def health(self) -> Health:
        """How it is, without anything that is not for everybody."""
        status = "stopping" if self._stopping.is_set() else "serving"
        with self._lock:
            streams = len(self._streams)
        return Health(status=status, version=PROTOCOL_VERSION, streams=streams)

    def _watch(self) -> None:
        stall, idle = self.config.stall_timeout_seconds, self.config.idle_timeout_seconds
        revoked = Refusal(code="policy", message=REVOKED)
        while not self._stopping.wait(min(stall / 4, idle / 4, 1.0)):
            with self._lock:
                streams = list(self._streams)
            for stream in streams:
                if stream.overdue(stall, idle):
                    stream.drop()
                elif not self._customers.admits(stream.customer, stream.token_sha256):
                    stream.halt("revoked", revoked)
