"""Windows of one text, and a plain loop over random ones: small trainings without a data set.

`fit` is the loop for people's data: batches of examples, validation, checkpoints, many processes.

Shapes: N windows, B batch, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from blindtune.errors import DataError
from blindtune.training.optimizers import ScheduleName, build_optimizer, build_scheduler
from blindtune.training.text import DataConfig, load_dataset_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def full_windows(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, reading: DataConfig, *, least: int = 1
) -> Tensor:
    """All full windows of a text [N, L], in its order; of records too, one joined to the next.

    Raises:
        DataError: there are fewer than `least`.
    """
    dataset = load_dataset_file(source, tokenizer, reading)
    count = dataset.tokens // reading.max_length
    if count < least:
        raise DataError(
            f"{source}: expected at least {least * reading.max_length} tokens of text, got "
            f"{dataset.tokens}: give more text, or a smaller --max-length"
        )
    ids_T = torch.cat(dataset.input_ids)
    return ids_T[: count * reading.max_length].view(count, reading.max_length)


def shuffled(windows_NL: Tensor, seed: int) -> Tensor:
    """The same windows in an order that the seed decides."""
    return windows_NL[
        torch.randperm(len(windows_NL), generator=torch.Generator().manual_seed(seed))
    ]


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """How long and how fast."""

    steps: int
    batch_size: int
    """Windows a step, drawn with replacement."""
    learning_rate: float
    """Peak of AdamW's."""
    schedule: ScheduleName
    warmup_steps: int
    """Steps over which the learning rate rises from 0."""
    seed: int
    """Of the draws."""


def window_steps(
    trained: nn.Module, windows_NL: Tensor, loss_of: Callable[[Tensor], Tensor], plan: WindowPlan
) -> Iterator[float]:
    """Train in place, gradients clipped to norm 1; yields every step's loss before its update.

    Args:
        trained: its parameters that require a gradient are trained.
        windows_NL: token ids.
        loss_of: mean loss of a batch [B, L], which lies where the parameters do.
        plan: see there.

    Raises:
        ConfigError: no parameter requires a gradient.
    """
    device = next(trained.parameters()).device
    optimizer = build_optimizer(trained, plan.learning_rate)
    scheduler = build_scheduler(optimizer, plan.schedule, plan.warmup_steps, plan.steps)
    generator = torch.Generator().manual_seed(plan.seed)
    for _ in range(plan.steps):
        chosen = torch.randint(len(windows_NL), (plan.batch_size,), generator=generator)
        loss = loss_of(windows_NL[chosen].to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()
