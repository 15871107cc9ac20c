"""What a vendor's server tells of itself: names, counts, sizes and times, and nothing else.

Metrics and logs are made of events alone. No event has a field that content could be put into:
texts are names of customers (given by the vendor), names of jobs (not secrets), or words of this
file and of the protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from blindtune.exchange.wire.messages import Busy, Message, Refusal

StreamEnd = Literal["customer", "busy", "malformed", "stalled", "stopping", "failed", "revoked"]
"""Who or what ended a stream: the customer, lack of room, a frame that was refused, ..."""


@dataclass(frozen=True, kw_only=True)
class TurnedAway:
    """A call that did not begin: its token is unknown, there is no room, or there were too many."""

    reason: Literal["token", "room", "rate"]
    customer: str | None = None


@dataclass(frozen=True, kw_only=True)
class StreamOpened:
    """An authenticated customer's stream begins."""

    customer: str


@dataclass(frozen=True, kw_only=True)
class StreamEnded:
    """It ended."""

    customer: str
    reason: StreamEnd
    requests: int
    """That were answered."""
    bytes_in: int
    bytes_out: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Crossed:
    """A frame came in or went out."""

    direction: Literal["in", "out"]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A request was answered."""

    customer: str
    kind: str
    """Of the request, in lower case."""
    answer: str
    """ok, busy, or the code of the refusal."""
    wait_seconds: float
    """In the queue of its stream."""
    seconds: float
    """Until the reply was made, the wait for a turn at the model included."""


@dataclass(frozen=True, kw_only=True)
class JobOpened:
    """A customer opened a job."""

    customer: str
    job: str


@dataclass(frozen=True, kw_only=True)
class JobSaved:
    """A job's state is durable."""

    customer: str
    job: str
    request: int
    """The last one that it holds."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class JobCancelled:
    """A customer ended a job."""

    customer: str
    job: str


@dataclass(frozen=True, kw_only=True)
class JobClosed:
    """The vendor ended a job: long unasked for, or its checkpoints were lost."""

    customer: str
    job: str


@dataclass(frozen=True, kw_only=True)
class Worked:
    """The model worked for a job."""

    customer: str
    job: str
    kind: str
    """Of the request, in lower case."""
    tokens: int
    wait_seconds: float
    """For its turn."""
    seconds: float


Event = (
    TurnedAway | StreamOpened | StreamEnded | Crossed | Answered | JobOpened | JobSaved
    | JobCancelled | JobClosed | Worked
)  # fmt: skip
Observer = Callable[[Event], None]
"""Is told events, by many threads at once; it must be quick and may not raise."""


def ignore(_event: Event) -> None:
    """The observer that wants to know nothing."""


def kind_of(message: Message) -> str:
    """A message's kind as events name it."""
    return type(message).__name__.lower()


def answer_of(reply: Message) -> str:
    """ok, busy, or the code of the refusal."""
    if isinstance(reply, Refusal):
        return reply.code
    return "busy" if isinstance(reply, Busy) else "ok"
