"""An emulator that does worse than the full model by a fixed margin on every token.

In the spirit of loss landscape elevation (LLEOT, Findings of ACL 2026): if the emulator's loss is
the full model's plus a constant, wherever one looks, then it is worth less on its own while its
gradients are the full model's. Evenly spaced middle layers become harmonizers, which are trained on
public text to minimise the mean over tokens of (l_emulator - l_full - margin)^2; everything else
stays raw.

Decided here, because only the abstract was at hand: the margin is asked token by token, harmonizers
alone are trained, and they start as identities. It is no re-implementation of the authors' system.

Shapes: N windows, B batch, L length, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from blindtune.errors import ConfigError
from blindtune.exchange.packages.manifest import AdapterLayer, HarmonizerLayer, LayerEntry, RawLayer
from blindtune.models.blocks import Harmonizer
from blindtune.models.decoder import Decoder
from blindtune.models.surgery import replace_layer
from blindtune.offsite.competitors.layer_drop import kept_count, middle_layers
from blindtune.offsite.model_owner.emulation import uniform_choice
from blindtune.training.windows import WindowPlan, window_steps


@dataclass(frozen=True, kw_only=True)
class FixedMarginConfig:
    """How far above the full model, and how it is trained."""

    adapter_layers: int = 2
    """N_a: layers at each end that stay raw and are tuned."""
    alpha: float = 0.25
    """Share of the middle layers that become harmonizers."""
    margin: float = 1.0
    """Nats a token above the full model."""
    harmonizer_rank: int = 128
    """R, units of a harmonizer."""
    steps: int = 160
    """Of training the harmonizers."""
    batch_size: int = 4
    """Windows a step."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW, falling linearly to 0."""
    seed: int = 0
    """Of the batches and of the harmonizers' first weights."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if min(self.adapter_layers, self.harmonizer_rank, self.steps, self.batch_size) < 1:
            raise ConfigError(
                "expected adapter_layers, harmonizer_rank, steps and batch_size >= 1, got "
                f"{self.adapter_layers}, {self.harmonizer_rank}, {self.steps}, {self.batch_size}"
            )
        if not 0 < self.alpha < 1 or self.margin < 0 or self.learning_rate <= 0:
            raise ConfigError(
                "expected alpha between 0 and 1, margin >= 0 and learning_rate > 0, got "
                f"{self.alpha}, {self.margin}, {self.learning_rate}"
            )


def raise_by_margin(
    model: PreTrainedModel, windows_NL: Tensor, config: FixedMarginConfig
) -> tuple[list[LayerEntry], int]:
    """Turn the full model into a fixed-margin emulator, in place.

    Returns:
        What each layer is now, and the tokens that went through the model.

    Raises:
        ConfigError: alpha replaces no middle layer.
    """
    decoder = Decoder(model)
    middle = middle_layers(decoder, config.adapter_layers)
    kept = uniform_choice(len(middle), kept_count(middle, config.alpha))
    replaced = [i for k, i in enumerate(middle) if k not in kept]
    if not replaced:
        raise ConfigError(
            f"expected alpha to replace a layer, got {config.alpha} of {len(middle)}: choose a "
            "larger one"
        )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.seed)
        stand_ins = {
            i: Harmonizer(
                decoder.hidden_size,
                config.harmonizer_rank,
                returns_tuple=decoder.family.returns_tuple,
            ).to(model.device)
            for i in replaced
        }
    train_to_margin(decoder, stand_ins, windows_NL, config)
    for i, stand_in in stand_ins.items():
        replace_layer(model, i, stand_in.to(model.dtype))
    entries: list[LayerEntry] = []
    for i in range(decoder.layer_count):
        if i not in middle:
            entries.append(AdapterLayer())
        else:
            rank = config.harmonizer_rank
            entries.append(HarmonizerLayer(rank=rank) if i in stand_ins else RawLayer())
    return entries, config.steps * config.batch_size * windows_NL.shape[1]


def train_to_margin(
    decoder: Decoder,
    stand_ins: Mapping[int, Harmonizer],
    windows_NL: Tensor,
    config: FixedMarginConfig,
) -> list[float]:
    """Train the stand-ins, in place; returns the objective of every step before its update."""
    decoder.model.requires_grad_(False)
    trained = nn.ModuleList(stand_ins.values())
    plan = WindowPlan(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        schedule="linear",
        warmup_steps=0,
        seed=config.seed,
    )

    def objective(batch_BL: Tensor) -> Tensor:
        with torch.no_grad():
            full_N = token_losses(decoder, batch_BL, {})
        return (token_losses(decoder, batch_BL, stand_ins) - full_N - config.margin).square().mean()

    objectives = list(window_steps(trained, windows_NL, objective, plan))
    trained.requires_grad_(False)
    return objectives


def token_losses(decoder: Decoder, batch_BL: Tensor, stand_ins: Mapping[int, nn.Module]) -> Tensor:
    """Cross-entropy of every predicted token [B (L-1)], some layers run by their stand-ins."""
    with torch.no_grad():
        start = decoder.begin(batch_BL)
    hidden_BLD = start.hidden_BLD
    for i in range(decoder.layer_count):
        hidden_BLD = decoder.run_layer(i, hidden_BLD, start.calls[i], stand_ins.get(i))
    logits_BLV = decoder.logits(hidden_BLD[:, :-1]).float()
    return F.cross_entropy(logits_BLV.flatten(0, 1), batch_BL[:, 1:].flatten(), reduction="none")
