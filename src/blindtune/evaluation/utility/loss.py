"""Language-model loss: perplexity over fixed windows, and loss on target tokens only.

Shapes: N windows or positions, B batch, L length, D hidden, V vocabulary.

The decoder runs once per batch; the head is applied to the scored positions alone, a slice at a
time, so that the logits (positions x V) never exist as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blindtune.errors import DataError, ModelError
from blindtune.training.dataset import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]
"""Called with (done, total) after every batch."""

LOGITS_AT_ONCE = 1 << 25
"""Largest number of logits held at one time (128 MiB in float32)."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A mean loss and what it was measured on."""

    nats_per_token: float
    """Mean negative log-likelihood of the scored tokens, in nats."""
    perplexity: float
    """exp(nats_per_token); infinite when that overflows."""
    tokens: int
    """Number of scored tokens."""
    examples: int
    """Windows or examples that they are of."""
    standard_error: float | None
    """Of nats_per_token, over windows or examples; None when there is only one."""


def perplexity(
    model: PreTrainedModel,
    windows_NL: Tensor,
    *,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> Perplexity:
    """Perplexity over windows of equal length, each on its own; its first token is not scored.

    Args:
        model: any decoder with a language-model head.
        windows_NL: token ids, L >= 2.
        batch_size: windows per forward pass; changes speed and memory only.
        on_progress: called with (windows done, windows in all).

    Raises:
        DataError: there is nothing to score.
        ModelError: the loss is not finite.
    """
    return mean_loss(
        *window_sums(model, windows_NL, batch_size=batch_size, on_progress=on_progress)
    )


def window_sums(
    model: PreTrainedModel,
    windows_NL: Tensor,
    *,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """What `perplexity` averages: nats and scored tokens of every window, float64 of shape N.

    Raises:
        DataError: there is nothing to score.
    """
    if windows_NL.ndim != 2 or windows_NL.shape[0] < 1 or windows_NL.shape[1] < 2:
        raise DataError(
            "expected at least one window of at least two tokens to score, got shape "
            f"{tuple(windows_NL.shape)}; give more text or a shorter window"
        )
    labels_NL = windows_NL.clone()
    labels_NL[:, 0] = IGNORED_LABEL
    batches = (
        (windows_NL[i : i + batch_size], labels_NL[i : i + batch_size], None)
        for i in range(0, len(windows_NL), batch_size)
    )
    return _sums(model, batches, len(windows_NL), on_progress)


def loss_on_targets(
    model: PreTrainedModel,
    dataset: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> Perplexity:
    """Loss on the target tokens of a data set, such as the completions of prompts.

    Args:
        model: any decoder with a language-model head.
        dataset: has a length and gives mappings with ``input_ids`` and ``labels`` (lists or 1-D
            tensors of equal length, not shifted; -100 marks what is not scored).
        batch_size: examples per forward pass; changes speed and memory only.
        on_progress: called with (examples done, examples in all).

    Raises:
        DataError: no token of the data set is a target.
        ModelError: the loss is not finite.
    """
    _, nats_N, tokens_N = _target_sums(model, dataset, batch_size, on_progress)
    return mean_loss(nats_N, tokens_N)


def loss_of_each(
    model: PreTrainedModel,
    dataset: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """What `loss_on_targets` averages: nats and number of scored tokens of every example.

    Both are float64 of shape N, in the order of the data set, so that models can be compared
    example by example.

    Raises:
        DataError, ModelError: as for `loss_on_targets`.
    """
    order_N, *sums = _target_sums(model, dataset, batch_size, on_progress)
    mean_loss(*sums)  # refuses what is not finite
    nats_N, tokens_N = (
        torch.empty_like(found_N).index_copy(0, order_N, found_N) for found_N in sums
    )
    return nats_N, tokens_N


def target_log_probs(model: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Log-probability (float32, shape N) that the head gives each target from its hidden state.

    Knows Gemma's soft-capped logits (``final_logit_softcapping``); every other supported family
    has a plain head.
    """
    head = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    step = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    pieces = []
    for start in range(0, len(targets_N), step):
        logits_nV = head(hidden_ND[start : start + step]).float()
        if cap is not None:
            logits_nV = torch.tanh(logits_nV / cap) * cap
        targets_n = targets_N[start : start + step]
        pieces.append(-torch.nn.functional.cross_entropy(logits_nV, targets_n, reduction="none"))
    return torch.cat(pieces) if pieces else hidden_ND.new_zeros(0, dtype=torch.float32)


@contextmanager
def scoring(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _target_sums(
    model: PreTrainedModel,
    dataset: Sequence[Mapping[str, Any]],
    batch_size: int,
    on_progress: Progress | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Places in the data set, nats and number of scored tokens of every example, longest first."""
    examples = [
        (torch.as_tensor(example["input_ids"]), torch.as_tensor(example["labels"]))
        for example in (dataset[i] for i in range(len(dataset)))
    ]
    if not any((labels[1:] != IGNORED_LABEL).any() for _, labels in examples):
        raise DataError(
            f"expected target tokens to score, found none in {len(examples)} examples; "
            "check the data's completion or assistant turns"
        )
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]), reverse=True)
    batches = (
        _pad_right([examples[i] for i in order[begin : begin + batch_size]])
        for begin in range(0, len(order), batch_size)
    )
    return torch.tensor(order), *_sums(model, batches, len(order), on_progress)


def _sums(
    model: PreTrainedModel,
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    total: int,
    on_progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """Nats and number of scored tokens of every row, in the order of the batches."""
    row_nats: list[Tensor] = []
    row_tokens: list[Tensor] = []
    done = 0
    with scoring(model):
        for ids_BL, labels_BL, mask_BL in batches:
            nats_B, tokens_B = _row_sums(model, ids_BL, labels_BL, mask_BL)
            row_nats.append(nats_B)
            row_tokens.append(tokens_B)
            done += len(ids_BL)
            if on_progress is not None:
                on_progress(done, total)
    return torch.cat(row_nats), torch.cat(row_tokens)


def mean_loss(nats_N: Tensor, tokens_N: Tensor) -> Perplexity:
    """Mean over all scored tokens; the standard error is that of a ratio of row sums.

    Raises:
        ModelError: the loss is not finite.
    """
    total, tokens = len(nats_N), int(tokens_N.sum())
    mean = float(nats_N.sum()) / tokens
    if not math.isfinite(mean):
        raise ModelError(
            f"expected a finite loss, got {mean}; the model's weights or activations hold "
            "NaN or infinite values: check how it was made"
        )
    spread = float((nats_N - mean * tokens_N).square().sum())
    error = math.sqrt(spread * total / (total - 1)) / tokens if total > 1 else None
    return Perplexity(
        nats_per_token=mean,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        tokens=tokens,
        examples=total,
        standard_error=error,
    )


def _row_sums(
    model: PreTrainedModel, ids_BL: Tensor, labels_BL: Tensor, mask_BL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Nats and number of scored tokens of every row, in float64 on the CPU."""
    ids_BL, labels_BL = ids_BL.to(model.device), labels_BL.to(model.device)
    mask_BL = None if mask_BL is None else mask_BL.to(model.device)
    hidden_BLD = model.get_decoder()(
        input_ids=ids_BL, attention_mask=mask_BL, use_cache=False
    ).last_hidden_state
    rows_N, columns_N = (labels_BL[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
    log_probs_N = target_log_probs(
        model, hidden_BLD[rows_N, columns_N], labels_BL[rows_N, columns_N + 1]
    ).double()
    nats_B = log_probs_N.new_zeros(len(ids_BL)).index_add(0, rows_N, -log_probs_N)
    tokens_B = torch.bincount(rows_N, minlength=len(ids_BL)).double()
    return nats_B.cpu(), tokens_B.cpu()


def _pad_right(examples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and attention mask; the padding's ids are 0 and nothing attends to them."""

    def pad(rows: Sequence[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            list(rows), batch_first=True, padding_value=float(value)
        )

    ids = [row for row, _ in examples]
    masks = [torch.ones_like(row) for row in ids]
    return pad(ids, 0), pad([labels for _, labels in examples], IGNORED_LABEL), pad(masks, 0)
