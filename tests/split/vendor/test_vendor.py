"""What a vendor refuses, and that nobody else notices."""

import dataclasses
import os
import threading

import pytest
import torch
from split_world import CONFIG, World

from blindtune.errors import ConfigError, MismatchError, OutputError, PolicyError
from blindtune.exchange.wire.messages import (
    Backward,
    Batch,
    Cancel,
    Checkpoint,
    Forward,
    Hello,
    OpenJob,
    Predict,
    Refusal,
    ResumeJob,
    Status,
    Step,
    equal,
)
from blindtune.exchange.wire.transport import answer
from blindtune.split.customer.requests import PassConfig, new_token, open_job, predict, train
from blindtune.split.partition import Cut, stack_of
from blindtune.split.terms import TuningConfig, VendorLimits, tuning_of
from blindtune.split.vendor.handler import Vendor
from blindtune.split.vendor.housekeeping import Housekeeping
from blindtune.split.vendor.shared_model import SharedModel
from blindtune.split.vendor.store import JobStore
from tiny_models import tiny_model

PLAN = PassConfig(epochs=2, batch_size=3, precision="float32", checkpoint_steps=3)
LIMITS = VendorLimits(
    max_message_tokens=40, max_sequence_tokens=12, max_steps=3, max_job_tokens=100, max_rank=4,
    max_outputs=5, max_jobs=3, max_jobs_per_customer=2,
)  # fmt: skip


def opening(world, **changes):
    values = {
        "token": new_token(), "partition": world.cut.partition, "cut": world.cut.cut,
        "bottom": world.bottom.id, "task": "classification", "outputs": 2,
        "precision": "float32", "options": CONFIG.options(),
    }  # fmt: skip
    if world.cut.partition == "u-shape":
        values |= {"task": "hidden", "outputs": 0}
    return OpenJob(**{**values, **changes})


class Stream:
    """One stream, spoken by hand."""

    def __init__(self, world, customer="anna", opened=None):
        self.session = world.vendor.session(customer)
        self.handler = self.session.__enter__()
        self.ask(Hello(program="test"))
        if opened is not None:
            self.opened = self.ask(opened)

    def ask(self, message):
        return answer(self.handler, message, 1)[0]


def batch(sequence=1, lengths=(3, 2), width=32, labels=None, **values):
    hidden = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(sequence))
    labels = torch.arange(len(lengths)) % 2 if labels is None else labels
    return Batch(sequence=sequence, hidden_TD=hidden, lengths=lengths, labels=labels, **values)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path, limits=LIMITS)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"cut": 2}, "mismatch"),
        ({"bottom": "00" * 32}, "mismatch"),
        ({"partition": "u-shape"}, "mismatch"),
        ({"task": "hidden", "outputs": 0}, "mismatch"),
        ({"outputs": 0}, "mismatch"),
        ({"outputs": 1}, "mismatch"),
        ({"outputs": 6}, "limit"),
        ({"options": {"lora_rank": 5}}, "limit"),
        ({"options": {"lora_rank": 0}}, "policy"),
        ({"options": {"lora_rank": "many"}}, "policy"),
        ({"options": {"learning_rate": float("nan")}}, "policy"),
        ({"options": {"learning_rate": -1.0}}, "policy"),
        ({"options": {"weight_decay": float("nan")}}, "policy"),
        ({"options": {"max_grad_norm": float("nan")}}, "policy"),
        ({"options": {"lora_alpha": float("inf")}}, "policy"),
        ({"options": {"schedule": "linear"}}, "policy"),
        ({"options": {"pooling": "max"}}, "policy"),
        ({"options": {"modules_to_save": "lm_head"}}, "policy"),
    ],
)  # fmt: skip
def test_jobs_that_cannot_be_had(world, changes, code):
    refused = Stream(world, opened=opening(world, **changes)).opened
    assert isinstance(refused, Refusal)
    assert refused.code == code
    assert not world.vendor._jobs.store.records()


HOSTILE = {
    "wide": (batch(width=31), "mismatch"),
    "label too large": (batch(labels=torch.tensor([0, 2])), "mismatch"),
    "label negative": (batch(labels=torch.tensor([0, -1])), "mismatch"),
    "label a float": (batch(labels=torch.tensor([0.0, 1.0])), "mismatch"),
    "long": (batch(lengths=(21,)), "limit"),
    "many": (batch(lengths=(20,) * 7), "limit"),
    "mostly padding": (batch(lengths=(20,) + (1,) * 13), "limit"),
    "far ahead": (batch(sequence=5), "out-of-order"),
    "forward": (Forward(sequence=1, hidden_TD=torch.zeros(3, 32), lengths=(3,)), "mismatch"),
    "backward": (Backward(sequence=2, forward=1, gradient_TD=torch.zeros(3, 32)), "out-of-order"),
    "step at once": (Step(sequence=1), "mismatch"),
    "checkpoint ahead": (Checkpoint(sequence=9), "out-of-order"),
    "overflow": (
        Batch(sequence=1, hidden_TD=torch.full((2, 32), 3e38), lengths=(2,),
              labels=torch.tensor([1])),
        "malformed",
    ),
    "wide to predict": (Predict(hidden_TD=torch.zeros(3, 31), lengths=(3,)), "mismatch"),
    "long to predict": (Predict(hidden_TD=torch.zeros(21, 32), lengths=(21,)), "limit"),
    "a reply": (Hello(program="test", versions=(2,)), "malformed"),
    "another job": (ResumeJob(token=new_token()), "out-of-order"),
}  # fmt: skip


def test_hostile_requests_are_refused_while_another_job_goes_on(tmp_path):
    (tmp_path / "calm").mkdir()
    calm = World(tmp_path / "calm")
    calm_job = calm.job()
    expected = train(calm_job, calm.private(), PLAN)
    limits = VendorLimits(max_message_tokens=120, max_sequence_tokens=20)
    world = World(tmp_path, limits=limits)
    bad = Stream(world, "eve", opening(world))
    private, codes = world.private(), {}

    def attack(_loss):
        for name, (message, _) in HOSTILE.items():
            codes[name] = bad.ask(message).code
        spoilt = batch()
        spoilt.hidden_TD[0, 0] = torch.nan
        codes["nan"] = bad.ask(spoilt).code

    job = world.job()
    assert train(job, private, PLAN, on_loss=attack) == expected
    assert codes == {**{name: code for name, (_, code) in HOSTILE.items()}, "nan": "malformed"}
    logits = (predict(j, private, precision="float32") for j in (job, calm_job))
    assert torch.equal(*logits)
    state = bad.ask(Status())
    assert (state.applied, state.steps, state.tokens) == (0, 0, 0)
    assert bad.ask(batch()).loss > 0  # what was refused left the job usable


@pytest.mark.parametrize(("name", "asked", "longest"), [
    ("bloom", None, 2048), ("bloom", 8192, 8192), ("smollm2", None, 128), ("smollm2", 8192, 128),
    ("smollm2", 20, 20),
])  # fmt: skip
def test_a_sequence_is_as_long_as_the_model_and_the_vendor_allow(name, asked, longest):
    stack = stack_of(tiny_model(name))
    limits = VendorLimits(max_sequence_tokens=asked)
    shared = SharedModel(stack, Cut(layers=stack.layer_count, cut=1), limits, lambda *_: None)
    assert shared._longest == longest


def test_limits_of_a_job(world):
    stream = Stream(world, opened=opening(world))
    for number in (1, 3, 5):
        assert stream.ask(batch(number)).sequence == number
        assert stream.ask(Step(sequence=number + 1)).steps == (number + 1) // 2
    stream.ask(batch(7))
    assert stream.ask(Step(sequence=8)).code == "limit"
    stream.ask(batch(8, lengths=(12, 12, 12)))
    stream.ask(batch(9, lengths=(12, 12, 12)))
    assert "100 tokens" in stream.ask(batch(10, lengths=(12,))).message
    assert Stream(world, opened=opening(world)).opened.state == "open"
    assert Stream(world, opened=opening(world)).opened.code == "limit"
    assert Stream(world, "bert", opened=opening(world)).opened.state == "open"
    assert Stream(world, "carl", opened=opening(world)).opened.code == "limit"
    next(iter(world.vendor._jobs)).seconds = 1e9
    assert "seconds" in stream.ask(batch(10, lengths=(1, 1))).message


def test_a_checkpoint_whose_reply_was_lost_is_asked_for_again_amid_the_next_step(world):
    token = new_token()
    stream = Stream(world, opened=opening(world, token=token))
    stream.ask(batch(1))
    stream.ask(Step(sequence=2))
    assert stream.ask(Checkpoint(sequence=2)).sequence == 2
    stream.ask(batch(3))  # sent ahead; then the connection is lost
    back = Stream(world, opened=ResumeJob(token=token))
    assert (back.opened.applied, back.opened.durable) == (3, 2)
    assert stream.ask(Checkpoint(sequence=2)).code == "out-of-order"  # late, on the old stream
    assert back.ask(Checkpoint(sequence=2)).sequence == 2
    assert back.ask(Checkpoint(sequence=3)).code == "mismatch"
    assert back.ask(Step(sequence=4)).steps == 2


def test_bytes_of_a_job_are_those_of_its_tensors_on_the_wire(tmp_path):
    told = []
    world = World(tmp_path, limits=VendorLimits(max_job_bytes=1400))
    token = new_token()
    job = world.job(token=token, precision="float16", tap=lambda _to, frame: told.append(frame))
    kept = next(iter(world.vendor._jobs))
    job.call(batch(1, precision="float16"))
    assert kept.bytes == 5 * 32 * 2 + 2 * 8  # states and labels; no gradient was asked for
    job.call(Step(sequence=2))
    job.call(batch(3, precision="float32", input_gradient=True))  # and back in the job's float16
    assert kept.bytes == 336 + 5 * 32 * (4 + 2) + 16
    assert kept.bytes == sum(int.from_bytes(frame[16:24], "little") for frame in told)
    job.call(Step(sequence=4))
    job.call(Checkpoint(sequence=4))
    with pytest.raises(PolicyError, match="1400 bytes"):
        job.call(batch(5))
    job.close()
    world.start()  # it forgets nothing
    again = world.job(token=token, precision="float16")
    with pytest.raises(PolicyError, match="1400 bytes"):
        again.call(Predict(hidden_TD=torch.zeros(3, 32), lengths=(3,)))
    again.close()


def test_a_checkpoint_that_cannot_be_read_is_said_to_be_the_vendors(tmp_path):
    world = World(tmp_path)
    token = new_token()
    Stream(world, opened=opening(world, token=token)).ask(batch(1))
    world.start()
    (state,) = (tmp_path / "vendor").rglob("at-*.pt")
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    refused = Stream(world, opened=ResumeJob(token=token)).opened
    assert (refused.code, "ask the vendor" in refused.message) == ("policy", True)
    state.write_bytes(whole)
    assert Stream(world, opened=ResumeJob(token=token)).opened.state == "open"


def test_a_record_that_cannot_be_read_keeps_no_other_job_from_its_customer(tmp_path, caplog):
    world = World(tmp_path)
    token, other = new_token(), new_token()
    for one in (token, other):
        Stream(world, opened=opening(world, token=one))
    broken, _ = sorted((tmp_path / "vendor").rglob("job.json"))
    broken.write_bytes(broken.read_bytes()[:20])
    world.start()
    assert broken.parent.name in caplog.text
    files = sorted(broken.parent.iterdir())
    for ask in (lambda t: ResumeJob(token=t), lambda t: opening(world, token=t)):
        found = {getattr(Stream(world, opened=ask(t)).opened, "code", "") for t in (token, other)}
        assert found == {"", "policy"}
    assert sorted(broken.parent.iterdir()) == files


def test_housekeeping_goes_on_after_a_failure(caplog):
    calls, seen = [], threading.Event()

    def work():
        calls.append(None)
        if len(calls) == 1:
            raise RuntimeError("content")
        seen.set()

    keeping = Housekeeping(work, pause_seconds=0.001)
    assert seen.wait(10)
    keeping.close()
    assert "RuntimeError" in caplog.text
    assert "content" not in caplog.text


@pytest.mark.parametrize("before", [False, True])
def test_jobs_on_the_disk_are_for_the_vendors_eyes_only(tmp_path, before):
    jobs, open_to_all = tmp_path / "vendor" / "jobs", os.umask(0)
    try:
        if before:
            jobs.mkdir(mode=0o755, parents=True)
        stream = Stream(world := World(tmp_path), opened=opening(world))
        stream.ask(batch(1))
        stream.ask(Step(sequence=2))
        assert stream.ask(Checkpoint(sequence=2)).sequence == 2
    finally:
        os.umask(open_to_all)
    assert jobs.stat().st_mode & 0o777 == 0o700
    files = {path for path in jobs.rglob("*") if path.is_file()}
    assert {path.name for path in files} == {"job.json", "at-0.pt", "at-2.pt"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_a_job_is_its_customers_alone(world):
    mine = opening(world)
    stream = Stream(world, "anna", mine)
    for thief in (opening(world, token=mine.token), ResumeJob(token=mine.token)):
        assert Stream(world, "eve", thief).opened.code == "unknown-job"
    assert Stream(world, "anna", ResumeJob(token=new_token())).opened.code == "unknown-job"
    assert equal(Stream(world, "anna", mine).opened, stream.opened)
    other = opening(world, token=mine.token, options={"lora_rank": 1})
    assert Stream(world, "anna", other).opened.code == "mismatch"


def test_streams_in_wrong_order(world):
    session = world.vendor.session("anna")
    handler = session.__enter__()
    assert answer(handler, opening(world), 1)[0].code == "out-of-order"
    stream = Stream(world)
    assert stream.ask(Status()).code == "out-of-order"
    first = Stream(world, opened=opening(world))
    token = new_token()
    old = Stream(world, opened=opening(world, token=token))
    old.ask(batch(1))
    assert first.ask(batch(1)).sequence == 1
    new = Stream(world, opened=ResumeJob(token=token))
    assert new.opened.applied == 1
    assert old.ask(batch(2)).code == "out-of-order"
    assert new.ask(batch(1)).sequence == 1
    assert new.ask(batch(2)).sequence == 2


def test_cancelling_the_job_that_the_model_worked_for_last_beside_another(tmp_path):
    """Warnings are errors here: PEFT warns where it has to choose another adapter."""
    world = World(tmp_path)
    other, last = (Stream(world, opened=opening(world)) for _ in range(2))
    expected = Stream(world, "bert", opening(world)).ask(batch(1)).loss
    last.ask(batch(1))
    assert last.ask(Cancel()).state == "cancelled"
    assert other.ask(batch(1)).loss == expected


def test_two_jobs_at_once_do_not_disturb_each_other(tmp_path):
    (tmp_path / "calm").mkdir()
    configs = [CONFIG, TuningConfig(lora_rank=4, learning_rate=3e-3, lora_targets="attention",
                                    lora_dropout=0.2, seed=8)]  # fmt: skip
    calm = World(tmp_path / "calm")
    alone = [train(calm.job(config), calm.private(), PLAN) for config in configs]
    world = World(tmp_path)
    private, found = world.private(), [None, None]

    def work(i):
        found[i] = train(world.job(configs[i]), private, PLAN)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_u_shape_requests_out_of_place(tmp_path):
    limits = VendorLimits(max_message_tokens=11)
    world = World(tmp_path, partition="u-shape", cut=1, last=1, limits=limits)
    stream = Stream(world, opened=opening(world))
    rows = torch.randn(3, 32)
    assert stream.ask(batch(1)).code == "mismatch"
    assert stream.ask(Forward(sequence=1, hidden_TD=rows, lengths=(3,))).hidden_TD.shape == (3, 32)
    assert stream.ask(Step(sequence=2)).code == "mismatch"
    assert stream.ask(Checkpoint(sequence=1)).code == "mismatch"
    wrong = Backward(sequence=2, forward=1, gradient_TD=torch.zeros(2, 32))
    assert stream.ask(wrong).code == "mismatch"
    right = Backward(sequence=2, forward=1, gradient_TD=rows, input_gradient=True)
    assert stream.ask(right).gradient_TD.shape == (3, 32)
    again = Backward(sequence=3, forward=1, gradient_TD=rows)
    assert stream.ask(again).code == "mismatch"
    assert stream.ask(Step(sequence=3)).steps == 1
    for number in (4, 5, 6):
        stream.ask(Forward(sequence=number, hidden_TD=rows, lengths=(3,)))
    refused = stream.ask(Forward(sequence=7, hidden_TD=rows, lengths=(3,)))
    assert (refused.code, "9 tokens of this job" in refused.message) == ("limit", True)
    assert stream.ask(Predict(hidden_TD=rows, lengths=(3,))).sequence is None


def test_going_back_to_a_checkpoint(tmp_path):
    world, token = World(tmp_path), new_token()
    stream = Stream(world, opened=opening(world, token=token))
    seen = {}
    for number in (1, 3, 5):
        seen[number] = stream.ask(batch(number)).loss
        stream.ask(Step(sequence=number + 1))
        assert stream.ask(Checkpoint(sequence=number + 1)).sequence == number + 1
    assert Stream(world, opened=ResumeJob(token=token, at=2)).opened.code == "mismatch"
    back = Stream(world, opened=ResumeJob(token=token, at=4))
    assert (back.opened.applied, back.opened.durable, back.opened.steps) == (4, 4, 2)
    assert stream.ask(batch(5)).code == "out-of-order"
    assert back.ask(batch(5)).loss == seen[5]
    world.start()
    assert Stream(world, opened=ResumeJob(token=token)).opened.applied == 4


def test_regression(tmp_path):
    world = World(tmp_path)
    stream = Stream(world, opened=opening(world, task="regression", outputs=2))
    good = batch(1, labels=torch.randn(2, 2))
    assert stream.ask(good).metrics == {}
    assert stream.ask(batch(2, labels=torch.tensor([0, 1]))).code == "mismatch"
    assert stream.ask(batch(2, labels=torch.randn(2))).code == "mismatch"
    rows = stream.ask(batch(2, labels=torch.randn(2, 2), input_gradient=True))
    assert rows.gradient_TD.shape == (5, 32)


def test_a_vendor_refuses_what_does_not_belong(tmp_path, world):
    stack = stack_of(world.model)
    with pytest.raises(ConfigError, match="3 layers"):
        Vendor(stack, Cut(layers=4, cut=1), world.bottom.id, tmp_path / "v")
    with pytest.raises(OutputError, match="another model"):
        JobStore(tmp_path / "vendor", "00" * 32)
    Stream(world, opened=opening(world))
    with pytest.raises(ConfigError, match="has some"):
        Vendor(world.vendor._model.served.stack, world.cut, world.bottom.id, tmp_path / "v")
    with pytest.raises(ConfigError):
        VendorLimits(max_steps=0)
    assert tuning_of(CONFIG.options()) == CONFIG
    with pytest.raises(PolicyError):
        world.job(TuningConfig(lora_rank=5))
    stranger = dataclasses.replace(world.bottom, id="00" * 32)
    with pytest.raises(MismatchError, match="ask for its bottom"):
        open_job(world.connect, stranger, new_token(), CONFIG, task="classification", outputs=2)
