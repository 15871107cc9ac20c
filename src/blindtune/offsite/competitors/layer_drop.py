"""Uniform LayerDrop, and offsite-tuning's distillation of what is left.

Of n middle layers m evenly spaced ones stay. Distillation then trains these m layers alone, on
public text, to do in their place what all n did: the loss of the language model plus 30 times the
squared error of the middle's output relative to its size (offsite-tuning, arXiv 2302.04870, section
3 and its code: AdamW 1e-4, warm-up, cosine, clip 1).

Left open by the paper, and decided here: rms(T) is taken token by token, so that the first token,
whose state is up to a hundred times longer, does not outweigh all others; the warm-up is a share of
the steps, because 2000 of them are longer than a run on a small machine.

Shapes: N windows, B batch, L length, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from blindtune.errors import ConfigError
from blindtune.exchange.packages.manifest import AdapterLayer, LayerEntry, RawLayer
from blindtune.models.decoder import Decoder
from blindtune.models.surgery import keep_layers
from blindtune.offsite.model_owner.emulation import uniform_choice
from blindtune.training.windows import WindowPlan, window_steps


@dataclass(frozen=True, kw_only=True)
class LayerDropConfig:
    """Uniform LayerDrop; with steps, distilled."""

    adapter_layers: int = 2
    """N_a: layers at each end that stay raw and are tuned."""
    alpha: float = 0.25
    """Share of the middle layers that are dropped (rounded to whole layers)."""
    steps: int = 0
    """Steps of distillation; 0: none."""
    batch_size: int = 4
    """Windows a step."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup_share: float = 0.1
    """Share of the steps over which the learning rate rises."""
    hidden_weight: float = 30.0
    """Weight of the middle's relative error beside the loss of the language model."""
    seed: int = 0
    """Of the batches."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.adapter_layers < 1 or self.steps < 0 or self.batch_size < 1:
            raise ConfigError(
                "expected adapter_layers >= 1, steps >= 0 and batch_size >= 1, got "
                f"{self.adapter_layers}, {self.steps}, {self.batch_size}"
            )
        if not 0 <= self.alpha < 1 or not 0 <= self.warmup_share < 1:
            raise ConfigError(
                f"expected alpha and warmup_share in [0, 1), got {self.alpha}, {self.warmup_share}"
            )
        if self.learning_rate <= 0 or self.hidden_weight < 0:
            raise ConfigError(
                "expected learning_rate > 0 and hidden_weight >= 0, got "
                f"{self.learning_rate}, {self.hidden_weight}"
            )


def middle_layers(decoder: Decoder, adapter_layers: int) -> range:
    """Indices of the layers between the adapter layers.

    Raises:
        ConfigError: there are none.
    """
    middle = range(adapter_layers, decoder.layer_count - adapter_layers)
    if not middle:
        raise ConfigError(
            f"expected adapter_layers to leave a middle, got {adapter_layers} at each end of "
            f"{decoder.layer_count} layers: choose a smaller number"
        )
    return middle


def kept_count(middle: range, alpha: float) -> int:
    """How many middle layers stay when the share alpha goes; at least one."""
    return max(1, len(middle) - int(alpha * len(middle) + 0.5))


def keep_middle(model: PreTrainedModel, middle: range, kept: Sequence[int]) -> list[LayerEntry]:
    """Put the layers `kept` (an index may come twice) in the place of the middle; what is where."""
    tail = range(middle.stop, Decoder(model).layer_count)
    keep_layers(model, [*range(middle.start), *kept, *tail])
    entries: list[LayerEntry] = [AdapterLayer() for _ in range(middle.start)]
    entries += [RawLayer() for _ in kept]
    entries += [AdapterLayer() for _ in tail]
    return entries


def drop_layers(
    model: PreTrainedModel, windows_NL: Tensor, config: LayerDropConfig
) -> tuple[list[LayerEntry], int]:
    """Turn the full model into a layer-dropped one, in place.

    Args:
        model: the full model.
        windows_NL: public text, for distillation.
        config: how.

    Returns:
        What each layer is now, and the tokens that went through the model.

    Raises:
        ConfigError: no middle layer is left.
    """
    decoder = Decoder(model)
    middle = middle_layers(decoder, config.adapter_layers)
    places = uniform_choice(len(middle), kept_count(middle, config.alpha))
    kept = [middle[k] for k in sorted(places)]
    if config.steps:
        students = nn.ModuleList([copy.deepcopy(decoder.layers[i]) for i in kept])
        distil(decoder, students, kept, middle, windows_NL, config)
        for i, student in zip(kept, students, strict=True):
            decoder.layers[i] = student
    return keep_middle(model, middle, kept), config.steps * config.batch_size * windows_NL.shape[1]


def distil(
    decoder: Decoder,
    students: nn.ModuleList,
    kept: Sequence[int],
    middle: range,
    windows_NL: Tensor,
    config: LayerDropConfig,
) -> list[float]:
    """Train the students, in place; returns the loss of every step before its update.

    Args:
        decoder: the full model, the teacher; its weights stay.
        students: layers that stand for the whole middle, one after the other.
        kept: whose masks and positions each student gets.
        middle: the layers that they stand for.
        windows_NL: public text.
        config: how long and how fast.
    """
    decoder.model.requires_grad_(False)
    students.requires_grad_(True)
    plan = WindowPlan(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        schedule="cosine",
        warmup_steps=int(config.warmup_share * config.steps),
        seed=config.seed,
    )

    def loss_of(batch_BL: Tensor) -> Tensor:
        return distillation_loss(decoder, students, kept, middle, batch_BL, config.hidden_weight)

    losses = list(window_steps(students, windows_NL, loss_of, plan))
    students.requires_grad_(False)
    return losses


def distillation_loss(
    decoder: Decoder,
    students: nn.ModuleList,
    kept: Sequence[int],
    middle: range,
    batch_BL: Tensor,
    hidden_weight: float,
) -> Tensor:
    """Cross-entropy + weight * mean(((T - S) / rms(T))^2), T, S what leaves the middle [B, L, D].

    Source: module docstring.
    """
    with torch.no_grad():
        start = decoder.begin(batch_BL)
        below_BLD = decoder.run_layers(start.hidden_BLD, start.calls, 0, middle.start)
        teacher_BLD = decoder.run_layers(below_BLD, start.calls, middle.start, middle.stop)
    student_BLD = below_BLD
    for i, layer in zip(kept, students, strict=True):
        student_BLD = decoder.run_layer(i, student_BLD, start.calls[i], layer)
    size_BL1 = teacher_BLD.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    error = ((teacher_BLD.float() - student_BLD.float()) / size_BL1).square().mean()
    out_BLD = decoder.run_layers(student_BLD, start.calls, middle.stop, decoder.layer_count)
    logits_BLV = decoder.logits(out_BLD[:, :-1]).float()
    text = F.cross_entropy(logits_BLV.flatten(0, 1), batch_BL[:, 1:].flatten())
    return text + hidden_weight * error
