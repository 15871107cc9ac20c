"""What an eta means for one vocabulary, and which eta gives a wanted share of changed tokens.

Two figures make eta readable: the mean norm of the noise, D / eta, beside the typical distance of a
word to its nearest neighbour; and the share of tokens that token mode would change. In D
dimensions a random direction is almost orthogonal to every neighbour, so the noise must be several
times the neighbour distance before anything changes (about 6 times for half of the tokens of
SmolLM2-135M, D = 576), and then nearly all changes soon: the first figure alone misleads.

The cell of points nearest to a word is convex and holds the word. Along a drawn direction a word
therefore changes at one radius and stays changed beyond it:

    r = min over rows w of ||w - e||^2 / (2 v.(w - e)),  where v.(w - e) > 0.

With l ~ Gamma(D, 1) the word changes if and only if eta < l / r, its critical eta. A sample of
critical eta is the whole curve share(eta) at once, and its quantiles invert the curve: what
bisection over repeated simulations would find, in one pass over the vocabulary.

The share is a diagnostic, no guarantee: an unchanged token is public, a changed one may still be
guessed from its neighbours and its context. In vector mode read it as the share of tokens that a
nearest-neighbour attack gets wrong. Given ids of private texts, the figures describe these texts.

Shapes: N sampled tokens, V vocabulary, D hidden, T rows of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from blindtune.errors import ConfigError, DataError
from blindtune.privacy.entropy import uniforms_from
from blindtune.privacy.metric_dp import d_chi_noise
from blindtune.privacy.nearest import Tiling

SAME_ROW = 1e-12  # squared distance below this share of the squared norms: one word


@dataclass(frozen=True, kw_only=True)
class NoiseLevel:
    """One eta (per token, per unit of L2 distance) in terms of a vocabulary."""

    eta: float
    """Per token, per unit of distance between word embeddings."""
    mean_norm: float
    """Expected norm of the noise, D / eta; of the exponential mechanism the expected distance of
    the word that comes out."""
    neighbour_distance: float
    """Median distance of a word to its nearest other word."""
    changed_share: float
    """Share of tokens that come out as others, estimated from `samples`."""
    changed_share_error: float
    """Its standard error, with one more sample of each outcome so that it is never 0."""
    samples: int
    """Tokens sampled."""
    drawn: bool = False
    """Whether words are drawn by the exponential mechanism."""

    def __str__(self) -> str:
        what = "words drawn at a mean distance of" if self.drawn else "noise of mean norm"
        return (
            f"eta {self.eta:.4g} per token: {what} {self.mean_norm:.3g}, "
            f"{self.mean_norm / self.neighbour_distance:.3g} x the median distance "
            f"{self.neighbour_distance:.3g} to the nearest word; changes "
            f"{self.changed_share:.1%} +- {self.changed_share_error:.1%} of tokens"
        )


@final
class NoiseSurvey:
    """Measures a vocabulary once; answers for every eta.

    Cost: two float64 matmuls of N x V x D.

    Args:
        table_VD: the word embedding's weight.
        token_ids: tokens to sample from, as often as they occur (a text, public or the customer's
            own). None: every word of the vocabulary equally often, rare ones included.
        samples: N; the standard error of a share is at most 0.5 / sqrt(N).
        tiling: speed and memory.
        testing_seed: for tests only. Warns.

    Attributes:
        neighbour_distance_N: distance of each sampled word to its nearest other (rows that
            agree to a millionth are one word).
        critical_eta_N: ascending; a sampled token changes below its critical eta.

    Raises:
        DataError: no tokens, ids outside the vocabulary, or a table of equal rows.
    """

    def __init__(
        self,
        table_VD: Tensor,
        token_ids: Tensor | None = None,
        *,
        samples: int = 512,
        tiling: Tiling | None = None,
        testing_seed: int | None = None,
    ) -> None:
        word_N = sampled_words(table_VD, token_ids, samples)
        table_VD = table_VD.detach()
        self.dimension = table_VD.shape[1]
        word_ND = table_VD[word_N].double()
        noise_ND = d_chi_noise(samples, self.dimension, 1.0, uniforms_from(testing_seed))
        noise_ND = noise_ND.to(table_VD.device)
        length_N = noise_ND.norm(dim=1)
        nearest_N, radius_N = _walk_out(
            word_ND, noise_ND / length_N[:, None], table_VD, (tiling or Tiling()).rows
        )
        if not bool(nearest_N.isfinite().all()):
            raise DataError("expected at least two different, finite rows in the embedding table")
        self.neighbour_distance_N = nearest_N.cpu()
        self.critical_eta_N = (length_N / radius_N).sort().values.cpu()

    def at(self, eta: float) -> NoiseLevel:
        """The level of noise that `eta` (per token, per unit of distance) makes."""
        if not 0 < eta < math.inf:
            raise ConfigError(f"expected a positive, finite eta, got {eta}")
        samples = len(self.critical_eta_N)
        changed = int((self.critical_eta_N > eta).sum())
        smoothed = (changed + 1) / (samples + 2)
        return NoiseLevel(
            eta=eta,
            mean_norm=self.dimension / eta,
            neighbour_distance=self.neighbour_distance_N.median().item(),
            changed_share=changed / samples,
            changed_share_error=math.sqrt(smoothed * (1 - smoothed) / samples),
            samples=samples,
        )

    def eta_for(self, changed_share: float) -> float:
        """The eta at which token mode changes this share of tokens.

        Its error is the share's: look at `at(eta)`. Raises ConfigError where the sample cannot
        tell (a share within one sample of 0 or 1, or one that no noise reaches).
        """
        samples = len(self.critical_eta_N)
        kept = round((1 - changed_share) * samples)
        if not 1 <= kept < samples:
            raise ConfigError(
                f"expected a changed share between {1 / samples:.2g} and {1 - 1 / samples:.4g} "
                f"with {samples} samples, got {changed_share}"
            )
        below, above = self.critical_eta_N[kept - 1].item(), self.critical_eta_N[kept].item()
        if not 0 < below <= above < math.inf:
            raise ConfigError(f"no noise changes {changed_share:.1%} of these tokens")
        return math.sqrt(below * above)


def sampled_words(table_VD: Tensor, token_ids: Tensor | None, samples: int) -> Tensor:
    """Words [N] to survey: tokens as often as they occur, or every word of the table.

    They are evenly spread over the occurrences in the order of ids: the middles of N equal parts.
    So a word that is n of M occurrences is taken N n / M times, rounded up or down; the order of
    texts, in which equal lengths or a template could beat against the spacing, plays no part; and
    two surveys of one text look at the same words.

    Raises:
        ConfigError: fewer than 2 samples. DataError: no tokens, or ids outside the vocabulary.
    """
    if samples < 2:
        raise ConfigError(f"expected at least 2 samples, got {samples}")
    pool = torch.arange(len(table_VD)) if token_ids is None else token_ids.reshape(-1).cpu()
    if not len(pool) or not 0 <= int(pool.min()) <= int(pool.max()) < len(table_VD):
        raise DataError(f"expected token ids from 0 to {len(table_VD) - 1}, and at least one")
    middle_N = (2 * torch.arange(samples) + 1) * len(pool) // (2 * samples)
    word_N: Tensor = pool.sort().values[middle_N].to(table_VD.device)
    return word_N


def _walk_out(
    word_ND: Tensor, direction_ND: Tensor, table_VD: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Distance to the nearest other row, and radius at which the direction leaves the cell."""
    word_squared_N1 = word_ND.square().sum(1, keepdim=True)
    along_N1 = (direction_ND * word_ND).sum(1, keepdim=True)
    nearest_N = word_ND.new_full((len(word_ND),), torch.inf)
    radius_N = nearest_N.clone()
    for tile_TD in table_VD.split(rows):
        row_TD = tile_TD.double()
        squared_T = row_TD.square().sum(1)
        gap_NT = torch.addmm(squared_T + word_squared_N1, word_ND, row_TD.T, alpha=-2)
        gap_NT[gap_NT <= SAME_ROW * (squared_T + word_squared_N1)] = torch.inf
        reach_NT = 2 * (direction_ND @ row_TD.T - along_N1)
        exit_NT = torch.where(reach_NT > 0, gap_NT / reach_NT, torch.inf)
        nearest_N = torch.minimum(nearest_N, gap_NT.amin(1))
        radius_N = torch.minimum(radius_N, exit_NT.amin(1))
    return nearest_N.sqrt(), radius_N
