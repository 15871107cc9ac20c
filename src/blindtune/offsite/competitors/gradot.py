"""GradOT: compression that keeps gradients and spoils the loss (ACL 2025, arXiv 2507.04455).

What is removed changes a weight by delta; its score is |H delta|_1 - lambda sum(g * delta), with
the loss's gradient g and curvature H: the first part is how much gradients move (small is wanted),
the second, to first order, how much the loss rises (large is wanted). The lowest scores go.
Attention weights lose singular components, of which the largest 5 % always stay; feed-forward
networks lose inner channels. H is Kronecker-factored: H delta = G delta A with A = E[x x^T] of the
inputs and G = E[g g^T] of the outputs' gradients. No training: one forward pass that keeps what
enters every middle layer, and one backward pass, layer by layer from the top of the middle down.
Each layer runs again for its gradients, so one layer's curvature and activations are alive at a
time, beside M hidden states a token.

Left open by our sources, and decided here: G is of the empirical Fisher (the text's own next
tokens); lambda is relative, 1 makes the medians of both parts equal within a weight; every weight
keeps the same share; pruned channels are zeroed in place, because an emulator package has no
narrower layers.

Shapes: N windows, B batch, L length, D hidden, M middle layers, O output features, I input
features, R components, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blindtune.errors import ConfigError
from blindtune.exchange.packages.manifest import AdapterLayer, CompressedLayer, LayerEntry
from blindtune.models.blocks import LowRankLinear, split_parts
from blindtune.models.decoder import Decoder, Projection
from blindtune.models.layer_inputs import LayerCall
from blindtune.offsite.competitors.layer_drop import middle_layers
from blindtune.offsite.model_owner.compression import compressed_rank, put_factors

ALWAYS_KEPT = 0.05
"""Share of the singular components, the largest, that always stay."""


@dataclass(frozen=True, kw_only=True)
class GradotConfig:
    """How much goes, and how the two parts of the score are weighed."""

    adapter_layers: int = 2
    """N_a: layers at each end that stay raw and are tuned."""
    rank_kept: float = 0.8
    """Share of the attention weights' singular components that stays."""
    channels_kept: float = 0.9
    """Share of the feed-forward networks' inner channels that stays; 1 prunes none."""
    attention_lambda: float = 0.1
    """Weight of the loss's rise beside the gradients' change, in attention weights. 1 with small
    shares kept leaves a small model no better than noise."""
    feed_forward_lambda: float = 0.1
    """The same in feed-forward networks."""
    tokens: int = 4096
    """Of public text, for gradients and curvature."""
    batch_size: int = 4
    """Windows of one pass."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.adapter_layers < 1 or self.tokens < 2 or self.batch_size < 1:
            raise ConfigError(
                "expected adapter_layers >= 1, tokens >= 2 and batch_size >= 1, got "
                f"{self.adapter_layers}, {self.tokens}, {self.batch_size}"
            )
        if not 0 < self.rank_kept <= 1 or not 0 < self.channels_kept <= 1:
            raise ConfigError(
                "expected rank_kept and channels_kept above 0 and up to 1, got "
                f"{self.rank_kept}, {self.channels_kept}"
            )
        if self.attention_lambda < 0 or self.feed_forward_lambda < 0:
            raise ConfigError(
                "expected attention_lambda and feed_forward_lambda >= 0, got "
                f"{self.attention_lambda}, {self.feed_forward_lambda}"
            )


@final
@dataclass(eq=False)
class Curvature:
    """Sums over tokens for one projection; the gradient is of the mean loss of the text."""

    inputs_II: Tensor
    """x x^T."""
    outputs_OO: Tensor
    """g g^T, in the module's own row layout."""
    gradient_OI: Tensor
    """Of the weight: g x^T."""
    _input: Tensor | None = field(default=None, repr=False)


@final
@dataclass(eq=False)
class Descent:
    """One batch on its way back down through the middle layers."""

    calls: tuple[LayerCall, ...]
    entered: list[Tensor]
    """What enters each middle layer [B, L, D], the lowest first; the last is the next to go."""
    gradient_BLD: Tensor
    """Of the mean loss of the text, by what leaves that layer."""


@final
@dataclass(eq=False)
class Change:
    """What becomes of one layer; made while the model is still whole."""

    channels: Tensor | None
    """Inner channels to zero."""
    low_rank: list[tuple[Projection, LowRankLinear]]
    """The attention's projections, and what they keep."""


def gradot(
    model: PreTrainedModel, windows_NL: Tensor, config: GradotConfig
) -> tuple[list[LayerEntry], int]:
    """Turn the full model into GradOT's emulator, in place.

    Returns:
        What each layer is now, and the tokens that went through the model.

    Raises:
        ConfigError: no middle layer is left.
    """
    decoder = Decoder(model)
    middle = middle_layers(decoder, config.adapter_layers)
    used_NL = windows_NL[: max(1, config.tokens // windows_NL.shape[1])]
    entries: list[LayerEntry] = [AdapterLayer() for _ in range(decoder.layer_count)]
    descents = start_descents(decoder, used_NL, middle, config.batch_size)
    changes = {
        i: _decide(decoder, i, layer_curvature(decoder, i, descents), config)
        for i in reversed(middle)
    }
    for i, change in changes.items():
        entries[i] = CompressedLayer(ranks=_apply(decoder, i, change))
    return entries, used_NL.numel()


def start_descents(
    decoder: Decoder, windows_NL: Tensor, layers: range, batch_size: int
) -> list[Descent]:
    """Run every batch up to the loss, and its gradient down to the top of some layers."""
    model = decoder.model.requires_grad_(False)
    descents = []
    for batch_BL in windows_NL.to(model.device).split(batch_size):
        entered = []
        with torch.no_grad():
            start = decoder.begin(batch_BL)
            hidden_BLD = decoder.run_layers(start.hidden_BLD, start.calls, 0, layers.start)
            for i in layers:
                entered.append(hidden_BLD)
                hidden_BLD = decoder.run_layer(i, hidden_BLD, start.calls[i])
        hidden_BLD.requires_grad_(True)
        last_BLD = decoder.run_layers(hidden_BLD, start.calls, layers.stop, decoder.layer_count)
        logits_BLV = decoder.logits(last_BLD[:, :-1]).float()
        losses = F.cross_entropy(
            logits_BLV.flatten(0, 1), batch_BL[:, 1:].flatten(), reduction="sum"
        )
        mean = losses / windows_NL[:, 1:].numel()
        (gradient_BLD,) = torch.autograd.grad(mean, hidden_BLD)
        descents.append(Descent(start.calls, entered, gradient_BLD))
    return descents


def layer_curvature(decoder: Decoder, i: int, descents: Sequence[Descent]) -> dict[str, Curvature]:
    """A, G and the gradient of every projection of layer `i` by path; all descents pass it.

    Args:
        decoder: the model, as it was when the descents started.
        i: the layer above which they stand: the top one first, then each in turn.
        descents: from `start_descents`.
    """
    with _recording(decoder, i) as found:
        for descent in descents:
            entered_BLD = descent.entered.pop().requires_grad_(True)
            left_BLD = decoder.run_layer(i, entered_BLD, descent.calls[i])
            (descent.gradient_BLD,) = torch.autograd.grad(
                left_BLD, entered_BLD, descent.gradient_BLD
            )
    return found


@contextmanager
def _recording(decoder: Decoder, i: int) -> Iterator[dict[str, Curvature]]:
    found: dict[str, Curvature] = {}
    handles = []
    for projection in (*decoder.projections(i), *decoder.feed_forward(i)):
        rows, columns = sum(projection.sizes), projection.in_features
        like = next(projection.module.parameters())
        shapes = ((columns, columns), (rows, rows), (rows, columns))
        sums = Curvature(*(torch.zeros(shape, device=like.device) for shape in shapes))
        found[projection.path] = sums
        handles += _hooks(projection.module, sums)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hooks(module: nn.Module, sums: Curvature) -> list[torch.utils.hooks.RemovableHandle]:
    def forward(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums._input = args[0].detach().flatten(0, -2).float()

    def backward(_module: nn.Module, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        assert sums._input is not None
        gradient = outputs[0].detach().flatten(0, -2).float()
        sums.inputs_II += sums._input.T @ sums._input
        sums.outputs_OO += gradient.T @ gradient
        sums.gradient_OI += gradient.T @ sums._input
        sums._input = None

    return [
        module.register_forward_pre_hook(forward),
        module.register_full_backward_hook(backward),
    ]


def combine(moved: Tensor, rise: Tensor, weight: float) -> Tensor:
    """|H delta|_1 - lambda sum(g * delta), lambda relative to the medians of the parts."""
    scale = moved.median() / rise.abs().median().clamp_min(1e-30)
    return moved - weight * scale * rise


def component_scores(
    weight_OI: Tensor, outputs_OO: Tensor, inputs_II: Tensor, gradient_OI: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The score of removing each singular component, and the components themselves.

    Removing s u v^T is delta = -s u v^T, so |G delta A|_1 = s |G u|_1 |A v|_1 and
    sum(g * delta) = -s u^T g v.

    Returns:
        Scores [R], up = u [O, R], down = s v^T [R, I], largest component first.
    """
    u_OR, s_R, v_RI = torch.linalg.svd(weight_OI.float(), full_matrices=False)
    down_RI = s_R[:, None] * v_RI
    moved_R = (outputs_OO @ u_OR).abs().sum(0) * (down_RI @ inputs_II).abs().sum(1)
    rise_R = -((u_OR.T @ gradient_OI) * down_RI).sum(1)
    return combine(moved_R, rise_R, weight), u_OR, down_RI


def kept_components(scores_R: Tensor, rank: int) -> Tensor:
    """Positions of the components that stay: the largest 5 %, then those of the highest scores."""
    always = min(rank, max(1, int(ALWAYS_KEPT * len(scores_R))))
    order = scores_R[always:].argsort(descending=True)[: rank - always] + always
    return torch.cat([torch.arange(always, device=order.device), order]).sort().values


@torch.no_grad()
def _decide(decoder: Decoder, i: int, known: dict[str, Curvature], config: GradotConfig) -> Change:
    channels = None
    if config.channels_kept < 1:
        channels = _lowest_channels(decoder, i, known, config)
    low_rank = [
        (projection, _reduced(projection, known[projection.path], config))
        for projection in decoder.projections(i)
    ]
    return Change(channels, low_rank)


def _reduced(projection: Projection, sums: Curvature, config: GradotConfig) -> LowRankLinear:
    """A projection's kept components."""
    ranks = tuple(
        compressed_rank((size, projection.in_features), config.rank_kept, "kept")
        for size in projection.sizes
    )
    module = projection.low_rank(ranks)
    for part, weight_OI in enumerate(projection.weights()):
        scores_R, up_OR, down_RI = component_scores(
            weight_OI,
            *_part_of(projection, sums, part),
            config.attention_lambda,
        )
        kept = kept_components(scores_R, ranks[part])
        module.set_factors(part, up_OR[:, kept], down_RI[kept])
    return module


@torch.no_grad()
def _apply(decoder: Decoder, i: int, change: Change) -> dict[str, tuple[int, ...]]:
    """Change a layer in place; ranks of its factored projections by path."""
    if change.channels is not None:
        _zero_channels(decoder, i, change.channels)
    factored: dict[str, tuple[int, ...]] = {}
    for projection, module in change.low_rank:
        factored |= put_factors(decoder.layers[i], projection, module)
    return factored


def _part_of(projection: Projection, sums: Curvature, part: int) -> tuple[Tensor, Tensor, Tensor]:
    """(G, A, gradient) of one part of a fused projection."""

    def rows(matrix: Tensor) -> Tensor:
        return split_parts(matrix.T, projection.sizes, projection.heads)[part].T

    return rows(rows(sums.outputs_OO).T), sums.inputs_II, rows(sums.gradient_OI)


@torch.no_grad()
def channel_scores(
    maps: list[tuple[Tensor, Curvature]], down_OC: Tensor, down: Curvature, weight: float
) -> Tensor:
    """The score of removing each inner channel [C]: its rows below, its column above.

    Args:
        maps: (weight [C, I], curvature) of the maps that make the inner channels.
        down_OC: the weight of the map that reads them.
        down: its curvature.
        weight: relative lambda.
    """
    moved_C = (down.outputs_OO @ down_OC).abs().sum(0) * down.inputs_II.abs().sum(0)
    rise_C = -(down.gradient_OI * down_OC).sum(0)
    for weight_CI, sums in maps:
        moved_C = moved_C + sums.outputs_OO.abs().sum(0) * (weight_CI @ sums.inputs_II).abs().sum(1)
        rise_C = rise_C - (sums.gradient_OI * weight_CI).sum(1)
    return combine(moved_C, rise_C, weight)


def _lowest_channels(
    decoder: Decoder, i: int, known: dict[str, Curvature], config: GradotConfig
) -> Tensor:
    """The inner channels of the lowest scores."""
    *makers, reader = decoder.feed_forward(i)
    maps = []
    for projection in makers:
        sums = known[projection.path]
        for part, weight_CI in enumerate(projection.weights()):
            outputs_CC, inputs_II, gradient_CI = _part_of(projection, sums, part)
            maps.append((weight_CI, Curvature(inputs_II, outputs_CC, gradient_CI)))
    (down_OC,) = reader.weights()
    scores_C = channel_scores(maps, down_OC, known[reader.path], config.feed_forward_lambda)
    count = len(scores_C) - max(1, int(config.channels_kept * len(scores_C)))
    return scores_C.argsort()[:count]


def _zero_channels(decoder: Decoder, i: int, gone: Tensor) -> None:
    """Zero inner channels, what makes them and what reads them, in place."""
    *makers, reader = decoder.feed_forward(i)
    weight = reader.module.get_parameter("weight")
    if isinstance(reader.module, Conv1D):
        weight[gone] = 0
    else:
        weight[:, gone] = 0
    for projection in makers:
        for part in range(len(projection.sizes)):
            _zero_rows(projection, part, gone)


def _zero_rows(projection: Projection, part: int, rows: Tensor) -> None:
    """Zero output rows of one part of a projection, bias included."""
    assert projection.heads is None, "feed-forward maps are not laid out by heads"
    rows = rows + sum(projection.sizes[:part])
    weight = projection.module.get_parameter("weight")
    if isinstance(projection.module, Conv1D):
        weight[:, rows] = 0
    else:
        weight[rows] = 0
    if isinstance(projection.module.bias, Tensor):
        projection.module.bias[rows] = 0
