"""The seam between the parties: a transport takes requests to a handler and brings replies back.

The vendor is a handler, message -> message. Whether it runs in this process or behind a network
is the transport's affair: both go through the codec, so both parties compute the same numbers.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Literal, Protocol, get_args

from blindtune.errors import (
    BlindtuneError,
    MismatchError,
    NetworkError,
    PolicyError,
    VerificationError,
)
from blindtune.exchange.files import printable
from blindtune.exchange.wire.codec import FrameReader, MessageLimits, encode
from blindtune.exchange.wire.messages import (
    REPLIES,
    REQUESTS,
    Busy,
    Message,
    Refusal,
    RefusalCode,
)

logger = logging.getLogger(__name__)

Handler = Callable[[Message], Message]
"""Answers the requests of one stream, one after the other."""
Direction = Literal["request", "reply"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
Tap = Callable[[Direction, bytes], None]
"""Is shown every frame that crosses, by the customer's end."""


class LostError(NetworkError):
    """The connection ended, or a reply did not come in time; what was sent may have been done."""


class OutOfOrderError(NetworkError):
    """A request came at the wrong place, or another stream has the job now. It was not applied."""


class BusyError(NetworkError):
    """The vendor has no room now. What was asked was not done."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__(
            f"the vendor is busy: try again in {retry_after_seconds:g} seconds, the work is kept"
        )
        self.retry_after_seconds = retry_after_seconds


class Transport(Protocol):
    """Takes requests to the vendor, in order."""

    def submit(self, message: Message) -> Future[Message]:
        """Send a request; the future brings the reply, or the error that it stands for.

        Tensors of the message must not be changed before the reply is there.
        """

    def call(self, message: Message) -> Message:
        """Send a request and wait for its reply."""

    def close(self) -> None:
        """End the stream; open futures fail with LostError."""


_ERRORS: dict[RefusalCode, type[BlindtuneError]] = {
    "malformed": VerificationError,
    "mismatch": MismatchError,
    "policy": PolicyError,
    "limit": PolicyError,
    "unknown-job": PolicyError,
    "out-of-order": OutOfOrderError,
    "internal": NetworkError,
}
_CODES: tuple[tuple[type[BlindtuneError], RefusalCode], ...] = (
    (MismatchError, "mismatch"),
    (VerificationError, "malformed"),
    (PolicyError, "policy"),
)


def settle(future: Future[Message], reply: Message) -> None:
    """Give a reply to the one who waits: as a value, or as the error that it stands for."""
    if isinstance(reply, Busy):
        future.set_exception(BusyError(reply.retry_after_seconds))
    elif isinstance(reply, Refusal):
        text = printable(reply.message, limit=1024)
        future.set_exception(_ERRORS[reply.code](f"the vendor refused ({reply.code}): {text}"))
    else:
        future.set_result(reply)


def answer(handler: Handler, message: Message, exchange: int) -> tuple[Message, Iterator[bytes]]:
    """Ask a handler; its reply, and the reply's frames.

    Whatever it raises becomes a reply that gives nothing of the vendor away. BusyError becomes
    Busy. The messages of VerificationError and PolicyError speak of the request, and are passed
    on; any other exception is logged without its message, which may hold content, and the
    customer only learns that it happened.
    """
    reply: Message
    try:
        reply = handler(message)
        return reply, encode(reply, exchange)
    except BusyError as error:
        reply = Busy(retry_after_seconds=error.retry_after_seconds)
    except (VerificationError, PolicyError) as error:
        code = next(code for type_, code in _CODES if isinstance(error, type_))
        reply = Refusal(code=code, message=printable(str(error), limit=1000))
    except Exception as error:  # the server stays up whatever a request does
        place = "".join(traceback.format_tb(error.__traceback__))
        logger.error("%r failed with %s at\n%s", message, type(error).__name__, place)
        reply = Refusal(code="internal", message="the vendor failed at this request")
    return reply, encode(reply, exchange)


class InProcessTransport:
    """Both parties in one process; frames are made and read as they are on the network.

    Args:
        handler: the vendor's answers.
        tap: is shown every frame.
        limits: of messages in both directions.
    """

    def __init__(
        self, handler: Handler, *, tap: Tap | None = None, limits: MessageLimits | None = None
    ) -> None:
        self._handler = handler
        self._tap = tap
        self._requests = FrameReader(accepts=REQUESTS, limits=limits)
        self._replies = FrameReader(accepts=REPLIES, limits=limits)
        self._lock = threading.Lock()
        self._exchange = 0
        self._closed = False

    def submit(self, message: Message) -> Future[Message]:
        """Answer at once; the future is done when it is returned."""
        future: Future[Message] = Future()
        with self._lock:
            if self._closed:
                raise LostError("this transport was closed: open another one")
            self._exchange += 1
            frames = encode(message, self._exchange)
            request = self._cross("request", self._requests, frames)
            _, frames = answer(self._handler, request, self._exchange)
            reply = self._cross("reply", self._replies, frames)
        settle(future, reply)
        return future

    def call(self, message: Message) -> Message:
        """Answer at once, or raise the error that the reply stands for."""
        return self.submit(message).result()

    def close(self) -> None:
        """Refuse further requests."""
        self._closed = True

    def _cross(self, direction: Direction, reader: FrameReader, frames: Iterator[bytes]) -> Message:
        for frame in frames:
            if self._tap is not None:
                self._tap(direction, frame)
            if (arrived := reader.feed(frame)) is not None:
                return arrived[1]
        raise AssertionError("the last frame completes a message")
