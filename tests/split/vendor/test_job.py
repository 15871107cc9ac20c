"""What a job's requests give, where the model is on a GPU and where it is not."""

import pytest
import torch
from split_world import CONFIG
from test_vendor import batch

from blindtune.exchange.wire.messages import Backward, Forward
from blindtune.split.vendor.job import Job
from blindtune.split.vendor.store import JobRecord

ROWS = torch.ones(5, 32)


class OnGpu(torch.Tensor):
    """A tensor that has to be fetched from a GPU."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


class GpuLora:
    """A job's part of a model on a GPU: what it computes stays there."""

    def batch(self, hidden_TD, *_anything, input_gradient, **_options):
        return 1.0, {}, hidden_TD.as_subclass(OnGpu) if input_gradient else None

    def forward(self, _number, hidden_TD, _lengths):
        return hidden_TD.as_subclass(OnGpu)

    def backward(self, _number, gradient_TD):
        return gradient_TD.as_subclass(OnGpu)


@pytest.mark.parametrize("asked", [True, False])
def test_replies_that_are_remembered_hold_no_memory_of_the_gpu(asked):
    record = JobRecord(
        name="job", owner="anna", token_sha256="", task="hidden", outputs=0, precision="float32",
        options=CONFIG.options(),
    )  # fmt: skip
    job = Job(record=record, lora=GpuLora())
    replies = [
        job.work(batch(1, input_gradient=asked)).gradient_TD,
        job.work(
            Backward(sequence=2, forward=1, gradient_TD=ROWS, input_gradient=asked)
        ).gradient_TD,
        job.work(Forward(sequence=3, hidden_TD=ROWS, lengths=(5,))).hidden_TD,
    ]
    wanted = torch.Tensor if asked else type(None)
    assert [type(reply) for reply in replies] == [wanted, wanted, torch.Tensor]
