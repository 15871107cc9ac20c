"""A vendor's service: its directory, its customers, its metrics and its log."""

import json
import logging
import re
import threading
import time

import pytest
import torch
from split_world import CONFIG, LABELS, TEXTS
from vendor_world import PLAN, SELF_SIGNED, VendorWorld, metric, page, write_model

from blindtune.errors import (
    BlindtuneError,
    ConfigError,
    MismatchError,
    OutputError,
    PackageError,
    PolicyError,
)
from blindtune.exchange.wire.credentials import VendorTrust, make_development_certificate
from blindtune.exchange.wire.events import JobOpened, TurnedAway
from blindtune.exchange.wire.messages import (
    Backward,
    Batch,
    Cancel,
    Forward,
    Hello,
    OpenJob,
    ResumeJob,
    Status,
    Step,
)
from blindtune.exchange.wire.network import Connection
from blindtune.exchange.wire.serving import ServerConfig
from blindtune.split.customer.requests import PassConfig, new_token, predict, train
from blindtune.split.terms import VendorLimits
from blindtune.split.vendor.door import CertificateConfig, admit, credentials_of, revoke, told_hosts
from blindtune.split.vendor.endpoint import Endpoint
from blindtune.split.vendor.estimates import estimate_bottom, estimate_serve
from blindtune.split.vendor.event_log import EventLog
from blindtune.split.vendor.service import BottomConfig, bottom, serve

CONTENT = "privateword"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return VendorWorld(tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def service(world):
    with world.start(limits=VendorLimits(max_message_tokens=500)) as running:
        yield running


def lines_of(world):
    return [json.loads(line) for line in world.log.read_text().splitlines()]


def wait_for_end(world, customer, reason):
    """Until the log says why a stream ended: it may be written after the customer's last reply."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        ended = [line for line in lines_of(world) if line["event"] == "stream-ended"]
        if (customer, reason) in {(line["customer"], line["reason"]) for line in ended}:
            return
        time.sleep(0.02)
    pytest.fail(f"no stream of {customer} ended as {reason}: {ended}")


def test_nothing_of_a_job_is_in_metrics_or_log(world, service):
    """One job from end to end, with refusals and failures of every kind on the way."""
    token = new_token()
    job = world.job(service, "secretive", token=token)
    private = world.private()
    losses = train(job, private, PLAN)
    predict(job, private)
    with pytest.raises(BlindtuneError):
        job.call(Batch(sequence=job.call(Status()).applied + 1, hidden_TD=private.states[0][:, :5],
                       lengths=(len(private.states[0]),), labels=LABELS[:1]))  # fmt: skip
    service._server._sessions = Broken
    with pytest.raises(BlindtuneError):
        world.connect(service, "secretive").call(Status())
    service._server._sessions = service._vendor.session
    with pytest.raises(PolicyError):
        Connection(
            service.addresses[0],
            VendorTrust(token="wrong-" + "x" * 40, fingerprint=service.fingerprint),
        ).call(Status())
    job.call(Cancel())
    job.close()
    told = page(service)
    log = world.log.read_text()
    secrets = [token, world.tokens["secretive"], "wrong-", CONTENT, *TEXTS]
    secrets += [str(LABELS.tolist()), json.dumps(LABELS.tolist())]
    numbers = [float(x) for x in [*losses, *private.states[0][0, :5]]]
    secrets += [str(number)[:7] for number in numbers]
    for secret in secrets:
        assert secret not in told + log, secret
    for number in numbers:  # rounded; amid other digits four decimals stand by chance
        assert not re.search(rf"(?<!\d){number:.4f}(?!\d)", told + log), number
    assert "secretive" not in told  # metrics say nothing of a single customer
    events = [line["event"] for line in lines_of(world) if line.get("customer") == "secretive"]
    assert {"stream-opened", "job-opened", "job-saved", "answered", "job-cancelled"} <= {*events}
    refusals = [line for line in lines_of(world) if line["event"] == "answered"]
    assert {"mismatch", "internal"} <= {line["answer"] for line in refusals}
    failed = [line for line in lines_of(world) if line.get("level") == "error"]
    assert any("RuntimeError" in line["message"] for line in failed)


class Broken:
    """A session whose handler fails with content in its message."""

    def __init__(self, _customer):
        pass

    def __enter__(self):
        def fail(_message):
            raise RuntimeError(CONTENT)

        return fail

    def __exit__(self, *_exception):
        pass


def test_metrics_count(world, service):
    before = page(service)
    job = world.job(service)
    private = world.private()
    train(job, private, PLAN)
    predict(job, private, batch_size=5)
    now = page(service)

    def grown(name, **labels):
        try:
            earlier = metric(before, name, **labels)
        except StopIteration:
            earlier = 0
        return metric(now, name, **labels) - earlier

    tokens = sum(map(len, private.states))
    assert grown("steps_total") == 12
    assert grown("tokens_total", kind="batch") == 3 * tokens
    assert grown("tokens_total", kind="predict") == tokens
    assert grown("requests_total", kind="batch", answer="ok") == 12
    assert grown("requests_total", kind="checkpoint", answer="ok") == 6
    assert grown("work_seconds_count", kind="step") == 12
    assert grown("turn_wait_seconds_count") == 26
    assert grown("queue_wait_seconds_count") == 12 + 12 + 6 + 2 + 2
    assert grown("checkpoint_seconds_count") == 6
    assert grown("jobs_total", change="opened") == 1
    assert metric(now, "jobs_open") == metric(before, "jobs_open") + 1
    assert metric(now, "streams") >= 1
    sent = 4 * tokens * 32 * 2  # float16
    assert sent < grown("bytes_total", direction="in") < 2 * sent
    assert grown("bytes_total", direction="out") > 0
    health = json.loads(page(service, "/health"))
    assert health["status"] == "serving"
    assert health["jobs"] == metric(now, "jobs_open")
    with pytest.raises(OSError, match="404"):
        page(service, "/jobs")
    job.call(Cancel())
    assert metric(page(service), "jobs_open") == metric(before, "jobs_open")
    job.close()


def test_customers_come_and_go_while_it_serves(world, service):
    first = world.trust(service, "carl")
    connection = Connection(service.addresses[0], first)
    connection.close()
    world.job(service, "carl").close()
    again = admit("carl", world.out)
    with pytest.raises(PolicyError, match="token"):
        world.job(service, "carl")
    world.tokens["carl"] = again
    world.job(service, "carl").close()
    file = world.out / "customers.json"
    good = file.read_text()
    file.write_text("nonsense")
    with pytest.raises(PolicyError, match="token"):
        world.job(service, "carl")
    file.write_text(good)
    world.job(service, "carl").close()
    assert "not a file of customers" in world.log.read_text()


def test_a_revoked_customer_is_cut_off_while_others_go_on(world, service):
    stream = world.job(service, "carl")
    revoke("carl", world.out)

    def ask_on():
        for _ in range(100):
            stream.call(Status())
            time.sleep(0.05)

    with pytest.raises(PolicyError, match="token"):
        ask_on()
    wait_for_end(world, "carl", "revoked")
    with pytest.raises(ConfigError, match="known are"):
        revoke("nobody", world.out)
    with pytest.raises(ConfigError, match=r"customers\.json"):
        revoke("carl", world.out.parent)


def test_a_running_job_is_told_that_its_token_was_withdrawn(world, service):
    job = world.job(service, "dora", token=(token := new_token()))
    private, seen = world.private(), []

    def on_loss(loss):
        seen.append(loss)
        if len(seen) == 3:
            revoke("dora", world.out)

    plan = PassConfig(epochs=5000, batch_size=1)
    with pytest.raises(PolicyError, match="withdrawn your token"):
        train(job, private, plan, on_loss=on_loss)
    job.close()
    assert 3 <= len(seen) < 50_000
    wait_for_end(world, "dora", "revoked")
    world.tokens.pop("dora")
    again = world.job(service, "dora", token=token)  # admitted anew: the job is the name's
    assert again.job.applied > 0
    again.close()


def test_one_process_serves_from_a_directory(world, service):
    with pytest.raises(ConfigError, match="another process serves"):
        world.start()
    logging.getLogger("blindtune").error("still %s", "logged")
    assert "still logged" in world.log.read_text()


def test_what_was_cut_otherwise_is_not_served(tmp_path):
    world = VendorWorld(tmp_path)
    made = bottom(world.model, world.out / "bottom", 1)
    with world.start() as service:
        assert service.bottom.id == made.id
        token, port = new_token(), service._server.port
        job = world.job(service, token=token)
        job.close()
    with world.start(port=port) as again:
        assert again.fingerprint == service.fingerprint
        assert world.job(again, token=token).job.job == job.job.job
        assert again.open_jobs() == 1
    world.cut = 2
    with pytest.raises(MismatchError, match="with cut 2, it has 1"):
        world.start()
    other = write_model(tmp_path / "other", "roberta")
    with pytest.raises(MismatchError, match="with model"):
        serve(other, world.out, 1, access=SELF_SIGNED)
    weights = world.out / "bottom" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    world.cut = 1
    with pytest.raises(PackageError):
        world.start()
    assert not world.out.joinpath("serve.lock").is_dir()


def test_nothing_stays_open_after_a_failed_start(world, service, tmp_path):
    threads = {thread.name for thread in threading.enumerate()}
    other = VendorWorld(tmp_path)
    with pytest.raises(ConfigError, match="taken"):
        other.start(port=service._server.port)
    assert {thread.name for thread in threading.enumerate()} <= threads
    with other.start():
        pass


def test_tokens(tmp_path):
    out, file = tmp_path / "v", tmp_path / "token"
    token = admit("anna", out, token_file=file)
    assert file.read_text() == token + "\n"
    for path in (file, out / "customers.json"):
        assert path.stat().st_mode & 0o077 == 0
    assert token not in (out / "customers.json").read_text()
    with pytest.raises(OutputError, match="something is there"):
        admit("bert", out, token_file=file)
    with pytest.raises(ConfigError, match="name a customer"):
        admit("a/b", out, token_file=tmp_path / "c")
    assert not (tmp_path / "c").exists()
    known = (out / "customers.json").read_text()
    with pytest.raises(OutputError):
        admit("anna", out, token_file=file / "below-a-file")
    assert (out / "customers.json").read_text() == known  # the token that she has still holds
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="something else"):
        admit("anna", tmp_path / "full")


def test_certificates(tmp_path):
    chain = make_development_certificate(tmp_path, ["vendor.example"])
    files = {"certificate": str(chain.certificate), "key": str(chain.key)}
    with pytest.raises(ConfigError, match="got neither"):
        credentials_of(CertificateConfig(), tmp_path, "127.0.0.1")
    with pytest.raises(ConfigError, match="got neither"):
        serve("nowhere", tmp_path / "made", 1, access=CertificateConfig())
    assert not (tmp_path / "made").exists()
    with pytest.raises(ConfigError, match="self-signed"):
        credentials_of(CertificateConfig(**files), tmp_path, "127.0.0.1")
    for wrong in (
        {"self_signed": True, **files},
        {"certificate": "a"},
        {"certificate_names": ("a",), **files},
    ):
        with pytest.raises(ConfigError):
            CertificateConfig(**wrong)
    here = credentials_of(SELF_SIGNED, tmp_path / "v", "127.0.0.1")
    assert credentials_of(SELF_SIGNED, tmp_path / "v", "0.0.0.0") == here
    named = CertificateConfig(self_signed=True, certificate_names=("vendor.example", "10.0.0.7"))
    with pytest.raises(ConfigError, match=r"does not name 10\.0\.0\.7, vendor\.example: remove"):
        credentials_of(named, tmp_path / "v", "127.0.0.1")
    credentials_of(named, tmp_path / "w", "127.0.0.1")
    from datetime import UTC, datetime

    make_development_certificate(tmp_path / "v" / "tls", begins=datetime(2020, 1, 1, tzinfo=UTC))
    with pytest.raises(ConfigError, match=r"expired.*remove"):
        credentials_of(SELF_SIGNED, tmp_path / "v", "127.0.0.1")
    assert told_hosts("::", 7, ()) == ["https://localhost:7"]
    assert told_hosts("::1", 7, ()) == ["https://[::1]:7"]
    assert told_hosts("0.0.0.0", 7, ("a", "b")) == ["https://a:7", "https://b:7"]


def test_estimates_are_near_what_is_made(tmp_path):
    model = write_model(tmp_path / "model", "smollm2")
    for partition in ("two-part", "u-shape"):
        config = BottomConfig(partition=partition)
        made = bottom(model, tmp_path / partition, 3, config)
        weights = (tmp_path / partition / "weights.safetensors").stat().st_size
        assert estimate_bottom(model, 3, config).written_bytes == pytest.approx(weights, rel=0.1)
        assert made.bytes > weights
    limits = VendorLimits(max_jobs=2, max_message_tokens=10, max_rank=16, max_outputs=2)
    found = estimate_serve(model, 3, limits=limits)
    world = VendorWorld(tmp_path, "smollm2", cut=3)
    config = CONFIG.__class__(lora_rank=16)  # the most that may be asked for
    with world.start(limits=limits) as service:
        world.job(service, config=config).close()
        state = next((world.out / "jobs").rglob("at-*.pt"))
        lora = next(iter(service._vendor._jobs)).lora
        numbers = sum(p.numel() for p in lora._parameters.values())
        assert any(name.startswith("head") for name in lora._parameters)
    on_disk = found.sizes["such a job on the disk, its replies not counted"]
    assert on_disk == 2 * 3 * 4 * numbers
    assert found.sizes["a job in memory, of the largest rank (16)"] == 4 * 4 * numbers
    assert state.stat().st_size > 4 * numbers


def test_the_estimate_counts_forwards_that_wait_for_gradients(tmp_path):
    model = write_model(tmp_path / "model", "smollm2")
    limits = VendorLimits(max_jobs=5, max_message_tokens=10**7)  # nothing else is as large
    plain, u_shape = (
        estimate_serve(model, 2, BottomConfig(partition=partition), limits)
        for partition in ("two-part", "u-shape")
    )
    work = u_shape.sizes["work on 10,000,000 tokens at once"]
    waiting = u_shape.sizes["forwards that wait for gradients, of all jobs"]
    width = 32
    assert waiting == work + 5 * 10**7 * width * 4
    replies = u_shape.sizes["replies that a job has remembered, at most"]
    assert replies == 8 * 10**7 * width * 4
    assert replies == plain.sizes["replies that a job has remembered, at most"]
    assert u_shape.memory_bytes - plain.memory_bytes == pytest.approx(waiting, rel=0.01)
    job, smaller = (
        estimate.sizes["a job in memory, of the largest rank (64)"] for estimate in (plain, u_shape)
    )
    assert job - smaller == 4 * 4 * 1024 * (width + 1)  # the head of as many classes


def test_a_customer_who_vanishes_amid_a_step_leaves_no_graph(tmp_path):
    world, token = VendorWorld(tmp_path), new_token()
    hidden_TD = torch.randn(5, 32)
    forward = Forward(sequence=1, hidden_TD=hidden_TD, lengths=(3, 2))
    with world.start(config=BottomConfig(partition="u-shape")) as service:
        graphs = service._vendor._model._graphs
        gone = world.connect(service)
        gone.call(Hello(program="test"))
        gone.call(OpenJob(
            token=token, partition="u-shape", cut=1, bottom=service.bottom.id, task="hidden",
            outputs=0, options=CONFIG.options(),
        ))  # fmt: skip
        gone.call(forward)
        assert len(graphs) == 1
        gone.close()
        deadline = time.monotonic() + 20
        while len(graphs) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(graphs) == 0
        back = world.connect(service)
        back.call(Hello(program="test"))
        assert back.call(ResumeJob(token=token)).applied == 1
        assert back.call(Backward(sequence=2, forward=1, gradient_TD=hidden_TD)).sequence == 2
        assert back.call(Step(sequence=3)).steps == 1
        back.close()


def test_a_log_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="log file"):
        EventLog(tmp_path / "none" / "log")
    log = EventLog(tmp_path / "log")
    log.close()
    log(JobOpened(customer="a", job="b"))  # nobody is stopped
    assert (tmp_path / "log").read_text() == ""
    with pytest.raises(ConfigError, match="metrics_port"):
        Endpoint("127.0.0.1", 70000, {})
    with pytest.raises(ConfigError, match="port"):
        ServerConfig(port=70000)


def test_a_flood_of_calls_is_counted_and_hardly_logged(world, service):
    def away():
        return sum(line["event"] == "turned-away" and line["reason"] == "rate"
                   for line in lines_of(world))  # fmt: skip

    before = away()
    for _ in range(50):
        service._tell(TurnedAway(reason="rate", customer="flood"))
    assert metric(page(service), "turned_away_total", reason="rate") == 50
    assert 1 <= away() - before <= 2
    service._tell(TurnedAway(reason="token"))  # is no flood: the guard limits it
    assert lines_of(world)[-1]["reason"] == "token"
