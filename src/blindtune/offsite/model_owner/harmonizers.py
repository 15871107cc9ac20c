"""Harmonizers in closed form: the best low-rank stand-in for a layer, by reduced-rank regression.

A decoder layer adds a residual f(x) - x to the hidden state x. A harmonizer predicts that residual
from norm(x). Without gradients, the best linear prediction of a given rank follows from second
moments alone, which one forward pass over calibration text collects. Since a = ReLU(a) - ReLU(-a),
two units of a harmonizer carry one linear direction exactly: R units carry a linear map of rank
R/2, and further learning starts from there with all units alive.

Shapes: N tokens, D hidden, R rank (units), P pairs of units.
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
    """The best linear harmonizer of R units (linear rank R/2, at least 1), in closed form.

    Reduced-rank regression: the ridge solution W = (C + ridge mean(diag C) I)^-1 K of the centred
    moments C = cov(norm(x)), K = cov(norm(x), f(x) - x) is projected onto the leading
    eigenvectors of the covariance W^T C W of what it predicts (Izenman 1975).

    Args:
        moments: of at least one token.
        rank: R, the number of units; an odd one leaves a unit at zero. Capped at 2 D.
        ridge: regularisation relative to the mean variance of the features.
        returns_tuple: what the family's layers return.

    Returns:
        The harmonizer (float32), and the share of the residual's variance that it explains on the
        calibration tokens (1 = all, 0 = no better than its mean).
    """
    assert moments.tokens > 0, "no calibration tokens were added"
    size = moments.feature_sum_D.shape[0]
    rank = min(rank, 2 * size)
    pairs = max(1, rank // 2)
    mean_in_D = moments.feature_sum_D / moments.tokens
    mean_out_D = moments.residual_sum_D / moments.tokens
    covariance_DD = moments.features_DD / moments.tokens - torch.outer(mean_in_D, mean_in_D)
    cross_DD = moments.cross_DD / moments.tokens - torch.outer(mean_in_D, mean_out_D)
    variance = moments.residual_energy / moments.tokens - float(mean_out_D.pow(2).sum())

    damped_DD = covariance_DD + ridge * covariance_DD.diagonal().mean() * torch.eye(size).double()
    weight_DD = torch.linalg.solve(damped_DD, cross_DD)
    _, vectors_DD = torch.linalg.eigh(weight_DD.T @ covariance_DD @ weight_DD)
    up_DP = vectors_DD[:, -pairs:].flip(-1)
    down_PD = (weight_DD @ up_DP).T

    predicted_DD = down_PD.T @ up_DP.T
    error = (
        variance
        - 2 * float((predicted_DD * cross_DD).sum())
        + float((predicted_DD * (covariance_DD @ predicted_DD)).sum())
    )
    bias_out_D = mean_out_D - up_DP @ (down_PD @ mean_in_D)
    harmonizer = _paired_harmonizer(down_PD, up_DP, bias_out_D, max(rank, 2), returns_tuple)
    return harmonizer, 1 - error / max(variance, 1e-30)


def _paired_harmonizer(
    down_PD: Tensor, up_DP: Tensor, bias_D: Tensor, rank: int, returns_tuple: bool
) -> Harmonizer:
    """The harmonizer that computes x + up (down norm(x)) + bias, with two units a direction (P).

    A direction's two factors are scaled to equal length, so that learning treats them alike.
    """
    pairs, size = down_PD.shape
    harmonizer = Harmonizer(size, rank, returns_tuple=returns_tuple)
    scale_P = (up_DP.norm(dim=0) / down_PD.norm(dim=1).clamp_min(1e-12)).sqrt()
    down_PD, up_DP = down_PD * scale_P[:, None], up_DP / scale_P.clamp_min(1e-12)
    for tensor in harmonizer.parameters():
        tensor.zero_()
    harmonizer.down.weight[:pairs] = down_PD
    harmonizer.down.weight[pairs : 2 * pairs] = -down_PD
    harmonizer.up.weight[:, :pairs] = up_DP
    harmonizer.up.weight[:, pairs : 2 * pairs] = -up_DP
    harmonizer.up.bias.copy_(bias_D)
    return harmonizer
