"""One forward pass over public text: harmonizers, and the moments that compression needs.

Layer by layer rather than batch by batch: the hidden states of all calibration tokens advance
through one layer at a time, so only one layer's moments are alive, and layers above the last middle
one are never run. Raw layers pass on their own output, so every harmonizer is fitted to the
undisturbed model.

Shapes: N windows, L length, D hidden, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blindtune.models.blocks import Harmonizer
from blindtune.models.decoder import Decoder
from blindtune.models.layer_inputs import LayerCall
from blindtune.offsite.model_owner.harmonizers import Moments, fit_harmonizer

SINK_POSITIONS = 1
"""Leading positions left out of the regression: the first token draws attention that has nowhere
to go, and its hidden state is up to a hundred times longer than any other."""


@dataclass(frozen=True)
class Calibration:
    """What one pass over the calibration text yields, in the order of the middle layers."""

    harmonizers: tuple[Harmonizer, ...]
    explained: tuple[float, ...]
    """Share of the variance of each layer's residual that its harmonizer explains."""
    second_moments: tuple[dict[str, Tensor], ...]
    """E[x x^T] [I, I] of the inputs of each layer's projections, by path inside the layer;
    projections that read the same input share one tensor."""


@torch.no_grad()
def calibrate(
    decoder: Decoder,
    windows_NL: Tensor,
    middle: range,
    *,
    rank: int,
    batch_size: int = 8,
    feed_forward: bool = False,
    on_layer: Callable[[int], None] | None = None,
) -> Calibration:
    """Fit a harmonizer to every middle layer, and collect the inputs' moments for compression.

    Memory beyond the model: N L D numbers for the hidden states, and one layer's moments.

    Args:
        windows_NL: token ids, all windows of one length.
        middle: indices of the middle layers.
        rank: of the harmonizers.
        feed_forward: also collect moments for the feed-forward projections.
        on_layer: called with the index of every layer that is done.
    """
    hidden_NLD, calls = _embed(decoder, windows_NL, batch_size)
    harmonizers, explained, second_moments = [], [], []
    for i in range(middle.stop):
        if i in middle:
            paths = [p.path for p in decoder.projections(i)]
            paths += [p.path for p in decoder.feed_forward(i)] if feed_forward else []
            moments = Moments(decoder.hidden_size)
            normalize = Harmonizer(decoder.hidden_size, 1).normalize
            with record_input_moments(decoder.layers[i], paths) as inputs:
                for before_BLD, after_BLD in _advance(decoder, i, hidden_NLD, calls, batch_size):
                    seen_BLD = before_BLD[:, SINK_POSITIONS:].float()
                    residual_BLD = after_BLD[:, SINK_POSITIONS:].float() - seen_BLD
                    moments.add(normalize(seen_BLD).flatten(0, 1), residual_BLD.flatten(0, 1))
            fitted = fit_harmonizer(moments, rank, returns_tuple=decoder.family.returns_tuple)
            harmonizers.append(fitted[0])
            explained.append(fitted[1])
            means = {id(m): (m / windows_NL.numel()).cpu() for m in inputs.values()}
            second_moments.append({path: means[id(m)] for path, m in inputs.items()})
        else:
            for _ in _advance(decoder, i, hidden_NLD, calls, batch_size):
                pass
        if on_layer is not None:
            on_layer(i)
    return Calibration(tuple(harmonizers), tuple(explained), tuple(second_moments))


def _embed(
    decoder: Decoder, windows_NL: Tensor, batch_size: int
) -> tuple[Tensor, dict[int, tuple[LayerCall, ...]]]:
    """The hidden states that enter layer 0, and the layers' arguments by batch size."""
    calls: dict[int, tuple[LayerCall, ...]] = {}
    hidden = []
    for batch_BL in windows_NL.split(batch_size):
        start = decoder.begin(batch_BL.to(decoder.model.device))
        calls.setdefault(len(batch_BL), start.calls)
        hidden.append(start.hidden_BLD)
    return torch.cat(hidden), calls


def _advance(
    decoder: Decoder,
    i: int,
    hidden_NLD: Tensor,
    calls: dict[int, tuple[LayerCall, ...]],
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Take all hidden states through layer i, in place; yields (before, after) batch by batch."""
    for batch_BLD in hidden_NLD.split(batch_size):
        after_BLD = decoder.run_layer(i, batch_BLD, calls[len(batch_BLD)][i])
        yield batch_BLD, after_BLD
        batch_BLD.copy_(after_BLD)


@contextmanager
def record_input_moments(layer: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Sum x x^T [I, I] over all inputs x of the named linear modules while the context is open.

    Modules called one after the other on the same tensor (query, key, value) share one sum.
    """
    sums: dict[str, Tensor] = {}
    last: tuple[Tensor, str] | None = None

    def record(path: str, x: Tensor) -> None:
        nonlocal last
        if last is not None and x is last[0]:
            sums[path] = sums[last[1]]
            return
        rows = x.detach().flatten(0, -2).float()
        product = rows.T @ rows
        if path in sums:
            sums[path] += product
        else:
            sums[path] = product
        last = (x, path)

    handles = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: record(path, args[0])
        )
        for path in paths
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
