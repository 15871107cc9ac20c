"""Forwards that wait for their gradient: how much a vendor holds of them, while nobody notices."""

import gc
import weakref

import pytest
import torch
from split_world import World
from test_vendor import Stream, opening

from blindtune.errors import ConfigError
from blindtune.exchange.wire.messages import (
    Backward,
    Cancel,
    Checkpoint,
    Forward,
    Predict,
    ResumeJob,
    Step,
    equal,
)
from blindtune.split.customer.requests import new_token
from blindtune.split.terms import TuningConfig, VendorLimits
from blindtune.split.vendor.estimates import estimate_serve
from blindtune.split.vendor.open_forwards import Graphs, OpenForward
from blindtune.split.vendor.service import BottomConfig

DROPOUT = TuningConfig(lora_rank=2, learning_rate=1e-2, lora_dropout=0.3)


def forward(sequence, lengths=(6, 4)):
    drawn = torch.Generator().manual_seed(sequence)
    rows_TD = torch.randn(sum(lengths), 32, generator=drawn)
    return Forward(sequence=sequence, precision="float32", hidden_TD=rows_TD, lengths=lengths)


def backward(sequence, opened, tokens=10):
    drawn = torch.Generator().manual_seed(100 + opened)
    gradient_TD = torch.randn(tokens, 32, generator=drawn)
    return Backward(
        sequence=sequence, forward=opened, precision="float32", gradient_TD=gradient_TD,
        input_gradient=True,
    )  # fmt: skip


def u_shape(folder, **limits):
    folder.mkdir(exist_ok=True)
    return World(folder, partition="u-shape", cut=1, last=1, limits=VendorLimits(**limits))


def begin(world, customer="anna", token=None):
    token = token or new_token()
    wanted = opening(world, token=token, precision="float32", options=DROPOUT.options())
    return Stream(world, customer, wanted)


def test_open_forwards_of_a_job_hold_no_more_tokens_than_a_message(tmp_path):
    stream = begin(u_shape(tmp_path, max_message_tokens=25))
    stream.ask(forward(1))
    stream.ask(forward(2))
    refused = stream.ask(forward(3))
    assert refused.code == "limit"
    assert "20 tokens of this job wait for their gradients" in refused.message
    assert stream.ask(forward(3, (3, 2))).sequence == 3  # what was refused was not applied
    assert stream.ask(Predict(hidden_TD=torch.randn(25, 32), lengths=(13, 12))).sequence is None
    assert stream.ask(backward(4, 1)).sequence == 4
    assert stream.ask(forward(5)).sequence == 5


def test_open_forwards_of_a_customer_are_bounded_over_its_jobs(tmp_path):
    world = u_shape(tmp_path, max_message_tokens=25, max_open_tokens=45)
    streams = [begin(world) for _ in range(3)]
    for stream in streams[:2]:
        assert [stream.ask(forward(number)).sequence for number in (1, 2)] == [1, 2]
    refused = streams[2].ask(forward(1))
    assert refused.code == "limit"
    assert "40 tokens of your jobs" in refused.message
    assert begin(world, "bert").ask(forward(1)).sequence == 1
    assert streams[0].ask(backward(3, 2)).sequence == 3
    assert streams[2].ask(forward(1)).sequence == 1
    assert streams[2].ask(Cancel()).state == "cancelled"
    assert streams[0].ask(forward(4)).sequence == 4


def test_one_customer_cannot_fill_the_memory(tmp_path):
    """Eight jobs, as many forwards as are taken, and never a gradient."""
    world = u_shape(tmp_path, max_message_tokens=40)
    streams = [begin(world, "eve") for _ in range(8)]
    for stream in streams:
        for number in range(1, 9):
            stream.ask(forward(number))
    held = sum(job.lora.open_tokens for job in world.vendor._jobs)
    assert held == 4 * 40
    kept = world.vendor._model._graphs._kept
    assert 0 < sum(opened.padded_tokens for opened in kept) <= 40


def steps(stream, count=2):
    """Some steps of two forwards each; all that the vendor answered."""
    told, number = [], 1
    for _ in range(count):
        told += [stream.ask(m) for m in (
            forward(number), forward(number + 1, (7, 2, 1)), backward(number + 2, number + 1),
            backward(number + 3, number), Step(sequence=number + 4),
        )]  # fmt: skip
        number += 5
    return told


def test_a_graph_that_made_room_is_computed_again_to_the_same_bits(tmp_path):
    world, tight = u_shape(tmp_path / "a"), u_shape(tmp_path / "b")
    expected = steps(begin(world))
    tight.vendor._model._graphs._max_tokens = 1  # one graph at once
    again = steps(begin(tight))
    assert len(again) == 10
    assert all(equal(a, b) for a, b in zip(again, expected, strict=True))


def graphs_alive(world):
    gc.collect()
    return len(world.vendor._model._graphs)


def test_a_stream_that_ends_leaves_no_graph_and_its_job_goes_on(tmp_path):
    calm, world, token = u_shape(tmp_path / "a"), u_shape(tmp_path / "b"), new_token()
    expected = steps(begin(calm), 1)
    stream = begin(world, token=token)
    told = [stream.ask(forward(1)), stream.ask(forward(2, (7, 2, 1)))]
    outputs = [weakref.ref(graph[1]) for graph in world.vendor._model._graphs._kept.values()]
    assert (graphs_alive(world), len(outputs)) == (2, 2)
    stream.session.__exit__(None, None, None)
    assert graphs_alive(world) == 0
    assert [alive() for alive in outputs] == [None, None]
    back = Stream(world, opened=ResumeJob(token=token))
    assert back.opened.applied == 2
    assert equal(back.ask(forward(2, (7, 2, 1))), told[1])  # again: the reply that is remembered
    told += [back.ask(m) for m in (backward(3, 2), backward(4, 1), Step(sequence=5))]
    assert all(equal(a, b) for a, b in zip(told, expected, strict=True))
    assert back.ask(Checkpoint(sequence=5)).sequence == 5


def test_an_older_stream_that_ends_late_changes_nothing(tmp_path):
    calm, world, token = u_shape(tmp_path / "a"), u_shape(tmp_path / "b"), new_token()
    expected = steps(begin(calm), 1)
    old = begin(world, token=token)
    told = [old.ask(forward(1))]
    new = Stream(world, opened=ResumeJob(token=token))
    told.append(new.ask(forward(2, (7, 2, 1))))
    old.session.__exit__(None, None, None)
    assert old.ask(backward(3, 2)).code == "out-of-order"
    told += [new.ask(m) for m in (backward(3, 2), backward(4, 1), Step(sequence=5))]
    assert all(equal(a, b) for a, b in zip(told, expected, strict=True))


def test_going_back_and_cancelling_leave_no_graph(tmp_path):
    world, token = u_shape(tmp_path), new_token()
    begin(world, token=token).ask(forward(1))
    back = Stream(world, opened=ResumeJob(token=token, at=0))
    assert graphs_alive(world) == 0
    assert back.ask(Step(sequence=1)).code == "mismatch"  # nothing was gathered
    back.ask(forward(1))
    assert graphs_alive(world) == 1
    back.ask(Cancel())
    assert graphs_alive(world) == 0


def test_a_gradient_that_is_not_finite_leaves_its_forward_open(tmp_path):
    stream = begin(u_shape(tmp_path))
    stream.ask(forward(1))
    large = torch.full((10, 32), 3e38)
    spoilt = Backward(sequence=2, forward=1, precision="float32", gradient_TD=large)
    assert stream.ask(spoilt).code == "malformed"
    assert stream.ask(backward(2, 1)).sequence == 2
    assert stream.ask(Step(sequence=3)).steps == 1


def test_the_latest_graph_is_kept_whatever_its_size():
    graphs = Graphs(10)
    rows = torch.zeros(4, 2)
    small, padded, large = (OpenForward(rows, lengths) for lengths in ((4,), (7, 1), (20,)))
    for opened, left in ((small, 1), (padded, 1), (large, 1)):
        graphs.keep(opened, (rows, rows))
        assert len(graphs) == left
    assert graphs.take(small) is None
    assert graphs.take(large) is not None
    assert len(graphs) == 0


def test_limits_of_open_forwards_fit_a_message():
    assert VendorLimits(max_message_tokens=100).open_tokens == 400
    assert VendorLimits(max_message_tokens=100, max_open_tokens=100).open_tokens == 100
    with pytest.raises(ConfigError, match="max_open_tokens of at least"):
        VendorLimits(max_message_tokens=100, max_open_tokens=99)


def remembered_bytes(deliveries):
    """Of tensors, as they lie in memory."""
    values = [
        getattr(reply, name)
        for reply in deliveries._replies.values()
        for name in reply.__struct_fields__
    ]
    return sum(v.untyped_storage().nbytes() for v in values if isinstance(v, torch.Tensor))


def test_replies_that_are_remembered_are_bounded_estimated_and_let_go_of(tmp_path):
    world = u_shape(tmp_path, max_message_tokens=10)
    token = new_token()
    stream = begin(world, token=token)
    for number in range(1, 13, 2):
        stream.ask(forward(number))
        assert stream.ask(backward(number + 1, number)).sequence == number + 1
    (job,) = world.vendor._jobs
    before = job.deliveries
    world.model.save_pretrained(tmp_path / "model")
    limits = {"max_message_tokens": 10}
    found, more = (
        estimate_serve(
            tmp_path / "model", 1, BottomConfig(partition="u-shape", last=1),
            VendorLimits(max_jobs=jobs, **limits),
        )
        for jobs in (1, 1_000_001)
    )  # fmt: skip
    bound = found.sizes["replies that a job has remembered, at most"]
    assert remembered_bytes(before) == bound == 8 * 10 * 32 * 4
    each = bound + found.sizes["a job in memory, of the largest rank (64)"] + 10 * 32 * 4
    assert more.memory_bytes - found.memory_bytes == pytest.approx(1e6 * each, rel=0.01)
    later = Stream(world, opened=ResumeJob(token=token, at=0))
    assert remembered_bytes(before) == 0  # the stream before is open still
    later.ask(forward(1))
    assert remembered_bytes(job.deliveries)
    later.ask(Cancel())
    assert remembered_bytes(job.deliveries) == 0
