import socket
import ssl
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime

import grpc
import pytest
import torch
from wire_vendor import TOKENS, CountingVendor, address, batch, connected, opening

from blindtune.errors import (
    ConfigError,
    NetworkError,
    PolicyError,
    VerificationError,
)
from blindtune.exchange.wire.codec import FrameReader, encode
from blindtune.exchange.wire.credentials import (
    CustomerFile,
    ServerCredentials,
    VendorTrust,
    add_customer,
    fingerprint,
    make_development_certificate,
    open_customers,
    token_hash,
)
from blindtune.exchange.wire.events import StreamOpened
from blindtune.exchange.wire.messages import (
    REPLIES,
    WINDOW,
    Busy,
    Checkpoint,
    Predict,
    Refusal,
    Step,
    equal,
)
from blindtune.exchange.wire.network import (
    STREAM,
    Connection,
    ConnectionConfig,
    channel_options,
    health,
    parse_address,
)
from blindtune.exchange.wire.resuming import ResumingTransport, RetryConfig
from blindtune.exchange.wire.serving import ServerConfig
from blindtune.exchange.wire.transcript import Recorder
from blindtune.exchange.wire.transport import BusyError, InProcessTransport, LostError

FAST = RetryConfig(first_delay_seconds=0.01, longest_delay_seconds=0.1, give_up_after_seconds=20)


@contextmanager
def raw_stream(server, certificate, frames, token=TOKENS["alice"]):
    """A stranger's stream: any bytes, in frames."""
    credentials = grpc.ssl_channel_credentials(certificate.certificate.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{server.port}", credentials) as channel:
        call = channel.stream_stream(STREAM)(
            frames, metadata=(("authorization", f"Bearer {token}"),), timeout=20
        )
        yield call
        call.cancel()


def sealed(head, body):
    """A frame with a right checksum."""
    return head + zlib.crc32(body, zlib.crc32(head)).to_bytes(4, "little") + body


def last_reply(call):
    reader, found = FrameReader(accepts=REPLIES), None
    for frame in call:
        found = reader.feed(frame) or found
    return found


def test_in_process_and_network_are_equal(serve, trust):
    messages = [opening(), batch(1), batch(2, rows=900, width=1024), Step(sequence=3)]
    messages.append(Predict(hidden_TD=torch.randn(3, 2), lengths=(3,)))
    recorders = Recorder(), Recorder()
    with CountingVendor().session("alice") as handler:
        local = InProcessTransport(handler, tap=recorders[0])
        expected = [local.call(message) for message in messages]
    with connected(serve(), trust, tap=recorders[1]) as connection:
        futures = [connection.submit(message) for message in messages]
        for future, reply in zip(futures, expected, strict=True):
            assert equal(future.result(10), reply)
    wires = [recorder.transcript() for recorder in recorders]
    for direction in ("request", "reply"):
        assert wires[0].wire(direction) == wires[1].wire(direction)


def test_tls_1_3_is_spoken(serve, certificate):
    server = serve()
    context = ssl.create_default_context(cafile=certificate.certificate)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        assert secured.version() == "TLSv1.3"


def test_a_wrong_token_is_refused_and_said_nowhere(serve, certificate, caplog):
    server = serve()
    wrong = "wrong-token-" + "c" * 32
    trust = VendorTrust(token=wrong, roots=certificate.certificate)
    with (
        connected(server, trust) as connection,
        pytest.raises(PolicyError, match="token") as caught,
    ):
        connection.call(opening())
    assert wrong not in str(caught.value) + repr(trust) + caplog.text
    with raw_stream(server, certificate, iter(()), token="") as call:
        with pytest.raises(grpc.RpcError) as error:
            next(call)
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_pinned_certificate_works_and_another_one_does_not(serve, certificate, tmp_path):
    server = serve()
    pin = fingerprint(certificate.certificate.read_bytes())
    colons = ":".join(pin[i : i + 2] for i in range(0, 64, 2)).upper()
    for text in (pin, colons):
        with connected(server, VendorTrust(token=TOKENS["bob"], fingerprint=text)) as connection:
            assert connection.call(opening()).job == "job"
    other = make_development_certificate(tmp_path)
    pin = fingerprint(other.certificate.read_bytes())
    with pytest.raises(VerificationError, match="another certificate"):
        Connection(address(server), VendorTrust(token=TOKENS["bob"], fingerprint=pin))
    trust = VendorTrust(token=TOKENS["bob"], roots=other.certificate)
    with connected(server, trust) as connection, pytest.raises(VerificationError, match="expired"):
        connection.call(opening())
    with pytest.raises(VerificationError):
        health(address(server), trust)
    well_known = VendorTrust(token=TOKENS["bob"])
    with connected(server, well_known) as connection, pytest.raises(VerificationError):
        connection.call(opening())


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_connection_that_breaks_before_the_certificate_may_be_tried_again(answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            side, _ = listener.accept()
            with side:
                side.recv(1 << 16)
                side.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        trust = VendorTrust(token=TOKENS["bob"], fingerprint="00" * 32)
        with pytest.raises(LostError, match=r"TLS 1\.3, or the connection was damaged"):
            Connection(f"https://127.0.0.1:{listener.getsockname()[1]}", trust)
        thread.join()


def test_a_certificate_for_another_host_is_refused(serve, tmp_path):
    credentials = make_development_certificate(tmp_path, ["vendor.example"])
    server = serve(credentials=credentials)
    pin = fingerprint(credentials.certificate.read_bytes())
    trust = VendorTrust(token=TOKENS["bob"], fingerprint=pin)
    with connected(server, trust) as connection, pytest.raises(VerificationError, match="host"):
        connection.call(opening())


def test_an_expired_certificate_is_refused_at_both_ends(serve, tmp_path):
    begins = datetime(2020, 1, 1, tzinfo=UTC)
    old = make_development_certificate(tmp_path, begins=begins, days=1)
    with pytest.raises(ConfigError, match="expired"):
        serve(credentials=old)
    server = grpc.server(ThreadPoolExecutor(2))
    key, chain = old.key.read_bytes(), old.certificate.read_bytes()
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
    server.start()
    for trust in (
        VendorTrust(token=TOKENS["bob"], roots=old.certificate),
        VendorTrust(token=TOKENS["bob"], fingerprint=fingerprint(chain)),
    ):
        connection = Connection(f"127.0.0.1:{port}", trust)
        with pytest.raises(VerificationError, match="expired"):
            connection.call(opening())
        connection.close()
    server.stop(0).wait()


def test_a_server_checks_its_certificate(serve, certificate, tmp_path):
    plain = ServerCredentials(certificate=certificate.certificate, key=certificate.key)
    with pytest.raises(ConfigError, match="self-signed"):
        serve(credentials=plain)
    other = make_development_certificate(tmp_path)
    mixed = ServerCredentials(certificate=certificate.certificate, key=other.key, self_signed=True)
    with pytest.raises(ConfigError, match="cannot be used"):
        serve(credentials=mixed)
    assert certificate.key.stat().st_mode & 0o077 == 0


def test_mutual_tls(serve, certificate, trust, tmp_path):
    mine = make_development_certificate(tmp_path, ["alice"])
    both = ServerCredentials(
        certificate=certificate.certificate, key=certificate.key, self_signed=True,
        customer_roots=mine.certificate,
    )  # fmt: skip
    server = serve(credentials=both)
    shown = VendorTrust(
        token=trust.token, roots=trust.roots, certificate=mine.certificate, key=mine.key
    )
    with connected(server, shown) as connection:
        assert connection.call(opening()).job == "job"
    with connected(server, trust) as connection, pytest.raises(NetworkError):
        connection.call(opening())


def test_a_plain_text_client_gets_nothing(serve):
    server = serve()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.RpcError) as error:
            next(channel.stream_stream(STREAM)(iter([b"x"]), timeout=5))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b"HTTP" not in plain.recv(100)


def test_malformed_streams_end_with_a_reason_beside_a_healthy_one(serve, trust, certificate):
    vendor = CountingVendor()
    server = serve(vendor, max_payload_bytes=1 << 20)
    large = list(encode(batch(1, rows=2000, width=1024), 1))
    step = next(encode(Step(sequence=1), 1))
    attacks = {
        "smaller batches": large[0],
        "bytes where": sealed(step[:32], step[36:-1]),
        "version 9": step[:4] + b"\x09" + step[5:],
        "checksum": step[:-1] + b"\x00",
        "begin as a frame": b"x" * 100,
        "not expected": next(encode(Busy(retry_after_seconds=1), 1)),
    }
    with connected(server, trust) as connection:
        connection.call(opening())
        for number, (reason, frame) in enumerate(attacks.items(), 1):
            with raw_stream(server, certificate, iter([frame])) as call:
                exchange, reply = last_reply(call)
            assert exchange == 0
            assert isinstance(reply, Refusal)
            assert reason in reply.message
            assert connection.call(batch(number)).sequence == number
        with raw_stream(server, certificate, iter([b"x" * (2 << 20)])) as call:
            with pytest.raises(grpc.RpcError) as error:
                next(call)
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert connection.call(batch(7)).sequence == 7
    assert vendor.effects == dict.fromkeys(range(1, 8), 1)


class SlowFor:
    """A vendor whose handler waits for a gate when one customer asks."""

    def __init__(self, customer):
        self.vendors = {name: CountingVendor() for name in TOKENS}
        self.customer, self.gate = customer, threading.Event()

    @contextmanager
    def session(self, customer):
        with self.vendors[customer].session(customer) as handler:

            def handle(message):
                if customer == self.customer and isinstance(message, Step):
                    self.gate.wait(10)
                return handler(message)

            yield handle


def test_a_flood_is_told_to_come_back_while_another_customer_is_served(serve, trust, certificate):
    vendor = SlowFor("bob")
    server = serve(vendor)
    flood = [f for n in range(1, 51) for f in encode(Step(sequence=n), n)]
    frames = iter([*encode(opening(), 99), *flood])
    with raw_stream(server, certificate, frames, token=TOKENS["bob"]) as call:
        with connected(server, trust) as connection:
            connection.call(opening())
            for number in range(1, 21):
                assert connection.call(batch(number)).sequence == number
        vendor.gate.set()
        exchange, reply = last_reply(call)
    assert exchange == 0
    assert isinstance(reply, Busy)
    applied = vendor.vendors["bob"].effects
    assert WINDOW <= len(applied) <= WINDOW + 2
    assert set(applied.values()) == {1}


def test_streams_and_memory_are_bounded(serve, trust):
    server = serve(
        max_streams_per_customer=1, max_payload_bytes=1 << 20, max_buffered_bytes=1 << 20
    )
    with connected(server, trust) as first:
        first.call(opening())
        with connected(server, trust) as second, pytest.raises(BusyError):
            second.call(opening())
        server._memory.taken["bob"] += 1 << 20
        with pytest.raises(BusyError):
            first.call(batch(1))
        server._memory.taken["bob"] -= 1 << 20
    deadline = time.monotonic() + 5
    while health(address(server), trust).streams and time.monotonic() < deadline:
        time.sleep(0.02)
    with connected(server, trust) as third:
        third.call(opening())
        assert third.call(batch(1)).sequence == 1
    assert server._memory.used == 0


def test_four_streams_of_one_customer_leave_memory_for_another(serve, trust, certificate):
    vendor = SlowFor("bob")
    server = serve(vendor, max_payload_bytes=1 << 20, max_buffered_bytes=8 << 20)
    told = []
    server._tell = told.append
    flood = [f for n in range(2, 9) for f in encode(batch(n, rows=200, width=1024), n)]
    frames = [*encode(opening(), 98), *encode(Step(sequence=1), 99), *flood]
    with ExitStack() as streams:
        for _ in range(4):
            call = raw_stream(server, certificate, iter(frames), token=TOKENS["bob"])
            streams.enter_context(call)
        deadline = time.monotonic() + 10
        while len([event for event in told if isinstance(event, StreamOpened)]) < 4 or any(
            stream._ending.reason != "busy" for stream in list(server._streams)
        ):  # until all four have been read as far as there is room
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with connected(server, trust) as connection:
            connection.call(opening())
            for number in range(1, 4):
                large = batch(number, rows=200, width=1024)
                assert connection.call(large).sequence == number
        vendor.gate.set()


@pytest.mark.parametrize("stall", ["within a message", "idle", "reading"])
def test_a_customer_that_stalls_is_dropped(serve, certificate, stall):
    idle = 0.3 if stall == "idle" else 60
    server = serve(stall_timeout_seconds=0.3, idle_timeout_seconds=idle)
    large = list(encode(batch(1, rows=3000, width=1024), 1))
    release = threading.Event()

    def frames():
        if stall == "within a message":
            yield large[0]
        if stall == "reading":  # asks for much, and takes nothing
            yield from encode(opening(), 1)
            yield from encode(batch(1, rows=3000, width=1024), 2)
            yield from encode(batch(2, rows=3000, width=1024), 3)
        release.wait(10)

    begun = time.monotonic()
    with raw_stream(server, certificate, frames()) as call:
        while time.monotonic() - begun < 10:
            if not server._streams and time.monotonic() - begun > 0.25:
                break
            time.sleep(0.02)
        release.set()
        if stall != "reading":
            with pytest.raises(grpc.RpcError) as error:
                list(call)
            assert error.value.code() is grpc.StatusCode.CANCELLED
    assert time.monotonic() - begun < 5
    assert not server._streams
    assert server._memory.used == 0


def test_a_silent_server_is_a_lost_connection(serve, trust):
    vendor = SlowFor("alice")
    config = ConnectionConfig(reply_timeout_seconds=0.3)
    with connected(serve(vendor), trust, config=config) as connection:
        connection.call(opening())
        with pytest.raises(LostError, match="no reply for"):
            connection.call(Step(sequence=1))
    vendor.gate.set()


def test_after_restarts_and_crashes_each_number_was_applied_once(serve, trust):
    vendor = CountingVendor()
    server = serve(vendor)
    port = server.port
    transport = ResumingTransport(
        lambda: Connection(f"https://127.0.0.1:{port}", trust),
        opening(),
        program="test",
        retries=FAST,
    )
    futures = []
    for number in range(1, 61):
        futures.append(transport.submit(batch(number)))
        if number % 10 == 0:
            futures.append(transport.submit(Checkpoint(sequence=number)))
        if number in (25, 45):
            server.close(0 if number == 25 else 5)
            if number == 25:
                vendor.crash()
            server = serve(vendor, port=port)
    replies = [future.result(20) for future in futures]
    transport.close()
    assert vendor.effects == dict.fromkeys(range(1, 61), 1)
    losses = [reply.loss for reply in replies if hasattr(reply, "loss")]
    assert losses == pytest.approx(
        [float(batch(n).hidden_TD.sum()) for n in range(1, 61)], abs=0.01
    )


def test_a_graceful_end_answers_what_is_worked_on(serve, trust):
    vendor = SlowFor("alice")
    server = serve(vendor)
    with connected(server, trust) as connection:
        connection.call(opening())
        future = connection.submit(Step(sequence=1))
        time.sleep(0.2)
        closing = threading.Thread(target=server.close, args=(5,))
        closing.start()
        time.sleep(0.1)
        vendor.gate.set()
        assert future.result(5).sequence == 1
        closing.join(6)
        assert not closing.is_alive()
        with pytest.raises(NetworkError):
            connection.call(Step(sequence=2))


def test_health_and_unreachable(serve, trust):
    server = serve()
    found = health(address(server), trust)
    assert (found.status, found.version, found.streams) == ("serving", 1, 0)
    server.close(0)
    with pytest.raises(LostError):
        health(address(server), trust)
    with connected(server, trust) as connection, pytest.raises(LostError):
        connection.call(opening())
    pinned = VendorTrust(token=TOKENS["bob"], fingerprint="00" * 32)
    with pytest.raises(LostError, match="cannot be reached"):
        Connection(address(server), pinned)


def test_the_default_port_is_the_one_that_customers_call():
    assert ServerConfig().port == parse_address("vendor.example")[1]


def test_a_taken_port_is_said(serve):
    with pytest.raises(ConfigError, match="taken"):
        serve(port=serve().port)


def test_tokens_are_kept_as_hashes_only(tmp_path):
    path = tmp_path / "customers.json"
    token = add_customer(path, "alice")
    other = add_customer(path, "bob")
    customers = open_customers(path)
    assert (customers.who(token), customers.who(other)) == ("alice", "bob")
    assert customers.who("x") is None
    assert token not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="name a customer"):
        add_customer(path, "a/b")
    live = CustomerFile(path)
    digest = token_hash(token)
    assert live.admits("alice", digest)
    assert not live.admits("bob", digest)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="customers"):
        open_customers(path)
    assert live.who(token) is None  # while nobody can say, nobody comes in,
    assert live.admits("alice", digest)  # and nobody is sent away
    path.unlink()
    add_customer(path, "alice")
    assert not live.admits("alice", digest)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("https://a.example:1", ("a.example", 1)),
        ("a.example", ("a.example", 7443)),
        ("https://[::1]:9/", ("::1", 9)),
    ],
)
def test_addresses(text, found):
    assert parse_address(text) == found


@pytest.mark.parametrize(
    "text", ["http://a:1", "https://", "https://u:p@a", "a:x", "https://a/b", "https://a:1?x", ""]
)
def test_bad_addresses(text):
    with pytest.raises(ConfigError, match="address"):
        parse_address(text)


def test_contradictory_trust_is_refused(certificate):
    good = {"token": "t" * 32}
    for bad in (
        {"token": "short"},
        {"token": "t" * 31 + "\n"},
        {**good, "fingerprint": "ab"},
        {**good, "key": certificate.key},
        {**good, "fingerprint": "00" * 32, "roots": certificate.certificate},
    ):
        with pytest.raises(ConfigError):
            VendorTrust(**bad)


def test_frames_fit_grpc_at_both_ends():
    options = dict(channel_options(1.0))
    assert options["grpc.max_receive_message_length"] == 1 << 20
