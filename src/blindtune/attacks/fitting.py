"""How an adversary trains a small network on what it made itself: early stop, bounded time.

An attack that is trained badly flatters the defence. So the best state by a held-out part of the
adversary's own examples is kept, and the result says whether time ran out before it settled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blindtune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how carefully."""

    epochs: int = 30
    """Passes over the adversary's examples, at most."""
    batch_size: int = 16
    """Examples (texts or records) of one step."""
    learning_rate: float = 1e-3
    """Of AdamW."""
    weight_decay: float = 1e-2
    """Of AdamW."""
    patience: int = 4
    """Epochs without a better held-out loss before it ends."""
    held_out: float = 0.1
    """Share of the examples that only decide when to end."""
    limit_seconds: float = 600.0
    """No epoch begins after this time."""
    seed: int = 0
    """Of the start weights and the order of examples."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"expected held_out between 0 and 1, got {self.held_out}")
        if not (self.learning_rate > 0 and self.limit_seconds > 0 and self.weight_decay >= 0):
            raise ConfigError(
                "expected a positive learning_rate and limit_seconds and no negative weight_decay, "
                f"got {self.learning_rate}, {self.limit_seconds}, {self.weight_decay}"
            )


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What came of it."""

    epochs: int
    """Passes that were made."""
    held_out_loss: float
    """Of the state that was kept."""
    settled: bool
    """False: time or epochs ended it, and more of them might give a stronger attack; or no loss was
    a number."""


def parted(count: int, config: FitConfig) -> tuple[list[int], list[int]]:
    """Which of `count` >= 2 examples to learn from, and which to hold out; both at least one."""
    assert count >= 2, count
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed)).tolist()
    held = min(count - 1, max(1, round(count * config.held_out)))
    return order[held:], order[:held]


def fit(
    module: nn.Module,
    loss_of: Callable[[int, Sequence[int]], Tensor],
    learn: Sequence[int],
    held_out_loss: Callable[[], float],
    config: FitConfig,
) -> FitResult:
    """Train in place and leave the state with the lowest held-out loss, in eval mode.

    Args:
        module: what is trained.
        loss_of: mean loss of some examples in an epoch (from 0), by their indices.
        learn: indices to learn from.
        held_out_loss: of the module as it is.
        config: see there.
    """
    begin = time.monotonic()
    shuffle = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        module.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    module.eval()
    best, kept, since, made = held_out_loss(), deepcopy(module.state_dict()), 0, 0
    while made < config.epochs and since < config.patience:
        if time.monotonic() - begin > config.limit_seconds:
            break
        module.train()
        order = [learn[i] for i in torch.randperm(len(learn), generator=shuffle).tolist()]
        for first in range(0, len(order), config.batch_size):
            loss = loss_of(made, order[first : first + config.batch_size])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
        made += 1
        module.eval()
        now = held_out_loss()
        since = 0 if now < best else since + 1
        if now < best:
            best, kept = now, deepcopy(module.state_dict())
    module.load_state_dict(kept)
    module.eval()
    settled = since >= config.patience and math.isfinite(best)
    return FitResult(epochs=made, held_out_loss=best, settled=settled)
