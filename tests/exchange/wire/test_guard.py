"""What strangers can do to a server before it knows them, and customers who call too often."""

import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import pytest
from wire_vendor import TOKENS, CountingVendor, address, batch, connected, opening

from blindtune.errors import ConfigError, PolicyError
from blindtune.exchange.wire import guard
from blindtune.exchange.wire.credentials import VendorTrust
from blindtune.exchange.wire.guard import GuardConfig, Rates, allow_files, network_of
from blindtune.exchange.wire.messages import Checkpoint
from blindtune.exchange.wire.network import Connection, health
from blindtune.exchange.wire.resuming import ResumingTransport, RetryConfig
from blindtune.exchange.wire.transport import BusyError

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from hostile_network import CUSTOMERS, STRANGERS, Target

FAST = RetryConfig(first_delay_seconds=0.01, longest_delay_seconds=0.1, give_up_after_seconds=20)
SHORT = {"handshake_timeout_seconds": 0.5, "connection_idle_seconds": 0.7}


@pytest.fixture
def bob(certificate):
    return VendorTrust(token=TOKENS["bob"], roots=certificate.certificate)


@contextmanager
def hostile(kinds, target):
    """Clients at work; yields what ended of them: kind -> (how, after how many seconds)."""
    stop, ended = threading.Event(), {}

    def work(name, kind):
        begun = time.monotonic()
        how = kind(target, stop)
        ended[name] = (how, time.monotonic() - begun)

    threads = [threading.Thread(target=work, args=item) for item in kinds.items()]
    for thread in threads:
        thread.start()
    try:
        yield ended
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)


def wait_until(what, seconds=10.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


SLOW = ["no handshake", "slow handshake", "silent", "idle", "slow call"]


def test_connections_that_lead_to_nothing_are_closed_beside_a_healthy_one(
    serve, trust, certificate
):
    vendor = CountingVendor()
    server = serve(vendor, guard=SHORT)
    target, numbers = Target(server.port, certificate.certificate), count(1)
    with connected(server, trust) as healthy:
        healthy.call(opening())
        with hostile({name: STRANGERS[name] for name in SLOW}, target) as ended:
            wait_until(lambda: healthy.call(batch(next(numbers))) and len(ended) == len(SLOW))
        healthy.call(batch(last := next(numbers)))
    assert {how for how, _ in ended.values()} <= {"closed", "refused"}
    assert min(seconds for _, seconds in ended.values()) > 0.4
    assert vendor.effects == dict.fromkeys(range(1, last + 1), 1)


@pytest.mark.parametrize("kind", ["no message", "no window, token"])
def test_calls_that_never_end_take_no_thread(serve, trust, bob, certificate, kind):
    server = serve(CountingVendor(), max_streams=16)
    with ExitStack() as stack:
        for _ in range(2):
            target = Target(server.port, certificate.certificate, TOKENS["alice"])
            stack.enter_context(hostile({kind: {**STRANGERS, **CUSTOMERS}[kind]}, target))
        if kind == "no window, token":
            wait_until(lambda: len(server._streams) == 4)
        time.sleep(0.3)
        with connected(server, bob) as healthy:
            assert healthy.call(opening()).job == "job"
            assert healthy.call(batch(1)).sequence == 1


@pytest.mark.parametrize("kind", ["endless headers", "pings", "empty data", "large message",
                                  "garbage", "plain http"])  # fmt: skip
def test_what_is_not_the_protocol_ends_the_connection(serve, certificate, kind):
    server = serve(guard=SHORT)
    with hostile({kind: STRANGERS[kind]}, Target(server.port, certificate.certificate)) as ended:
        wait_until(lambda: ended)
    assert ended[kind][0] in ("closed", "refused")


def test_there_are_no_more_connections_than_allowed(serve, trust, bob, certificate):
    server = serve(guard={"max_connections": 5})
    with connected(server, trust) as healthy:
        healthy.call(opening())
        target = Target(server.port, certificate.certificate)
        kinds = {str(n): STRANGERS["idle"] for n in range(4)}
        with hostile(kinds, target) as ended:
            time.sleep(0.3)
            with target.plain() as further:
                further.settimeout(5)  # it is not the handshake's time that ends it
                assert further.recv(1) == b""
            assert healthy.call(batch(1)).sequence == 1
            assert not ended
        transport = ResumingTransport(
            lambda: Connection(address(server), bob), opening(), program="test", retries=FAST
        )  # there is room again
        transport.close()


def test_an_old_connection_is_closed_and_its_customer_goes_on(serve, trust, monkeypatch):
    monkeypatch.setattr(guard, "AGE_GRACE_MS", 200)
    vendor = CountingVendor()
    server = serve(vendor, guard={"connection_age_seconds": 0.3})
    connections = []

    def connect():
        connections.append(Connection(address(server), trust))
        return connections[-1]

    transport = ResumingTransport(connect, opening(), program="test", retries=FAST)
    number = 0
    end = time.monotonic() + 20
    while len(connections) < 2 and time.monotonic() < end:
        number += 1
        transport.call(batch(number))
        if number % 10 == 0:
            transport.call(Checkpoint(sequence=number))
        time.sleep(0.01)
    transport.close()
    assert len(connections) == 2
    assert vendor.effects == dict.fromkeys(range(1, number + 1), 1)


def test_a_customer_that_calls_too_often_is_told_when_to_come_again(serve, trust, bob):
    server = serve(guard={"max_calls_per_second": 0.4})
    for _ in range(4):  # ten seconds' worth
        with connected(server, trust) as connection:
            connection.call(opening())
    with connected(server, trust) as connection, pytest.raises(BusyError) as caught:
        connection.call(opening())
    assert 1.5 < caught.value.retry_after_seconds <= 2.5
    with connected(server, bob) as other:
        assert other.call(opening()).job == "job"


def test_a_refused_call_is_repeated_when_the_server_said(serve, trust, monkeypatch):
    server = serve()
    waits = [0.0, 0.0, 0.6, 0.0]
    monkeypatch.setattr(server.guard.calls, "take", lambda _customer: waits.pop(0))
    connections = []

    def connect():
        connections.append(Connection(address(server), trust))
        return connections[-1]

    transport = ResumingTransport(connect, opening(), program="test", retries=FAST)
    transport.call(batch(1))
    connections[-1].close()
    transport.call(batch(2))
    connections[-1].close()
    begun = time.monotonic()
    assert transport.call(batch(3)).sequence == 3
    transport.close()
    assert time.monotonic() - begun > 0.6
    assert waits == []


def test_strangers_that_call_too_often_are_refused_before_their_token(serve, trust, certificate):
    server = serve(guard={"max_unknown_calls_per_second": 0.2})
    stranger = VendorTrust(token="wrong-" + "x" * 40, roots=certificate.certificate)

    def knock():
        with connected(server, stranger) as connection:
            connection.call(opening())

    with pytest.raises(PolicyError, match="token"):
        knock()
    assert health(address(server), trust).streams == 0  # is counted too
    with pytest.raises(BusyError):
        knock()
    with pytest.raises(BusyError) as caught:
        health(address(server), trust)
    assert 3 < caught.value.retry_after_seconds <= 5
    with connected(server, trust) as customer:  # of the same address
        assert customer.call(opening()).job == "job"


def test_a_customer_with_too_many_requests_waits_and_loses_nothing(serve, trust, bob):
    vendor = CountingVendor()
    server = serve(vendor, guard={"max_requests_per_second": 2})
    begun = time.monotonic()
    with connected(server, trust) as connection:
        connection.call(opening())
        for number in range(1, 22):
            assert connection.call(batch(number)).sequence == number
    assert time.monotonic() - begun > 0.9
    assert vendor.effects == dict.fromkeys(range(1, 22), 1)


@pytest.mark.parametrize(("text", "seconds"), [
    ("1500", 1.5), ("0", 0.0), ("-5", 1.0), ("x", 1.0), ("9" * 9, 86400.0), ("9" * 99, 1.0),
    ("\u0661", 1.0), (b"5", 1.0), (None, 1.0),
])  # fmt: skip
def test_a_vendor_cannot_name_any_time(text, seconds):
    from blindtune.exchange.wire.network import _pushback_seconds

    assert _pushback_seconds(text) == seconds


def test_rates(monkeypatch):
    now = 100.0
    rates = Rates(2.0, clock=lambda: now)
    assert [rates.take("a") for _ in range(20)] == [0.0] * 20
    assert rates.take("a") == pytest.approx(0.5)
    assert rates.take("b") == 0
    now += 0.25
    assert rates.take("a") == pytest.approx(0.25)
    now += 0.25
    assert rates.take("a") == 0
    assert rates.take("a") > 0
    now += 1000
    assert [rates.take("a") > 0 for _ in range(21)] == [False] * 20 + [True]
    monkeypatch.setattr(guard, "MAX_KEYS", 3)
    for key in "cdefg":
        rates.take(key)
    assert len(rates) == 3


def test_rates_below_one_a_second():
    rates = Rates(0.01, clock=lambda: 0.0)
    assert rates.take("a") == 0
    assert rates.take("a") == pytest.approx(100)


@pytest.mark.parametrize(("peer", "network"), [
    ("ipv4:10.1.2.3:456", "10.1.2.3"), ("ipv6:[2001:db8:1:2:3::4]:5", "2001:db8:1:2::/64"),
    ("ipv6:%5B2001:db8:1:2:9::%5D:5", "2001:db8:1:2::/64"),
    ("ipv6:[::ffff:10.1.2.3]:1", "10.1.2.3"),
    ("ipv6:%5Bfe80::1%25eth0%5D:5", "fe80::/64"), ("unix:/x", "unknown"), ("", "unknown"),
])  # fmt: skip
def test_addresses(peer, network):
    assert network_of(peer) == network


def test_open_files(monkeypatch):
    import resource

    limit, told = [1024, 4096], []
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: tuple(limit))
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, pair: told.append(pair))
    allow_files(700)
    assert told == []
    allow_files(2000)
    assert told == [(2256, 4096)]
    with pytest.raises(ConfigError, match="max_connections 4000, got a limit of 4096"):
        allow_files(4000)
    limit[:] = [resource.RLIM_INFINITY] * 2
    allow_files(10**6)
    assert len(told) == 1


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), 1e9])
def test_limits_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match="expected connection_idle_seconds above 0"):
        GuardConfig(connection_idle_seconds=bad)
