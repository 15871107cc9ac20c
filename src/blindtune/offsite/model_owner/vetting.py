"""What an adapter would change, measured before it is merged; a change too large is refused.

A data owner who wants to harm the model owner can send weights that are well-formed and finite, and
ruin the model. An honest tuning moves the weights a little: SmolLM2-135M, whole layers or LoRA, at
the default learning rate and above it, moved a matrix by a few hundredths of its largest singular
value (docs/security.md has the figures). The bounds lie several times above that.

What is not covered: a change within the bounds can still be harmful. A backdoor that shows on rare
inputs only, or a memorised text, moves no norm and no loss that is measured here.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blindtune.errors import ConfigError, DataError, PolicyError
from blindtune.models.decoder import Decoder, context_limit
from blindtune.training.loss import accepts_logits_to_keep, count_targets, next_token_loss
from blindtune.training.text import DataConfig, TokenDataset, load_dataset_file

_ITERATIONS = 30
ACCEPT = "--accept-large-change"


@dataclass(frozen=True, kw_only=True)
class ChangeBounds:
    """How much an adapter may change the model."""

    max_spectral_change: float = 1.0
    """Largest singular value of a matrix's change, as a share of the matrix's own; for vectors,
    the norm of the change against the vector's and the layer's typical weights."""
    max_layer_change: float = 0.5
    """|W' - W| / |W| over all weights of a layer."""
    max_loss_increase: float = 0.5
    """Nats a token by which the loss on public text may rise, where there is some."""

    def __post_init__(self) -> None:
        for name in ("max_spectral_change", "max_layer_change", "max_loss_increase"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"expected {name} above 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """How an adapter changes one layer of the full model."""

    layer: int
    """In the full model."""
    relative: float
    """|W' - W| / |W| over all weights of the layer."""
    spectral: float
    """The largest share by which a weight's spectrum (or a vector's norm) is moved."""
    weight: str
    """The weight of which `spectral` is told, by its name within the layer."""
    concentration: float
    """Share of that weight's change that its first singular vector carries: 1 for a rank-one
    edit, 1 for vectors."""


@torch.no_grad()
def measure_changes(
    decoder: Decoder, updates: Mapping[int, Mapping[str, Tensor]]
) -> tuple[LayerChange, ...]:
    """Norm and spectrum of what an adapter changes, layer by layer.

    Args:
        decoder: the full model, not changed yet.
        updates: new weights by layer and name.
    """
    return tuple(_layer_change(decoder, i, values) for i, values in updates.items())


def _layer_change(decoder: Decoder, i: int, values: Mapping[str, Tensor]) -> LayerChange:
    own = {name: p.detach().float() for name, p in decoder.layers[i].named_parameters()}
    total = sum(_norm(weight) ** 2 for weight in own.values()) ** 0.5
    typical = total / max(1, sum(weight.numel() for weight in own.values())) ** 0.5
    moved, largest, where, concentration = 0.0, 0.0, "", 0.0
    for name, value in values.items():
        change = value.float() - own[name]
        norm = _norm(change)
        moved += norm**2
        if change.ndim >= 2:
            top = _largest_singular_value(change)
            share = top / max(_largest_singular_value(own[name]), 1e-30)
            carried = (top / norm) ** 2 if norm else 0.0
        else:
            share = norm / max(_norm(own[name]), typical * change.numel() ** 0.5, 1e-30)
            carried = 1.0
        if share >= largest:
            largest, where, concentration = share, name, min(carried, 1.0)
    return LayerChange(
        layer=i,
        relative=moved**0.5 / max(total, 1e-30),
        spectral=largest,
        weight=where,
        concentration=concentration,
    )


def _norm(tensor: Tensor) -> float:
    """In float64: squares of float32 numbers overflow float32."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _largest_singular_value(weight: Tensor) -> float:
    """By power iteration: a lower bound, some percent below as a rule.

    The start follows from the matrix itself: from a start that is known beforehand, a change could
    be made that it does not see. No row and no column is longer than what is returned.
    """
    scale = float(weight.abs().amax())
    if scale == 0.0:
        return 0.0
    weight_OI = weight.flatten(1) / scale
    digest = sha256(weight_OI.contiguous().cpu().numpy().tobytes()).digest()
    start = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:7], "big"))
    vector_I = torch.randn(weight_OI.shape[1], generator=start).to(weight_OI.device)
    for _ in range(_ITERATIONS):
        vector_I = normalize(weight_OI.T @ (weight_OI @ vector_I), dim=0)
    longest = max(float(weight_OI.norm(dim=i).amax()) for i in (0, 1))
    return scale * max(float((weight_OI @ vector_I).norm()), longest)


def check_changes(
    changes: Sequence[LayerChange], bounds: ChangeBounds, adapter: str | Path
) -> None:
    """Raise PolicyError if a layer's change is out of bounds."""
    for change in changes:
        if change.spectral > bounds.max_spectral_change:
            raise PolicyError(
                f"{adapter}: would move {change.weight} of layer {change.layer} by "
                f"{change.spectral:.3g} of its size, an honest adapter stays below "
                f"{bounds.max_spectral_change:g}: ask the data owner, or say that you accept it "
                f"({ACCEPT})"
            )
        if change.relative > bounds.max_layer_change:
            raise PolicyError(
                f"{adapter}: would change layer {change.layer} by {change.relative:.3g} of its "
                f"norm, an honest adapter stays below {bounds.max_layer_change:g}: ask the data "
                f"owner, or say that you accept it ({ACCEPT})"
            )


def public_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path,
    *,
    max_length: int = 128,
    max_tokens: int = 8192,
) -> TokenDataset:
    """The beginning of some text, on which losses before and after are compared.

    Args:
        model: the full model, or the sketch of it.
        tokenizer: its own.
        data: a file of public text.
        max_length: tokens of a window, if the model reads as many and the text has them.
        max_tokens: how many are read.

    Raises:
        DataError: see errors.py.
    """
    longest = min(max_length, context_limit(model.config) or max_length)
    reading = DataConfig(max_length=longest, max_tokens=max_tokens)
    try:
        return load_dataset_file(data, tokenizer, reading)
    except DataError:  # perhaps because the text fills no window
        return load_dataset_file(data, tokenizer, replace(reading, pack=False))


@torch.no_grad()
def public_loss(model: PreTrainedModel, dataset: TokenDataset) -> float:
    """Mean loss in nats a token on public text."""
    keep, was_training = accepts_logits_to_keep(model), model.training
    model.eval()
    loss = count = 0.0
    for i in range(len(dataset)):
        batch = {name: value[None] for name, value in dataset[i].items()}
        loss += float(next_token_loss(model, batch, logits_to_keep=keep))
        count += count_targets(batch["labels"])
    model.train(was_training)
    return loss / max(count, 1)


def check_loss(before: float, after: float, bounds: ChangeBounds, adapter: str | Path) -> None:
    """Raise PolicyError if the loss on public text rises too much, or is no number."""
    if not after - before <= bounds.max_loss_increase:
        raise PolicyError(
            f"{adapter}: would raise the loss on the public text from {before:.3f} to {after:.3f} "
            f"nats a token, at most {bounds.max_loss_increase:g} more are allowed: ask the data "
            f"owner, or say that you accept it ({ACCEPT})"
        )


def refusal(
    changes: Sequence[LayerChange],
    losses: tuple[float, float] | None,
    bounds: ChangeBounds,
    adapter: str | Path,
) -> str | None:
    """Why an adapter of these changes is refused; None: it is not."""
    try:
        check_changes(changes, bounds, adapter)
        if losses is not None:
            check_loss(*losses, bounds, adapter)
    except PolicyError as error:
        return str(error)
    return None
