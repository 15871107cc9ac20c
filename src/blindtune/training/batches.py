"""Order and padding.

**The effective batch.** One optimizer step sees
`per_device_train_batch_size` x processes x `gradient_accumulation_steps` examples: the next ones of
one seeded stream of shuffled epochs, which follow each other without a gap. How a step's examples
are dealt out to processes and accumulation changes nothing but rounding.

Shape legend: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blindtune.training.dataset import IGNORED_LABEL


def collate(examples: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Right-pad examples to a batch.

    Returns:
        `input_ids` [B, L] and `labels` [B, L] (padding: `pad_token_id` and -100), and
        `attention_mask` [B, L] only when something is padded: without a mask attention is causal
        alone, which has faster kernels.
    """
    ids, labels = ([example[key] for example in examples] for key in ("input_ids", "labels"))
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(ids, batch_first=True, padding_value=pad_token_id),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }
    if len({len(row) for row in ids}) > 1:
        ones = [torch.ones_like(row) for row in ids]
        batch["attention_mask"] = pad(ones, batch_first=True, padding_value=0)
    return batch


def padding_id(model: nn.Module) -> int:
    """The token that `collate` pads with; 0 where a model names none: it is masked anyway."""
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """The indices of every micro-batch that one process works on, in order.

    Iterating gives `steps` x `accumulation` lists of `batch_size` indices; it works as a torch
    `batch_sampler` and always starts anew.
    """

    examples: int
    """Size of the data set."""
    batch_size: int
    """Examples of one process in one micro-batch."""
    accumulation: int
    """Micro-batches of one optimizer step."""
    steps: int
    """Optimizer steps."""
    seed: int
    """Seed of the shuffles."""
    processes: int = 1
    """Processes that share a step."""
    rank: int = 0
    """Which of them this is."""

    def __len__(self) -> int:
        """Micro-batches of this process."""
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        """The indices of one micro-batch after the other."""
        stream = self._stream()
        for _ in range(len(self)):
            shared = [next(stream) for _ in range(self.batch_size * self.processes)]
            yield shared[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def _stream(self) -> Iterator[int]:
        epoch = 0
        while True:
            yield from _epoch(self.examples, self.seed, epoch)
            epoch += 1


def _epoch(examples: int, seed: int, epoch: int) -> list[int]:
    """The seeded order of one epoch; every (seed, epoch) is its own stream."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order: list[int] = torch.randperm(examples, generator=generator).tolist()
    return order
