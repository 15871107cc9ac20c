"""The plan's numbers, by which a job is sent, gone on with, and its losses are noted."""

import pytest
import torch
from split_world import TEXTS, World

from blindtune.errors import DataError
from blindtune.exchange.wire.messages import Batch, Checkpoint, Forward, Numbered, Step
from blindtune.exchange.wire.transcript import Recorder
from blindtune.split.customer.requests import PassConfig, train
from blindtune.split.customer.ushape import Top, train_u_shape
from blindtune.split.numbered_states import NumberedStates

PLAN = PassConfig(epochs=2, batch_size=3, accumulate=3, precision="float32", checkpoint_steps=3)
"""Ten texts: four batches an epoch, three of them and one in its two steps."""


@pytest.mark.parametrize(("partition", "each"), [("two-part", 1), ("u-shape", 2)])
def test_numbers_of_a_plan(partition, each):
    batches = list(PLAN.numbered(len(TEXTS), partition))
    assert [b.texts for b in batches] == [
        texts for step in PLAN.steps(len(TEXTS)) for texts in step
    ]
    assert [batch.step for batch in batches] == [1, 1, 1, 2, 3, 3, 3, 4]
    assert [batch.step_texts for batch in batches] == [9, 9, 9, 1] * 2
    assert [batch.ends_step for batch in batches] == [False, False, True, True] * 2
    assert [batch.checkpoint for batch in batches] == [False] * 4 + [True] * 4
    steps = [0, 0, 0, 1, 2, 2, 2, 3]
    assert [batch.number for batch in batches] == [
        each * (i + 1) + before for i, before in enumerate(steps)
    ]


@pytest.mark.parametrize("partition", ["two-part", "u-shape"])
def test_what_is_sent_has_these_numbers(tmp_path, partition):
    world, seen = World(tmp_path, "bert", partition, cut=1), Recorder()
    job = world.job(tap=seen)
    if partition == "two-part":
        losses = train(job, world.private(), PLAN)
    else:
        top = Top(world.bottom, None)
        top.loss = lambda trunk_BLD, *_, **_options: trunk_BLD.square().mean()
        losses = train_u_shape(job, top, world.private(), PLAN, language_model=False)
    sent = [crossing.message for crossing in seen.transcript().crossings()]
    numbers = [m.sequence for m in sent if isinstance(m, Numbered)]
    batches = list(PLAN.numbered(len(TEXTS), partition))
    assert len(losses) == len(batches)
    assert numbers == list(range(1, batches[-1].number + 2))
    assert [m.sequence for m in sent if isinstance(m, Step)] == [
        batch.number + 1 for batch in batches if batch.ends_step
    ]
    assert [m.sequence for m in sent if isinstance(m, Checkpoint)] == [
        batch.number + 1 for batch in batches if batch.ends_step and batch.checkpoint
    ]
    rows = [len(m.lengths) for m in sent if isinstance(m, Batch | Forward)]
    assert rows == [len(batch.texts) for batch in batches]
    job.close()


@pytest.mark.parametrize(("applied", "resume_at"), [(2, 0), (6, 0), (8, 7), (99, 20)])
def test_the_u_shape_goes_on_at_the_end_of_a_step(tmp_path, applied, resume_at):
    world = World(tmp_path, "bert", "u-shape", cut=1)
    job = world.job()
    with pytest.raises(DataError, match=f"request {applied} .* resume at {resume_at}$"):
        train_u_shape(
            job, Top(world.bottom, None), world.private(), PLAN, language_model=True,
            applied=applied,
        )  # fmt: skip
    assert job.job.applied == 0
    job.close()


def test_states_by_number(tmp_path):
    states, others = NumberedStates(tmp_path, "at"), NumberedStates(tmp_path, "top")
    others.save(7, {})
    (tmp_path / "at-x.pt").touch()
    for number in (0, 9, 10):
        states.save(number, {"here": torch.tensor(number)})
    assert states.numbers() == [9, 10]
    assert states.load(10) == {"here": torch.tensor(10)}
    states.save(9, {"here": torch.tensor(1)})  # the job went back, and takes another way
    assert states.numbers() == [9]
    assert states.load(9) == {"here": torch.tensor(1)}
    states.save(11, {})
    states.save(12, {})
    states.drop_after(11)
    assert states.numbers() == [11]
    states.drop_after(-1)
    assert states.numbers() == []
    assert others.numbers() == [7]
