"""How one stream ends: what was answered, what the customer is told, what is counted."""

import threading
import time

import pytest

from blindtune.exchange.wire.codec import HEAD_BYTES, FrameReader, encode
from blindtune.exchange.wire.events import Answered
from blindtune.exchange.wire.guard import Rates
from blindtune.exchange.wire.messages import (
    REPLIES,
    WINDOW,
    Busy,
    Refusal,
    Status,
    Step,
    Stepped,
)
from blindtune.exchange.wire.request_memory import RequestMemory, Share
from blindtune.exchange.wire.stream import Stream

MALFORMED = b"x" * 100
REVOKED = Refusal(code="policy", message="revoked")


class World:
    """A stream whose first request is worked on until `gate` is open."""

    def __init__(self, frames, max_bytes=1 << 20):
        self.memory, self.events = RequestMemory(max_bytes, 1 << 20), []
        self.gate, self.begun = threading.Event(), threading.Event()
        self.frames, self.cancelled = frames, threading.Event()
        self.stream = Stream(
            "alice", "00" * 32, self.cancelled.set, share=Share(self.memory, "alice"),
            rates=Rates(1000.0), tell=self.events.append, max_payload_bytes=1 << 20,
            retry_after_seconds=0.5,
        )  # fmt: skip
        self.replies = []
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        assert self.begun.wait(10)
        while "blindtune-read" in {thread.name for thread in threading.enumerate()}:
            time.sleep(0.001)  # until it has read all that it takes

    def serve(self):
        reader = FrameReader(accepts=REPLIES)
        for frame in self.stream.run(iter(self.frames), self.handle):
            if (found := reader.feed(frame)) is not None:
                self.replies.append(found)

    def handle(self, message):
        self.begun.set()
        assert self.gate.wait(10)
        if isinstance(message, Status):
            return Busy(retry_after_seconds=1)
        return Stepped(sequence=message.sequence, steps=1, gradient_norm=1.0)

    def finish(self):
        """The numbers that were answered, what was said at last, and why it ended."""
        self.gate.set()
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert self.memory.used == 0
        answered = [exchange for exchange, _ in self.replies if exchange]
        assert len([event for event in self.events if isinstance(event, Answered)]) == len(answered)
        last = [reply for exchange, reply in self.replies if exchange == 0]
        assert len(last) <= 1
        ended = self.stream.ended()
        assert ended.requests == len(answered)
        return answered, (last or [None])[0], ended.reason


def steps(count):
    return [frame for n in range(1, count + 1) for frame in encode(Step(sequence=n), n)]


def test_memory_is_counted_as_it_is_held_and_given_back():
    memory = RequestMemory(100, 50)
    share = Share(memory, "alice")
    assert share.reserve(40)
    share.grow(80)  # float32 of what came as int8
    assert memory.used == 120
    assert not Share(memory, "bob").reserve(1)
    share.release()
    assert memory.used == 0
    share.close()
    share.grow(5)
    assert memory.used == 0


def test_nobody_takes_more_than_half_of_what_the_others_left():
    memory = RequestMemory(1000, 100)
    alice = [Share(memory, "alice") for _ in range(4)]
    taken = sum(share.reserve(50) for _ in range(10) for share in alice)
    assert taken * 50 == 500
    bob, carl, dora = (Share(memory, name) for name in ("bob", "carl", "dora"))
    assert [bob.reserve(size) for size in (251, 250, 1)] == [False, True, False]
    assert [carl.reserve(size) for size in (126, 100, 25, 1)] == [False, True, True, False]
    assert dora.reserve(100)  # one largest message, where half of the rest is less
    assert not Share(memory, "emil").reserve(26)  # there is no more
    alice[0].close()
    assert [carl.reserve(size) for size in (26, 25)] == [False, True]


def test_one_largest_message_fits_where_there_is_room_for_one_alone():
    share = Share(RequestMemory(100, 100), "alice")
    assert share.reserve(100)
    share.release()
    assert share.reserve(100)


def test_a_customer_who_ends_it_gets_all_replies():
    assert World(steps(3)).finish() == ([1, 2, 3], None, "customer")


def test_what_came_before_a_refused_frame_is_answered():
    answered, last, reason = World([*steps(3), MALFORMED]).finish()
    assert (answered, last.code, reason) == ([1, 2, 3], "malformed", "malformed")


def test_what_came_before_a_flood_is_answered():
    answered, last, reason = World(steps(50)).finish()
    assert (last.retry_after_seconds, reason) == (0.5, "busy")
    assert answered == list(range(1, len(answered) + 1))
    assert WINDOW <= len(answered) <= WINDOW + 1


def test_no_memory_for_a_request():
    size = len(steps(1)[0]) - HEAD_BYTES
    answered, last, reason = World(steps(5), max_bytes=3 * size).finish()
    assert (answered, last.retry_after_seconds, reason) == ([1, 2, 3], 0.5, "busy")


@pytest.mark.parametrize("more", [[], [MALFORMED]])
def test_what_waits_is_not_answered_after_a_halt(more):
    world = World([*steps(3), *more])
    world.stream.halt("revoked", REVOKED)
    world.stream.halt("stopping", Busy(retry_after_seconds=1))
    answered, last, reason = world.finish()
    assert answered == [1]
    if more:  # said before
        assert (last.code, reason) == ("malformed", "malformed")
    else:
        assert (last.message, reason) == (REVOKED.message, "revoked")


def test_the_stream_ends_after_busy():
    busy = next(encode(Status(), 1))
    assert World([busy, *steps(3)]).finish() == ([1], None, "busy")


def test_a_customer_who_is_dropped_is_told_nothing():
    world = World([*steps(1), MALFORMED])
    world.stream.drop()
    assert world.cancelled.is_set()
    assert world.finish() == ([1], None, "stalled")


def test_when_a_customer_has_stalled():
    world = World(steps(1))
    assert not world.stream.overdue(0.0, 0.0)  # it is the vendor who works
    world.finish()
    assert world.stream.overdue(0.0, 0.0)
    assert not world.stream.overdue(0.0, 10.0)
