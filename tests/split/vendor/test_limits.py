"""What the limits of a job count, whatever it goes back to and whoever is killed."""

import pytest
from split_world import World
from test_vendor import Stream, batch, opening

from blindtune.exchange.wire.messages import Checkpoint, ResumeJob, Status, Step
from blindtune.split.customer.requests import new_token
from blindtune.split.terms import VendorLimits
from blindtune.split.vendor.job import tensor_bytes
from blindtune.split.vendor.store import JobStore, Usage

ROUND_BYTES = 5 * 32 * 2 + 16  # states and labels of a batch


def only_job(world):
    (job,) = world.vendor._jobs
    return job


def work(stream, number=1):
    """A batch of five tokens and a step; both replies."""
    return stream.ask(batch(number)), stream.ask(Step(sequence=number + 1))


@pytest.mark.parametrize(
    ("unit", "limit"),
    [
        ("steps", {"max_steps": 4}),
        ("tokens", {"max_job_tokens": 20}),
        ("bytes", {"max_job_bytes": 4 * ROUND_BYTES}),
        ("seconds", {"max_seconds": 400}),
    ],
)
def test_what_was_used_stays_used_whatever_a_job_goes_back_to(tmp_path, unit, limit):
    world, token = World(tmp_path, limits=VendorLimits(**limit)), new_token()
    stream = Stream(world, opened=opening(world, token=token))
    for made in range(4):
        batched, stepped = work(stream)
        assert (batched.sequence, stepped.steps) == (1, 1)
        only_job(world).seconds += 100
        stream = Stream(world, opened=ResumeJob(token=token, at=0))
        assert (stream.opened.applied, stream.opened.steps, stream.opened.tokens) == (0, 0, 0)
        if made % 2:
            world.start()
            stream = Stream(world, opened=ResumeJob(token=token))
            assert stream.opened.applied == 0
    refused = next(reply for reply in work(stream) if getattr(reply, "code", ""))
    assert (refused.code, unit in refused.message) == ("limit", True)


def test_what_the_vendor_lost_itself_is_not_counted_twice(tmp_path):
    world, token = World(tmp_path), new_token()
    stream = Stream(world, opened=opening(world, token=token))
    work(stream)
    stream.ask(Checkpoint(sequence=2))
    work(stream, 3)
    before = only_job(world).used()
    world.start()
    back = Stream(world, opened=ResumeJob(token=token))
    assert (back.opened.applied, back.opened.steps) == (2, 1)
    work(back, 3)
    after = only_job(world).used()
    assert (after.steps, after.tokens, after.bytes) == (before.steps, before.tokens, before.bytes)
    assert only_job(world).record.undone == Usage()


def test_a_job_whose_use_cannot_be_noted_does_not_go_back(tmp_path, monkeypatch):
    world, token = World(tmp_path), new_token()
    stream = Stream(world, opened=opening(world, token=token))
    work(stream)
    used = only_job(world).used()

    def refuse(*_anything):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(JobStore, "write", refuse)
        assert Stream(world, opened=ResumeJob(token=token, at=0)).opened.code == "internal"
    assert only_job(world).used() == used
    assert Stream(world, opened=ResumeJob(token=token)).opened.applied == 2
    back = Stream(world, opened=ResumeJob(token=token, at=0))
    assert (back.opened.applied, only_job(world).used()) == (0, used)


def test_checkpoints_count_as_bytes_of_the_job(tmp_path):
    world, token = World(tmp_path), new_token()
    stream = Stream(world, opened=opening(world, token=token))
    work(stream)
    assert stream.ask(Checkpoint(sequence=2)).sequence == 2
    job = only_job(world)
    counted = job.bytes
    stored = counted - ROUND_BYTES
    kept = world.vendor._jobs.store.states(job.record.name).load(2)
    assert stored == tensor_bytes(kept) > 4 * sum(p.numel() for p in job.lora._parameters.values())
    assert stream.ask(Checkpoint(sequence=2)).sequence == 2  # nothing is stored again
    assert job.bytes == counted
    world.start()
    Stream(world, opened=ResumeJob(token=token))
    assert only_job(world).bytes == counted


def test_checkpoints_end_at_the_limit_and_the_last_one_is_kept(tmp_path):
    world, token = World(tmp_path, limits=VendorLimits(max_job_bytes=200_000)), new_token()
    stream = Stream(world, opened=opening(world, token=token))
    number = 1
    while not hasattr(refused := work(stream, number)[0], "code"):
        assert stream.ask(Checkpoint(sequence=number + 1)).sequence == number + 1
        number += 2
        assert number < 1000
    assert (refused.code, "bytes" in refused.message) == ("limit", True)
    state = stream.ask(Status())
    assert state.durable == state.applied == number - 1
    assert only_job(world).used().bytes > 200_000 > number * ROUND_BYTES
    back = Stream(world, opened=ResumeJob(token=token, at=number - 3))
    assert work(back, number - 2)[0].code == "limit"
