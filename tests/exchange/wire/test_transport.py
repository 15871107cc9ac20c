import logging
import random
import threading

import pytest
import torch
from wire_vendor import CountingVendor, batch, opening

from blindtune.errors import (
    ConfigError,
    MismatchError,
    NetworkError,
    PolicyError,
    VerificationError,
)
from blindtune.exchange.wire import resuming
from blindtune.exchange.wire.delivery import Deliveries
from blindtune.exchange.wire.messages import (
    WINDOW,
    Checkpoint,
    Hello,
    Predict,
    ResumeJob,
    Status,
    Step,
    equal,
)
from blindtune.exchange.wire.resuming import Backoff, ResumingTransport, RetryConfig
from blindtune.exchange.wire.transport import BusyError, InProcessTransport, LostError

FAST = RetryConfig(first_delay_seconds=0.001, longest_delay_seconds=0.002)


def raising(error):
    def handler(message):
        raise error

    return InProcessTransport(handler)


@pytest.mark.parametrize(
    ("raised", "seen", "text"),
    [
        (PolicyError("too many steps"), PolicyError, "too many steps"),
        (MismatchError("cut 3"), MismatchError, "cut 3"),
        (VerificationError("bad label"), VerificationError, "bad label"),
        (BusyError(2.0), BusyError, "2 seconds"),
        (RuntimeError("a private path"), NetworkError, "internal"),
        (ConfigError("a private path"), NetworkError, "internal"),
    ],
)
def test_errors_cross_as_what_they_are_and_no_more(raised, seen, text, caplog):
    with caplog.at_level(logging.DEBUG), pytest.raises(seen, match=text) as caught:
        raising(raised).call(Status())
    assert "private" not in str(caught.value)
    assert "private" not in caplog.text.replace(__file__, "")


def test_an_answer_that_cannot_be_sent_is_an_internal_error():
    transport = InProcessTransport(lambda message: object())
    with pytest.raises(NetworkError, match="internal"):
        transport.call(Status())


def test_in_process_messages_are_rounded_as_on_the_network():
    vendor = CountingVendor()
    with vendor.session("a") as handler:
        transport = InProcessTransport(handler)
        transport.call(opening())
        sent = batch(1)
        reply = transport.call(sent)
    assert not torch.equal(reply.gradient_TD, sent.hidden_TD * 3)
    assert torch.allclose(reply.gradient_TD, sent.hidden_TD * 3, rtol=2**-9)
    transport.close()
    with pytest.raises(LostError):
        transport.call(Status())


def test_deliveries_apply_once_and_in_order():
    effects = []

    def apply(message):
        effects.append(message.sequence)
        return vendor.apply(message)

    vendor, deliveries = CountingVendor(), Deliveries()
    lease = deliveries.take_over()
    first = deliveries.deliver(batch(1), apply, lease=lease)
    assert deliveries.deliver(batch(1), apply, lease=lease) is first
    assert deliveries.deliver(batch(3), apply, lease=lease).code == "out-of-order"
    for number in range(2, 12):
        deliveries.deliver(Step(sequence=number), apply, lease=lease)
    assert effects == list(range(1, 12))
    assert "no longer known" in deliveries.deliver(batch(1), apply, lease=lease).message
    again = Deliveries(applied=11, replies=deliveries.remembered())
    reply = again.deliver(Step(sequence=11), apply, lease=again.take_over())
    assert equal(reply, deliveries.deliver(Step(sequence=11), apply, lease=lease))
    assert len(effects) == 11
    deliveries.take_over()
    assert "taken" in deliveries.deliver(batch(12), apply, lease=lease).message


def test_what_raises_or_is_busy_was_not_applied():
    deliveries = Deliveries()
    lease = deliveries.take_over()

    def busy(message):
        raise BusyError(1)

    with pytest.raises(BusyError):
        deliveries.deliver(batch(1), busy, lease=lease)
    assert deliveries.applied == 0


class Flaky:
    """Connections that lose requests before, or replies after, they did their work."""

    def __init__(self, vendor, chance, crash_chance=0.0, seed=0):
        self.vendor, self.chance, self.crash_chance = vendor, chance, crash_chance
        self.random = random.Random(seed)
        self.connections = 0

    def connect(self):
        self.connections += 1
        return FlakyConnection(self)


class FlakyConnection:
    def __init__(self, flaky):
        self.flaky = flaky
        self.session = flaky.vendor.session("alice")
        self.inner = InProcessTransport(self.session.__enter__())
        self.dead = False

    def submit(self, message):
        dice = self.flaky.random.random() / max(self.flaky.chance, 1e-9)
        if self.dead or dice < 0.4:
            self.dead = True
            raise LostError("lost on the way out")
        future = self.inner.submit(message)
        if dice < 0.8:
            self.dead = True
            if self.flaky.random.random() < self.flaky.crash_chance:
                self.flaky.vendor.crash()
            raise LostError("lost on the way back")
        if dice < 1.0 and isinstance(message, Hello):
            raise BusyError(0.0)
        return future

    def call(self, message):
        return self.submit(message).result()

    def close(self):
        self.session.__exit__(None, None, None)


def run(connect, opened=lambda: None):
    transport = ResumingTransport(connect, opening(), program="test", retries=FAST)
    opened()
    futures = []
    for number in range(1, 41):
        futures.append(transport.submit(batch(number)))
        if number % 7 == 0:
            futures.append(transport.submit(Checkpoint(sequence=number)))
    replies = [future.result(timeout=20) for future in futures]
    transport.close()
    return replies


@pytest.mark.parametrize("seed", range(6))
def test_lost_connections_and_crashes_train_everything_once(seed):
    calm = run(Flaky(CountingVendor(), 0.0).connect)
    vendor = CountingVendor()
    flaky = Flaky(vendor, 0.0, crash_chance=0.5, seed=seed)

    def trouble():  # from the moment when the job is open
        flaky.chance = 0.3

    replies = run(flaky.connect, trouble)
    assert flaky.connections > 3
    assert vendor.effects == dict.fromkeys(range(1, 41), 1)
    for one, other in zip(calm, replies, strict=True):
        if hasattr(one, "loss"):
            assert equal(one, other)
        else:  # a checkpoint may be made after the crash that followed it
            assert other.sequence >= one.sequence


def test_an_opening_that_comes_late_takes_the_job_for_a_moment_only():
    vendor = CountingVendor()
    transport = ResumingTransport(Flaky(vendor, 0.0).connect, opening(), program="test",
                                  retries=FAST)  # fmt: skip
    assert transport.call(batch(1)).sequence == 1

    def steal():
        with vendor.session("alice") as ghost:
            ghost(opening())

    steal()  # as one of a process that was killed may
    assert transport.call(batch(2)).sequence == 2
    assert vendor.effects == {1: 1, 2: 1}
    steal()  # but nothing of this transport was left unanswered: another customer has the job
    with pytest.raises(NetworkError, match="another stream has taken"):
        transport.call(batch(3))
    transport.close()


def test_a_vendor_that_forgot_more_than_the_journal_has_is_an_error():
    vendor = CountingVendor()
    flaky = Flaky(vendor, 0.0)
    tight = RetryConfig(first_delay_seconds=0.001, longest_delay_seconds=0.002, journal_bytes=200)
    transport = ResumingTransport(flaky.connect, opening(), program="test", retries=tight)
    for number in range(1, 20):
        transport.call(batch(number))
    vendor.crash()
    flaky.chance = 1.2  # loses the next request, then heals
    connect = flaky.connect

    def heal():
        flaky.chance = 0.0
        return connect()

    transport._connect = heal
    with pytest.raises(NetworkError, match="went back to request 0"):
        transport.call(batch(20))
    with pytest.raises(NetworkError, match="went back"):
        transport.call(batch(21))
    transport.close()


def test_pauses_double_until_there_is_a_reply_or_it_is_given_up(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(resuming.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(resuming.random, "uniform", lambda _low, high: high)
    backoff = Backoff(RetryConfig(longest_delay_seconds=3.0, give_up_after_seconds=20.0))
    lost = LostError("gone")
    assert [backoff.pause_seconds(lost) for _ in range(4)] == [0.5, 1.0, 2.0, 3.0]
    assert backoff.pause_seconds(BusyError(5.0)) == 8.0
    clock[0] += 15
    assert backoff.pause_seconds(BusyError(5.0)) is None
    assert backoff.pause_seconds(lost) == 3.0
    clock[0] += 3
    assert backoff.pause_seconds(lost) is None
    backoff.replied()
    assert backoff.pause_seconds(lost) == 0.5


def test_giving_up_takes_as_long_as_said():
    flaky = Flaky(CountingVendor(), 0.0)
    short = RetryConfig(
        first_delay_seconds=0.01, longest_delay_seconds=0.02, give_up_after_seconds=0.1
    )
    transport = ResumingTransport(flaky.connect, opening(), program="test", retries=short)
    flaky.chance = 2.0
    with pytest.raises(NetworkError, match="resume the job when"):
        transport.call(batch(1))
    transport.close()


def test_a_refused_request_does_not_disturb_the_transport():
    vendor = CountingVendor()
    transport = ResumingTransport(Flaky(vendor, 0.0).connect, opening(), program="test")
    bad = Predict(hidden_TD=torch.tensor([[float("nan")]]), lengths=(1,))
    with pytest.raises(VerificationError, match="NaN"):
        transport.call(bad)
    assert transport.call(batch(1)).sequence == 1
    transport.close()
    with pytest.raises(LostError, match="closed"):
        transport.call(batch(2))


def test_an_unknown_job_is_refused_at_once():
    with pytest.raises(PolicyError, match="no such job"):
        ResumingTransport(
            Flaky(CountingVendor(), 0.0).connect, ResumeJob(token="cd" * 32), program="test"
        )


def test_only_a_window_of_requests_is_unanswered():
    gate, vendor = threading.Event(), CountingVendor()
    with vendor.session("a") as handler:

        def slow(message):
            if isinstance(message, Step):
                gate.wait(10)
            return handler(message)

        inner = InProcessTransport(slow)
        transport = ResumingTransport(lambda: inner, opening(), program="test")
        sent = []

        def flood():
            for number in range(1, WINDOW + 4):
                sent.append(transport.submit(Step(sequence=number)))

        thread = threading.Thread(target=flood)
        thread.start()
        thread.join(0.3)
        assert len(sent) == WINDOW
        gate.set()
        thread.join(10)
        assert [future.result(10).sequence for future in sent] == list(range(1, WINDOW + 4))
        transport.close()
