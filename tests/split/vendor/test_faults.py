"""Everything that a customer can do wrong, over the network, beside a job that does not notice.

Single refusals are tested where they are made (test_vendor, exchange/test_network); here they all
come at one server, with mutual TLS, while it tunes.
"""

import struct
import threading
import zlib
from datetime import UTC, datetime

import grpc
import msgspec
import pytest
import torch
from split_world import CONFIG
from vendor_world import VendorWorld, metric, page

from blindtune.errors import ConfigError, NetworkError
from blindtune.exchange.wire.codec import HEAD_BYTES, FrameReader, encode
from blindtune.exchange.wire.credentials import make_development_certificate
from blindtune.exchange.wire.messages import (
    REPLIES,
    Batch,
    Busy,
    Hello,
    OpenJob,
    Predict,
    Refusal,
    ResumeJob,
    Status,
    Step,
)
from blindtune.exchange.wire.network import STREAM
from blindtune.split.customer.requests import PassConfig, new_token, predict, train
from blindtune.split.terms import TuningConfig, VendorLimits
from blindtune.split.vendor.door import CertificateConfig

PLAN = PassConfig(epochs=15, batch_size=2, checkpoint_steps=10)
LIMITS = VendorLimits(
    max_message_tokens=120, max_sequence_tokens=40, max_rank=4, max_jobs_per_customer=20
)


class Attacker:
    """A customer with a token, a certificate and bad manners."""

    def __init__(self, world, service, token=None):
        trust = world.trust(service, "eve")
        self.token = trust.token if token is None else token
        root = (world.out / "tls" / "certificate.pem").read_bytes()
        key, chain = world.shown[1].read_bytes(), world.shown[0].read_bytes()
        credentials = grpc.ssl_channel_credentials(root, key, chain)
        self.channel = grpc.secure_channel(
            f"127.0.0.1:{service._server.port}", credentials,
            [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)],
        )  # fmt: skip

    def send(self, frames, seconds=10):
        """A stream of these frames; its replies, read to the end."""
        call = self.channel.stream_stream(STREAM)(
            iter(frames), metadata=(("authorization", f"Bearer {self.token}"),), timeout=seconds
        )
        reader = FrameReader(accepts=REPLIES)
        return [found[1] for frame in call if (found := reader.feed(frame)) is not None]

    def opened(self, world, service, **changes):
        """Frames that open a job."""
        values = {
            "token": new_token(), "partition": "two-part", "cut": 1, "bottom": service.bottom.id,
            "task": "classification", "outputs": 2, "options": CONFIG.options(), **changes,
        }  # fmt: skip
        return [*encode(Hello(program="eve"), 1), *encode(OpenJob(**values), 2)]


def batch(sequence=1, lengths=(3, 2), width=32, labels=(0, 1), **values):
    hidden = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(sequence))
    labels = torch.tensor(labels)
    return Batch(sequence=sequence, hidden_TD=hidden, lengths=lengths, labels=labels, **values)


def changed(frame, header=None, payload=None):
    """A frame with another header or payload, and a right checksum."""
    size = struct.unpack_from("<I", frame, 12)[0]
    old_header, old_payload = frame[HEAD_BYTES:][:size], frame[HEAD_BYTES + size :]
    header = old_header if header is None else msgspec.msgpack.encode(
        header(msgspec.msgpack.decode(old_header)))  # fmt: skip
    payload = old_payload if payload is None else payload(old_payload)
    head = frame[:12] + struct.pack("<I", len(header)) + frame[16:32]
    body = header + payload
    return head + zlib.crc32(body, zlib.crc32(head)).to_bytes(4, "little") + body


def nan(payload):
    return struct.pack("<f", float("nan")) + payload[4:]


REQUESTS = {
    "wide": (batch(width=31), "mismatch"),
    "labels too large": (batch(labels=(0, 2)), "mismatch"),
    "labels negative": (batch(labels=(0, -1)), "mismatch"),
    "labels with a fraction": (batch(labels=(0.0, 1.0)), "mismatch"),
    "long": (batch(lengths=(41,), labels=(1,)), "limit"),
    "many": (batch(lengths=(31,) * 4, labels=(1,) * 4), "limit"),
    "step at once": (Step(sequence=1), "mismatch"),
    "ahead": (batch(7), "out-of-order"),
    "wide to predict": (Predict(hidden_TD=torch.zeros(3, 31), lengths=(3,)), "mismatch"),
    "stolen": (ResumeJob(token=new_token()), "out-of-order"),
}
OPENINGS = {
    "another cut": ({"cut": 2}, "mismatch"),
    "another bottom": ({"bottom": "00" * 32}, "mismatch"),
    "unknown option": ({"options": {"modules_to_save": "lm_head"}}, "policy"),
    "large rank": ({"options": TuningConfig(lora_rank=5).options()}, "limit"),
}


def broken_frames():
    """Frames that are refused, by what is wrong with them, and a word of the reason."""
    (good,) = encode(batch(precision="float32"), 3)
    (hello,) = encode(Hello(program="eve"), 1)
    large = list(encode(batch(lengths=(40,) * 30, width=512, labels=(1,) * 30,
                              precision="float32"), 3))  # fmt: skip
    return {
        "another version": (changed(hello[:4] + b"\x02" + hello[5:]), "version"),
        "unknown field": (changed(hello, header=lambda h: {**h, "debug": 1}), "debug"),
        "missing field": (changed(good, header=lambda h: {k: h[k] for k in h if k != "lengths"}),
                          "lengths"),
        "nan": (changed(good, payload=nan), "NaN"),
        "short": (good[:-8], "checksum"),
        "too large": (large[0], "smaller batches"),
        "no frame": (b"x" * 50, "frame"),
        "a reply": (next(encode(Busy(retry_after_seconds=0), 1)), "not expected"),
    }  # fmt: skip


def attack_with_frames(attacker):
    for name, (frame, word) in broken_frames().items():
        replies = attacker.send([frame])
        assert isinstance(replies[-1], Refusal), name
        assert word in replies[-1].message, (name, replies[-1].message)
    with pytest.raises(grpc.RpcError) as error:
        attacker.send([b"x" * (3 << 20)])
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def attack_with_requests(world, service, attacker):
    for name, (changes, code) in OPENINGS.items():
        assert attacker.send(attacker.opened(world, service, **changes))[-1].code == code, name
    frames = attacker.opened(world, service)
    for number, (message, _) in enumerate(REQUESTS.values(), 3):
        frames += encode(message, number)
    replies = attacker.send(frames[: 2 + 8])[2:]  # no more than a stream may have in its queue
    replies += attacker.send([*frames[:2], *frames[2 + 8 :]])[2:]
    codes = dict(zip(REQUESTS, (reply.code for reply in replies), strict=True))
    assert codes == {name: code for name, (_, code) in REQUESTS.items()}
    assert attacker.send(encode(Hello(program="eve", versions=(2, 3)), 1))[0].code == "malformed"
    assert attacker.send(encode(Status(), 1))[0].code == "out-of-order"


def attack_the_door(world, service, attacker, token, expired):
    for strange in ("", "x" * 43):
        with pytest.raises(grpc.RpcError) as error:
            Attacker(world, service, strange).send([])
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
    thief = attacker.send([*encode(Hello(program="eve"), 1), *encode(ResumeJob(token=token), 2)])
    assert thief[-1].code == "unknown-job"
    good = world.shown
    for shown in (expired, None):
        world.shown = shown
        connection = world.connect(service)
        with pytest.raises(NetworkError):
            connection.call(Status())
        connection.close()
    world.shown = good


def flood(attacker, frames, replies):
    try:
        replies += attacker.send(frames, seconds=30)
    except grpc.RpcError as error:
        replies.append(error.code())


def stalled(attacker, ended):
    """Begin a message and never end it."""
    (hello,) = encode(Hello(program="eve"), 1)
    large = list(encode(batch(lengths=(40,) * 40, width=512, labels=(1,) * 40), 2))

    def frames():
        yield hello
        yield large[0]
        ended.wait(20)

    with pytest.raises(grpc.RpcError) as error:
        attacker.send(frames(), seconds=20)
    assert error.value.code() is grpc.StatusCode.CANCELLED


def vanish(attacker, frames):
    """Ask for much and be gone before a reply comes."""
    call = attacker.channel.stream_stream(STREAM)(
        iter(frames), metadata=(("authorization", f"Bearer {attacker.token}"),)
    )
    next(iter(call))
    call.cancel()


def test_a_healthy_job_notices_nothing(tmp_path):
    world = VendorWorld(tmp_path)
    mine = make_development_certificate(tmp_path / "mine", ["anna"])
    old = make_development_certificate(
        tmp_path / "old", ["anna"], begins=datetime(2020, 1, 1, tzinfo=UTC)
    )
    roots = tmp_path / "roots.pem"
    roots.write_bytes(mine.certificate.read_bytes() + old.certificate.read_bytes())
    world.shown = (mine.certificate, mine.key)
    access = CertificateConfig(self_signed=True, customer_roots=str(roots))
    options = {"stall_timeout_seconds": 1.0, "max_payload_bytes": 2 << 20,
               "max_streams_per_customer": 8}  # fmt: skip
    with world.start(access=access, limits=LIMITS, **options) as service:
        private = world.private()
        calm = world.job(service, "calm")
        expected = train(calm, private, PLAN)
        attacks(world, service, private, expected, (old.certificate, old.key), calm)
        assert service._server.health().status == "serving"
        text = page(service)
        for code in ("mismatch", "limit", "policy", "out-of-order", "unknown-job", "malformed"):
            assert sum(metric(text, "requests_total", answer=code, kind=kind)
                       for kind in kinds_with(text, code)) > 0  # fmt: skip
        assert metric(text, "streams_ended_total", reason="malformed") >= 8
        assert metric(text, "streams_ended_total", reason="stalled") >= 1
        assert metric(text, "turned_away_total", reason="token") >= 1
        assert metric(text, "busy_total") >= 4
        job = world.job(service, "eve")  # who behaves is welcome again
        assert train(job, private, PLAN) == expected
        job.close()
        calm.close()
    with pytest.raises(ConfigError, match="expired"):
        old.read()


def kinds_with(text, code):
    lines = [line for line in text.splitlines() if line.startswith("blindtune_requests_total")]
    found = [line.partition('kind="')[2] for line in lines if f'answer="{code}"' in line]
    return {kind.partition('"')[0] for kind in found}


def attacks(world, service, private, expected, expired, calm):
    """All of them, while a job is tuned; its losses are those of an undisturbed one."""
    token, attacker, ended = new_token(), Attacker(world, service), threading.Event()
    job = world.job(service, token=token)
    floods, threads, failures = [[] for _ in range(4)], [], []

    def background(work, *arguments):
        def guarded():
            try:
                work(*arguments)
            except BaseException as error:
                failures.append(error)

        threads.append(threading.Thread(target=guarded))
        threads[-1].start()

    def begin():
        for replies in floods:
            frames = attacker.opened(world, service)
            rows = Predict(hidden_TD=torch.randn(100, 32), lengths=(20,) * 5)
            frames += [f for n in range(3, 60) for f in encode(rows, n)]
            background(flood, attacker, frames, replies)
        background(stalled, attacker, ended)

    stages = {
        3: begin,
        10: lambda: attack_with_frames(attacker),
        20: lambda: attack_with_requests(world, service, attacker),
        30: lambda: attack_the_door(world, service, attacker, token, expired),
        40: lambda: [vanish(attacker, [*attacker.opened(world, service), *encode(batch(), 3)])
                     for _ in range(5)],
    }  # fmt: skip
    seen = []

    def on_loss(loss):
        seen.append(loss)
        stages.get(len(seen), lambda: None)()  # up to eight requests are on their way meanwhile

    losses = train(job, private, PLAN, on_loss=on_loss)
    for thread in threads:
        thread.join(30)
    ended.set()
    assert not failures, failures
    assert losses == expected
    assert torch.equal(*(predict(j, private, precision="float32") for j in (job, calm)))
    for replies in floods:
        assert isinstance(replies[-1], Busy) or replies[-1] is grpc.StatusCode.CANCELLED, replies
        assert len(replies) < 59
    state = job.call(Status())
    assert (state.steps, state.applied) == (len(expected), 2 * len(expected))
    job.close()
