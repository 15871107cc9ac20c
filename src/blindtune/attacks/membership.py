"""Was this record in the training data? Membership inference on a returned adapter, by losses.

The adversary is the model owner, or whoever has the adapter and a model to put it into. It holds
records that may have been trained on, and knows nothing of which were. A record that was trained on
has a lower loss than it would have had otherwise. `tuned_losses` ranks by that loss alone, so easy
texts look like members; `loss_drops` calibrates by the model without the adapter, which says how
easy a record was before (difficulty calibration, arXiv 2111.08440).

**What is not covered**: an adversary that trains shadow models of its own (arXiv 2112.03570) may do
better, so a low score is no proof. The bound that holds for every attack is DP-SGD's.

Shapes: B batch, L tokens of one record, N records, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from blindtune.errors import ConfigError, DataError
from blindtune.training.batches import collate
from blindtune.training.dataset import IGNORED_LABEL
from blindtune.training.loss import accepts_logits_to_keep, record_losses


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterView:
    """A returned adapter in a model, and records that may have been trained on."""

    tuned: nn.Module
    """A causal model with the adapter: the full model at its owner, the emulator at an audit."""
    untuned: nn.Module
    """The same model without the adapter."""
    records: tuple[Mapping[str, Tensor], ...]
    """`input_ids` [L] and `labels` [L] of every record; label -100: not trained."""
    pad_token_id: int = 0
    batch_size: int = 8
    """Records of one forward pass; changes no score but by rounding."""

    @cached_property
    def losses(self) -> tuple[Tensor, Tensor]:
        """Every record's mean loss with the adapter and without [N], nats a token."""
        return _record_losses(self.tuned, self), _record_losses(self.untuned, self)

    def __post_init__(self) -> None:
        """Refuse what has no loss."""
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        if not self.records:
            raise DataError("expected at least one record to judge, got none")
        for place, record in enumerate(self.records):
            if not bool((record["labels"][1:] != IGNORED_LABEL).any()):
                raise DataError(
                    f"expected a trained token in every record, got none in record {place}: "
                    "leave it out"
                )


def tuned_losses(view: AdapterView) -> Tensor:
    """Minus the loss with the adapter [N], nats a token: the higher, the likelier a member."""
    return -view.losses[0]


def loss_drops(view: AdapterView) -> Tensor:
    """How much the adapter lowered each record's loss [N], nats a token: higher, likelier."""
    tuned_N, untuned_N = view.losses
    return untuned_N - tuned_N


@torch.no_grad()
def _record_losses(model: nn.Module, view: AdapterView) -> Tensor:
    """Mean loss of every record's trained tokens [N], float64 on the CPU; without dropout."""
    was_training, device = model.training, next(model.parameters()).device
    losses: list[Tensor] = []
    keeps = accepts_logits_to_keep(model)
    model.eval()
    try:
        for start in range(0, len(view.records), view.batch_size):
            batch = collate(view.records[start : start + view.batch_size], view.pad_token_id)
            inputs = {key: value.to(device) for key, value in batch.items()}
            losses.append(record_losses(model, inputs, logits_to_keep=keeps).cpu())
    finally:
        model.train(was_training)
    return torch.cat(losses)
