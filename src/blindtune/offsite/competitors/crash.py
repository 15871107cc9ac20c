"""CRaSh: clustering, removing and sharing layers (Zhang et al., EMNLP 2023, arXiv 2310.15477).

Adjacent middle layers whose outputs are alike (linear CKA) are merged into clusters; of each
cluster only the centre stays, and the places of the others are filled with copies of it. No
training.

Left open by our sources, and decided here: two clusters are as alike as their members are on
average (average linkage); the centre of an even cluster is its lower middle; a place is filled by
the centre of its own cluster. An emulator package has no shared layers, so the copies are stored:
the package is as large as the full model, although `alpha` of its middle layers hold nothing new.

Shapes: N windows, L length, D hidden, T tokens, M middle layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blindtune.errors import ConfigError
from blindtune.exchange.packages.manifest import LayerEntry
from blindtune.models.decoder import Decoder
from blindtune.offsite.competitors.layer_drop import keep_middle, kept_count, middle_layers
from blindtune.offsite.model_owner.calibration import SINK_POSITIONS


@dataclass(frozen=True, kw_only=True)
class CrashConfig:
    """Clustering, removing, sharing."""

    adapter_layers: int = 2
    """N_a: layers at each end that stay raw and are tuned."""
    alpha: float = 0.25
    """Share of the middle layers that are removed (rounded to whole layers)."""
    tokens: int = 2048
    """Of public text, for the likeness of layers."""
    share: bool = True
    """Fill the places of removed layers with copies of their cluster's centre; off: leave them
    out, which makes a shorter emulator (the paper's ablation)."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.adapter_layers < 1 or not 0 <= self.alpha < 1 or self.tokens < 2:
            raise ConfigError(
                "expected adapter_layers >= 1, alpha in [0, 1) and tokens >= 2, got "
                f"{self.adapter_layers}, {self.alpha}, {self.tokens}"
            )


def crash(
    model: PreTrainedModel, windows_NL: Tensor, config: CrashConfig
) -> tuple[list[LayerEntry], int]:
    """Turn the full model into CRaSh's emulator, in place.

    Returns:
        What each layer is now, and the tokens that went through the model.

    Raises:
        ConfigError: no middle layer is left.
    """
    decoder = Decoder(model)
    middle = middle_layers(decoder, config.adapter_layers)
    used_NL = windows_NL[: max(1, config.tokens // windows_NL.shape[1])]
    likeness_MM = layer_likeness(decoder, used_NL, middle)
    clusters = adjacent_clusters(likeness_MM, kept_count(middle, config.alpha))
    filled = [
        middle[(cluster.start + cluster.stop - 1) // 2]
        for cluster in clusters
        for _ in range(len(cluster) if config.share else 1)
    ]
    return keep_middle(model, middle, filled), used_NL.numel()


@torch.no_grad()
def layer_likeness(decoder: Decoder, windows_NL: Tensor, middle: range) -> Tensor:
    """Linear CKA [M, M] between the outputs of middle layers, first tokens of windows left out."""
    outputs = []
    start = decoder.begin(windows_NL.to(decoder.model.device))
    hidden_NLD = decoder.run_layers(start.hidden_BLD, start.calls, 0, middle.start)
    for i in middle:
        hidden_NLD = decoder.run_layer(i, hidden_NLD, start.calls[i])
        outputs.append(hidden_NLD[:, SINK_POSITIONS:].flatten(0, 1).float())
    count = len(middle)
    likeness_MM = torch.eye(count)
    for i in range(count):
        for j in range(i):
            likeness_MM[i, j] = likeness_MM[j, i] = linear_cka(outputs[i], outputs[j])
    return likeness_MM


def linear_cka(x_TD: Tensor, y_TD: Tensor) -> float:
    """|Y^T X|^2 / (|X^T X| |Y^T Y|) of centred representations: 1 up to rotation and scale.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), section 3.
    """
    x_TD, y_TD = x_TD - x_TD.mean(0), y_TD - y_TD.mean(0)
    cross = torch.linalg.matrix_norm(y_TD.T @ x_TD).square()
    own = torch.linalg.matrix_norm(x_TD.T @ x_TD) * torch.linalg.matrix_norm(y_TD.T @ y_TD)
    return float(cross / own.clamp_min(1e-30))


def adjacent_clusters(likeness_MM: Tensor, count: int) -> list[range]:
    """Merge neighbours, the most alike first, until `count` clusters of positions are left."""
    clusters = [range(i, i + 1) for i in range(len(likeness_MM))]
    while len(clusters) > count:
        pairs = [
            float(likeness_MM[a.start : a.stop, b.start : b.stop].mean())
            for a, b in pairwise(clusters)
        ]
        at = max(range(len(pairs)), key=pairs.__getitem__)
        merged = range(clusters[at].start, clusters[at + 1].stop)
        clusters[at : at + 2] = [merged]
    return clusters
