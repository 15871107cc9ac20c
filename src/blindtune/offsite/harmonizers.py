"""Harmonizers in closed form: the best low-rank stand-in for a layer, by reduced-rank regression.

A decoder layer adds a residual f(x) - x to the hidden state x. A harmonizer of rank R predicts that
residual from norm(x). Without gradients, the best linear prediction of rank R follows from second
moments alone, which one forward pass over calibration text collects. The ReLU of the harmonizer
costs nothing here: |w . norm(x)| <= |w| sqrt(D) for every x, so a bias of that size keeps a unit
active on all inputs, and R units carry a linear map of rank R exactly.

Shapes: N tokens, D hidden, R rank.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from blindtune.models.blocks import Harmonizer


@final
class Moments:
    """Running first and second moments of (norm(x), f(x) - x) of one layer, in float64."""

    def __init__(self, hidden_size: int) -> None:
        self.tokens = 0
        self.feature_sum_D = torch.zeros(hidden_size, dtype=torch.float64)
        self.residual_sum_D = torch.zeros(hidden_size, dtype=torch.float64)
        self.features_DD = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        self.cross_DD = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        self.residual_energy = 0.0

    def add(self, features_ND: Tensor, residual_ND: Tensor) -> None:
        """Add tokens. The products run in the inputs' precision, the sums in float64."""
        self.tokens += features_ND.shape[0]
        self.feature_sum_D += features_ND.sum(0).cpu()
        self.residual_sum_D += residual_ND.sum(0).cpu()
        self.features_DD += (features_ND.T @ features_ND).cpu()
        self.cross_DD += (features_ND.T @ residual_ND).cpu()
        self.residual_energy += float(residual_ND.double().pow(2).sum())


@torch.no_grad()
def fit_harmonizer(
    moments: Moments, rank: int, *, ridge: float = 1e-3, returns_tuple: bool = False
) -> tuple[Harmonizer, float]:
    """The harmonizer of rank R whose residual is closest to the layer's, in closed form.

    Reduced-rank regression: the ridge solution W = (C + ridge mean(diag C) I)^-1 K of the centred
    moments C = cov(norm(x)), K = cov(norm(x), f(x) - x) is projected onto the R leading
    eigenvectors of the covariance W^T C W of what it predicts (Izenman 1975).

    Args:
        moments: of at least one token.
        rank: R; capped at D.
        ridge: regularisation relative to the mean variance of the features.
        returns_tuple: what the family's layers return.

    Returns:
        The harmonizer (float32), and the share of the residual's variance that it explains on the
        calibration tokens (1 = all, 0 = no better than its mean).
    """
    assert moments.tokens > 0, "no calibration tokens were added"
    size = moments.feature_sum_D.shape[0]
    rank = min(rank, size)
    mean_in_D = moments.feature_sum_D / moments.tokens
    mean_out_D = moments.residual_sum_D / moments.tokens
    covariance_DD = moments.features_DD / moments.tokens - torch.outer(mean_in_D, mean_in_D)
    cross_DD = moments.cross_DD / moments.tokens - torch.outer(mean_in_D, mean_out_D)
    variance = moments.residual_energy / moments.tokens - float(mean_out_D.pow(2).sum())

    damped_DD = covariance_DD + ridge * covariance_DD.diagonal().mean() * torch.eye(size).double()
    weight_DD = torch.linalg.solve(damped_DD, cross_DD)
    _, vectors_DD = torch.linalg.eigh(weight_DD.T @ covariance_DD @ weight_DD)
    up_DR = vectors_DD[:, -rank:].flip(-1)
    down_RD = (weight_DD @ up_DR).T

    predicted_DD = down_RD.T @ up_DR.T
    error = (
        variance
        - 2 * float((predicted_DD * cross_DD).sum())
        + float((predicted_DD * (covariance_DD @ predicted_DD)).sum())
    )
    bias_out_D = mean_out_D - up_DR @ (down_RD @ mean_in_D)
    harmonizer = _linear_harmonizer(down_RD, up_DR, bias_out_D, returns_tuple)
    return harmonizer, 1 - error / max(variance, 1e-30)


def _linear_harmonizer(
    down_RD: Tensor, up_DR: Tensor, bias_D: Tensor, returns_tuple: bool
) -> Harmonizer:
    """The harmonizer that computes x + up (down norm(x)) + bias on every input, ReLU and all.

    norm(x) has length at most sqrt(D), so a unit with bias |down_r| sqrt(D) is never cut off; the
    output bias takes the constant away again. Units are scaled to equal length first, which keeps
    the constants small.
    """
    rank, size = down_RD.shape
    harmonizer = Harmonizer(size, rank, returns_tuple=returns_tuple)
    length_R = down_RD.norm(dim=1).clamp_min(1e-12)
    scale_R = length_R.sqrt()
    down_RD, up_DR = down_RD / scale_R[:, None], up_DR * scale_R
    shift_R = down_RD.norm(dim=1) * size**0.5
    harmonizer.down.weight.copy_(down_RD)
    harmonizer.down.bias.copy_(shift_R)
    harmonizer.up.weight.copy_(up_DR)
    harmonizer.up.bias.copy_(bias_D - up_DR @ shift_R)
    return harmonizer
