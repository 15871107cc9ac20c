import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.training.batches import BatchOrder, collate


def test_collate_pads_on_the_right_and_masks_only_when_padded():
    row = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 6, 7])}
    short = {"input_ids": torch.tensor([8]), "labels": torch.tensor([8])}
    batch = collate([row, short], pad_token_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in collate([row, row], pad_token_id=1)


def steps_of(order):
    batches = list(order)
    size = order.accumulation
    return [
        [i for batch in batches[first : first + size] for i in batch]
        for first in range(0, len(batches), size)
    ]


@settings(deadline=None, max_examples=50)
@given(
    examples=st.integers(1, 40),
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    processes=st.integers(1, 4),
    seed=st.integers(0, 10**9),
)
def test_a_step_sees_the_same_examples_however_it_is_dealt_out(
    examples, batch_size, accumulation, processes, seed
):
    common = {"examples": examples, "steps": 5, "seed": seed}
    effective = batch_size * accumulation * processes
    whole = steps_of(BatchOrder(batch_size=effective, accumulation=1, **common))
    shares = [
        steps_of(
            BatchOrder(
                batch_size=batch_size,
                accumulation=accumulation,
                processes=processes,
                rank=rank,
                **common,
            )
        )
        for rank in range(processes)
    ]
    for step, wanted in enumerate(whole):
        assert sorted(i for share in shares for i in share[step]) == sorted(wanted)


def test_every_epoch_has_every_example_once_in_another_order():
    order = BatchOrder(examples=10, batch_size=5, accumulation=1, steps=4, seed=0)
    stream = [i for batch in order for i in batch]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert stream == [i for batch in order for i in batch]
