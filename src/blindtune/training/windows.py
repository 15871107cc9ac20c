"""A plain loop over random windows of one text, for small trainings without a data set around them.

`fit` is the loop for people's data: batches of examples, validation, checkpoints, many processes.

Shapes: N windows, B batch, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blindtune.training.optimizers import ScheduleName, build_optimizer, build_scheduler


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
