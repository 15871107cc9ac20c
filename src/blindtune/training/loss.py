"""Next-token loss that runs the head only where a label asks for it.

The head of a small model is most of its work (SmolLM2-135M: 49,152 x 576 weights a token, a fifth
of all), and answers-only data has labels at few positions.

Shape legend: B batch, L length, K positions that some row has a label for, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from blindtune.training.dataset import IGNORED_LABEL


def accepts_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model's forward can restrict the head to given positions."""
    unwrap: Any = getattr(model, "get_base_model", None)  # peft's wrapper takes any keyword
    inner = model if unwrap is None else unwrap()
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def count_targets(labels_BL: Tensor) -> int:
    """Labels that the shifted loss uses: all but those at position 0."""
    return int((labels_BL[:, 1:] != IGNORED_LABEL).sum())


def next_token_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, logits_to_keep: bool
) -> Tensor:
    """Sum over all targets of -ln p(token | tokens before it), in nats.

    Equal to the loss of transformers (`ForCausalLMLoss`, reduction "sum") to rounding.

    Args:
        model: a causal language model with transformers' calling convention.
        batch: `input_ids` [B, L], `labels` [B, L], and `attention_mask` [B, L] if padded.
        logits_to_keep: see `accepts_logits_to_keep`; if not, all logits are computed.
    """
    logits_BKV, targets_BK = _predictions(model, batch, logits_to_keep)
    return functional.cross_entropy(
        logits_BKV.flatten(0, 1).float(),
        targets_BK.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )


def record_losses(model: nn.Module, batch: Mapping[str, Tensor], *, logits_to_keep: bool) -> Tensor:
    """Mean of -ln p(token | tokens before it) over every record's own targets [B], in nats.

    Args:
        model, batch, logits_to_keep: as for `next_token_loss`; every record has a target.
    """
    logits_BKV, targets_BK = _predictions(model, batch, logits_to_keep)
    loss_BK = functional.cross_entropy(
        logits_BKV.float().transpose(1, 2),
        targets_BK,
        ignore_index=IGNORED_LABEL,
        reduction="none",
    )
    return loss_BK.double().sum(1) / (targets_BK != IGNORED_LABEL).sum(1)


def _predictions(
    model: nn.Module, batch: Mapping[str, Tensor], logits_to_keep: bool
) -> tuple[Tensor, Tensor]:
    """Logits [B, K, V] and targets [B, K] at the positions that some row has a target for."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets_BL = batch["labels"][:, 1:]
    keep_K = (targets_BL != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
    if logits_to_keep:
        logits_BKV = model(**inputs, logits_to_keep=keep_K, use_cache=False).logits
    else:
        logits_BKV = model(**inputs, use_cache=False).logits[:, keep_K]
    return logits_BKV, targets_BL[:, keep_K]
