"""AdamW and the learning-rate schedules."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from blindtune.errors import ConfigError

ScheduleName = Literal["linear", "cosine", "constant"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient.

    Weight decay applies to matrices; vectors (norms, biases) are never decayed.

    Raises:
        ConfigError: no parameter requires a gradient.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError(
            "expected parameters to train, all are frozen: set requires_grad on some, or add LoRA"
        )
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=True)


def build_scheduler(
    optimizer: torch.optim.Optimizer, name: ScheduleName, warmup_steps: int, max_steps: int
) -> LRScheduler:
    """Linear warm-up from 0, then linear or cosine decay to 0 at `max_steps`, or constant."""
    from transformers import get_scheduler

    full_name = "constant_with_warmup" if name == "constant" else name
    schedule: LRScheduler = get_scheduler(
        full_name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max_steps
    )
    return schedule
