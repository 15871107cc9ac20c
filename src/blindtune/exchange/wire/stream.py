"""One customer's stream at the vendor: its requests are answered in order until it ends.

    reader's thread  frames -> messages -> queue, where at most eight wait
    call's thread    queue -> handler -> frames of the reply

A None in the queue ends it. The reader puts one behind the last request, when the customer has no
more of them or sent what is refused. `halt` puts one there from any thread, and has the requests
that wait passed over. Either says why, and what the customer is told at last; the first one counts.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

from blindtune.errors import VerificationError
from blindtune.exchange.files import printable
from blindtune.exchange.wire.codec import FrameReader, MessageLimits, encode, held_bytes
from blindtune.exchange.wire.events import (
    Answered,
    Crossed,
    Observer,
    StreamEnd,
    StreamEnded,
    answer_of,
    kind_of,
)
from blindtune.exchange.wire.guard import Rates
from blindtune.exchange.wire.messages import REQUESTS, WINDOW, Busy, Message, Refusal
from blindtune.exchange.wire.request_memory import Share
from blindtune.exchange.wire.transport import BusyError, Handler, answer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """One that waits to be answered."""

    exchange: int
    message: Message
    arrived: float


@dataclass(frozen=True, kw_only=True)
class _Ending:
    """Why a stream ends, and the last message in it, about the stream itself."""

    reason: StreamEnd = "customer"
    last: Message | None = None


@final
class Stream:
    """One stream, from when its customer is known.

    Args:
        customer, token_sha256: who it is, and by which token.
        cancel: ends the call itself.
        share: memory for its requests.
        rates: of requests, by customer.
        tell: is told what happens.
        max_payload_bytes: of one request.
        retry_after_seconds: what the customer is told to wait when there is no room.
    """

    def __init__(
        self,
        customer: str,
        token_sha256: str,
        cancel: Callable[[], object],
        *,
        share: Share,
        rates: Rates,
        tell: Observer,
        max_payload_bytes: int,
        retry_after_seconds: float,
    ) -> None:
        self.customer, self.token_sha256 = customer, token_sha256
        self._cancel, self._share, self._rates, self._tell = cancel, share, rates, tell
        self._retry_after_seconds = retry_after_seconds
        self._reader = FrameReader(
            accepts=REQUESTS,
            limits=MessageLimits(max_payload_bytes=max_payload_bytes),
            admit=self._admit,
        )
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ending = _Ending()
        self._halted = threading.Event()
        self._begun = self._heard = time.monotonic()
        self._working = False
        self._writing_since: float | None = None
        self._requests, self._bytes_in, self._bytes_out = 0, 0, 0
        self._admitted = 0

    def run(self, frames: Iterator[bytes], handler: Handler) -> Iterator[bytes]:
        """The frames of the replies, to the end of the stream."""
        threading.Thread(
            target=self._read, args=(frames,), name="blindtune-read", daemon=True
        ).start()
        try:
            while (request := self._next()) is not None:
                self._working = True
                frames_out = self._answer(handler, request)
                del request  # its memory is given back, while the next one is waited for
                yield from self._write(frames_out)
                del frames_out
                self._heard = time.monotonic()
                self._working = False
            if (last := self._ending.last) is not None:
                yield from self._write(encode(last, 0))
        finally:
            self._share.close()

    def halt(self, reason: StreamEnd, last: Message | None) -> None:
        """End it, from any thread: what is worked on is answered, what waits is not."""
        self._end(reason, last)
        self._halted.set()
        self._queue.put(None)

    def drop(self) -> None:
        """End the call itself, from any thread: the customer has stalled and is told nothing."""
        with self._lock:
            self._ending = _Ending(reason="stalled")
        self._cancel()

    def overdue(self, stall_seconds: float, idle_seconds: float) -> bool:
        """Whether the customer has stalled: within a message, with a reply, or altogether."""
        now, writing_since = time.monotonic(), self._writing_since
        if writing_since is not None:
            return now - writing_since > stall_seconds
        if self._reader.amid:
            return now - self._heard > stall_seconds
        return not self._working and now - self._heard > idle_seconds

    def ended(self) -> StreamEnded:
        """What there was of it."""
        return StreamEnded(
            customer=self.customer,
            reason=self._ending.reason,
            requests=self._requests,
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            seconds=time.monotonic() - self._begun,
        )

    def _end(self, reason: StreamEnd, last: Message | None) -> None:
        """Say why it ends; what was said first counts."""
        with self._lock:
            if self._ending.reason == "customer":
                self._ending = _Ending(reason=reason, last=last)

    def _read(self, frames: Iterator[bytes]) -> None:
        try:
            for frame in frames:
                self._heard = time.monotonic()
                self._bytes_in += len(frame)
                self._tell(Crossed(direction="in", bytes=len(frame)))
                if (arrived := self._reader.feed(frame)) is not None:
                    exchange, message = arrived
                    self._share.grow(max(0, held_bytes(message) - self._admitted))
                    self._queue.put(
                        _Request(exchange=exchange, message=message, arrived=time.monotonic())
                    )
        except BusyError as error:
            self._end("busy", Busy(retry_after_seconds=error.retry_after_seconds))
        except VerificationError as error:
            text = printable(str(error), limit=1000)
            self._end("malformed", Refusal(code="malformed", message=text))
        except Exception as error:  # the customer is gone; gRPC raises what it likes
            logger.debug("a stream of %s ended (%s)", self.customer, type(error).__name__)
        self._queue.put(None)

    def _admit(self, size: int) -> None:
        """Make room for the next request, before its memory is taken."""
        if self._queue.qsize() >= WINDOW or not self._share.reserve(size):
            raise BusyError(self._retry_after_seconds)
        self._admitted = size

    def _next(self) -> _Request | None:
        """The request that is to be answered now; None: the stream ends."""
        request = self._queue.get()
        while request is not None and not self._halted.is_set():
            if not (wait := self._rates.take(self.customer)):
                return request
            self._halted.wait(wait)
        return None

    def _answer(self, handler: Handler, request: _Request) -> Iterator[bytes]:
        """The frames of a reply; the stream ends after a Busy."""
        begin = time.monotonic()
        reply, frames = answer(handler, request.message, request.exchange)
        self._share.release()
        self._requests += 1
        self._tell(Answered(
            customer=self.customer, kind=kind_of(request.message), answer=answer_of(reply),
            wait_seconds=begin - request.arrived, seconds=time.monotonic() - begin,
        ))  # fmt: skip
        if isinstance(reply, Busy):
            self.halt("busy", None)
        return frames

    def _write(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        for frame in frames:
            self._writing_since = time.monotonic()
            self._bytes_out += len(frame)
            self._tell(Crossed(direction="out", bytes=len(frame)))
            yield frame
        self._writing_since = None
