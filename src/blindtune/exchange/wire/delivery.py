"""Each numbered request of a job is applied once, at the vendor's side.

A customer who lost the connection does not know whether its last requests arrived, and sends
them again. The vendor remembers the number of the last one that it applied and its latest
replies: what comes again gets the same reply and changes nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from blindtune.exchange.wire.codec import FrameReader, MessageLimits, encode
from blindtune.exchange.wire.messages import REPLIES, WINDOW, Busy, Message, Numbered, Refusal
from blindtune.exchange.wire.transport import Handler


class Deliveries:
    """The numbers of one job.

    Args:
        applied: the number of the last request whose effect the job's state holds.
        replies: replies to the latest requests, as `remembered` gave them.
    """

    def __init__(self, *, applied: int = 0, replies: Iterable[bytes] = ()) -> None:
        reader = FrameReader(accepts=REPLIES, limits=MessageLimits(max_payload_bytes=2**31 - 1))
        arrived = [found for frame in replies if (found := reader.feed(frame)) is not None]
        self._replies = OrderedDict(arrived)
        self._applied = applied
        self._lease = 0
        self._lock = threading.Lock()

    @property
    def applied(self) -> int:
        """The number of the last request that was applied."""
        return self._applied

    def remembered(self) -> list[bytes]:
        """The latest replies as frames: what a checkpoint stores beside the job's state."""
        with self._lock:
            return [
                frame
                for number, reply in self._replies.items()
                for frame in encode(reply, number % 2**32)
            ]

    def forget(self) -> None:
        """Let go of the remembered replies: these numbers have ended."""
        with self._lock:
            self._replies.clear()

    def take_over(self) -> int:
        """A new stream takes the job; requests of the streams before it are refused from now."""
        with self._lock:
            self._lease += 1
            return self._lease

    def leased_to(self, lease: int) -> bool:
        """Whether no stream has taken the job over since `take_over` gave this lease."""
        with self._lock:
            return lease == self._lease

    def deliver(self, message: Numbered, apply: Handler, *, lease: int) -> Message:
        """Apply a request if it is the next one; give the reply again if it was applied.

        Args:
            message: a numbered request.
            apply: changes the job's state wholly, or raises and leaves it as it was. A Busy or
                Refusal that it returns also means that nothing was applied.
            lease: of the stream that brought it, from `take_over`.
        """
        with self._lock:
            if lease != self._lease:
                return _out_of_order("another stream has taken this job over")
            number = message.sequence
            if number > self._applied + 1:
                return _out_of_order(f"request {number} came, {self._applied + 1} is next")
            if number <= self._applied:
                known = self._replies.get(number)
                return known or _out_of_order(
                    f"request {number} was applied, and its reply is no longer known"
                )
            reply = apply(message)
            if isinstance(reply, Busy | Refusal):
                return reply
            self._applied = number
            self._replies[number] = reply
            while len(self._replies) > WINDOW:
                self._replies.popitem(last=False)
            return reply


def _out_of_order(reason: str) -> Refusal:
    return Refusal(code="out-of-order", message=f"{reason}: resume the job")
