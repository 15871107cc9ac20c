"""What whoever holds an emulator can make of it: use it as a free model, or heal it.

*Free model*: the emulator is an ordinary language model; its quality, before and after tuning, is
what the model owner gave away at no cost to the taker. *Healing*: go on training it on public text,
with all of its layers free, after making whole again what was made small: products in place of low-
rank factors, full layers in place of harmonizers. The attacker has the emulator and public text,
nothing else: not the full model, not the private text.

A replaced layer grows again as a copy of the nearest full layer, either in the harmonizer's place
("neighbour"), or before it and silent at first, with zero output maps ("beside"): then healing
starts at the emulator's own quality and the harmonizer's work is not lost.

The training is offsite-tuning's (arXiv 2302.04870) seen from the other side; the growing is ours.

Shapes: N windows, B batch, L length, O output features, I input features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blindtune.errors import ConfigError, DataError
from blindtune.models.blocks import Harmonizer, LowRankLinear
from blindtune.models.decoder import Decoder
from blindtune.models.surgery import replace_layer
from blindtune.training.windows import WindowPlan, window_steps


@dataclass(frozen=True, kw_only=True, eq=False)
class EmulatorView:
    """What the attacker has."""

    model: PreTrainedModel
    """The opened emulator, as it came or tuned; the attack changes it in place."""
    public_NL: Tensor
    """Token ids of public text, windows of one length."""


@dataclass(frozen=True, kw_only=True)
class HealingConfig:
    """How long and how the attacker trains."""

    regrow: Literal["none", "neighbour", "beside"] = "beside"
    """What becomes of harmonizers: nothing, a copy of the nearest full layer, or such a copy silent
    beside the harmonizer."""
    steps: int = 200
    """Optimizer steps."""
    points: int = 5
    """How often the attacker stops to look: after 1/16, 1/8, 1/4, 1/2 and all of the steps."""
    batch_size: int = 4
    """Windows a step."""
    learning_rate: float = 5e-5
    """Of AdamW; constant, so that every stop is the best the attacker has for that many tokens.
    What heals best depends on the emulator: little for one that is good already."""
    control_learning_rate: float = 2e-4
    """The same for a control, which has farther to go (`evaluation.leakage.misuse`)."""
    warmup_steps: int = 4
    """Steps over which it rises from 0."""
    seed: int = 0
    """Of the batches."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if min(self.steps, self.points, self.batch_size) < 1 or self.warmup_steps < 0:
            raise ConfigError(
                "expected steps, points and batch_size >= 1 and warmup_steps >= 0, got "
                f"{self.steps}, {self.points}, {self.batch_size}, {self.warmup_steps}"
            )
        if self.learning_rate <= 0 or self.regrow not in ("none", "neighbour", "beside"):
            raise ConfigError(
                "expected learning_rate > 0 and regrow none, neighbour or beside, got "
                f"{self.learning_rate}, {self.regrow!r}"
            )

    @property
    def stops(self) -> tuple[int, ...]:
        """Steps after which the attacker looks, ending with the last."""
        return tuple(sorted({max(1, self.steps >> k) for k in range(self.points)}))


@dataclass(frozen=True, kw_only=True)
class Stop:
    """One look of the attacker."""

    tokens: int
    """Of public text trained on so far."""
    training_loss: float
    """Nats a token, mean since the last stop; NaN before the first step."""


def heal(view: EmulatorView, config: HealingConfig) -> Iterator[Stop]:
    """Grow and train the emulator in place; `view.model` is the guess at every stop.

    The first stop is after growing, before any training.

    Raises:
        DataError: there is no public text.
    """
    regrow(view.model, config.regrow)
    yield from train_on(view.model, view.public_NL, config)


def train_on(model: PreTrainedModel, public_NL: Tensor, config: HealingConfig) -> Iterator[Stop]:
    """Train all layers of a model on public text, in place; embeddings and head stay.

    These are the full model's own in every emulator, so there is nothing to heal in them.
    """
    if public_NL.ndim != 2 or not len(public_NL) or public_NL.shape[1] < 2:
        raise DataError(
            f"expected windows of public text [N, L] to train on, got {list(public_NL.shape)}"
        )
    layers = Decoder(model).layers
    model.requires_grad_(False)
    layers.requires_grad_(True)
    plan = WindowPlan(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        schedule="constant",
        warmup_steps=config.warmup_steps,
        seed=config.seed,
    )

    def loss_of(batch_BL: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=batch_BL, labels=batch_BL, use_cache=False).loss
        return loss

    yield Stop(tokens=0, training_loss=float("nan"))
    losses: list[float] = []
    for step, loss in enumerate(window_steps(layers, public_NL, loss_of, plan), 1):
        losses.append(loss)
        if step in config.stops:
            tokens = step * config.batch_size * public_NL.shape[1]
            yield Stop(tokens=tokens, training_loss=sum(losses) / len(losses))
            losses.clear()


def regrow(model: PreTrainedModel, how: Literal["none", "neighbour", "beside"]) -> None:
    """Make an emulator's layers whole again, in place.

    Factors become their product, exactly. With "none" harmonizers stay as they are.
    """
    decoder = Decoder(model)
    raw = [i for i in range(decoder.layer_count) if decoder.is_raw(i)]
    for i in raw:
        _multiply_out(decoder, i)
    if how == "none":
        return
    for i in set(range(decoder.layer_count)) - set(raw):
        nearest = min(raw, key=lambda j: (abs(j - i), j))
        layer, harmonizer = copy.deepcopy(decoder.layers[nearest]), decoder.layers[i]
        for key in decoder.family.per_layer:
            values = list(getattr(decoder.config, key))
            values[i] = values[nearest]
            setattr(decoder.config, key, values)
        if how == "beside":
            assert isinstance(harmonizer, Harmonizer), type(harmonizer)
            _silence(decoder, layer)
            layer = Regrown(layer, harmonizer)
        replace_layer(model, i, layer)


@torch.no_grad()
def _multiply_out(decoder: Decoder, i: int) -> None:
    for projection in (*decoder.projections(i), *decoder.feed_forward(i)):
        factors = projection.module
        if not isinstance(factors, LowRankLinear):
            continue
        like = factors.up[0]
        dense = nn.Linear(
            factors.in_features, factors.out_features, bias=factors.bias is not None
        ).to(like.device, like.dtype)
        dense.weight.copy_(factors.dense_weight())
        if factors.bias is not None:
            dense.bias.copy_(factors.bias)
        decoder.layers[i].set_submodule(projection.path, dense)


@torch.no_grad()
def _silence(decoder: Decoder, layer: nn.Module) -> None:
    """Zero the maps by which a layer adds to the hidden states."""
    for maps in (decoder.family.attention, decoder.family.feed_forward):
        for parameter in layer.get_submodule(maps[-1].path).parameters():
            parameter.zero_()


@final
class Regrown(nn.Module):
    """A full layer before the harmonizer that took its place; looks like the layer to the backbone.

    Args:
        layer: of the family.
        harmonizer: runs on what the layer gives.
    """

    def __init__(self, layer: nn.Module, harmonizer: Harmonizer) -> None:
        super().__init__()
        self.layer, self.harmonizer = layer, harmonizer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hidden states [B, L, D] to [B, L, D], wrapped as the family's layers wrap them."""
        out = self.layer(hidden_states, *args, **kwargs)
        return self.harmonizer(out[0] if isinstance(out, tuple) else out)
