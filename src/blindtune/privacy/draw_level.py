"""What an eta of the exponential mechanism means for one vocabulary (`word_sampling`).

The companion of `noise_level`: no noise is drawn here, because the share of tokens that change is
known for every word, 1 - P(w | w) = 1 - 1/Z(w). It falls from (V-1)/V to 0 as eta grows, so
bisection finds the eta for a wanted share. Each of V words weighs exp(-eta/2 d), so eta d must be
about 2 ln V before a word is more likely to stay than to change.

The share is a diagnostic, no guarantee, and its error is that of the sampled tokens alone (as if
they had been taken by chance: evenly spread ones err less).

Shapes: N sampled tokens, U different ones, V vocabulary.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from blindtune.errors import ConfigError, DataError
from blindtune.privacy.nearest import NearestRows, Tiling
from blindtune.privacy.noise_level import NoiseLevel, sampled_words
from blindtune.privacy.word_sampling import word_distances

WORDS = 64  # whose distances are held in float64 at once
SAME_ROW = 1e-6  # words nearer than this share of their norms are one


@final
class DrawSurvey:
    """Measures a vocabulary once; answers for every eta, as `NoiseSurvey` does.

    Memory: 4 bytes for each sampled word and row of the table.

    Args:
        table_VD: the word embedding's weight.
        token_ids: tokens to sample from, as often as they occur. None: every word equally often.
        samples: N.
        tiling: speed and memory.

    Attributes:
        neighbour_distance_N: distance of each sampled word to its nearest other.

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
    ) -> None:
        word_N = sampled_words(table_VD, token_ids, samples)
        word_U, self._place_N = word_N.unique(return_inverse=True)
        rows = NearestRows(table_VD, tiling)
        distances, nearest = [], []
        for words in word_U.split(WORDS):
            distance_UV = word_distances(rows, words)
            distances.append(distance_UV.float())
            norm_U1 = rows.squared_norms_V[words].sqrt()[:, None]
            distance_UV[distance_UV <= SAME_ROW * norm_U1] = torch.inf
            nearest.append(distance_UV.amin(1))
        self._distances = distances
        self.neighbour_distance_N = torch.cat(nearest)[self._place_N].cpu()
        if not bool(self.neighbour_distance_N.isfinite().all()):
            raise DataError("expected at least two different rows in the embedding table")

    def at(self, eta: float) -> NoiseLevel:
        """What `eta` (per token, per unit of distance) does to these tokens."""
        if not 0 < eta < math.inf:
            raise ConfigError(f"expected a positive, finite eta, got {eta}")
        changed_N, distance_N = self._outcome(eta)
        samples = len(changed_N)
        smoothed = torch.cat((changed_N, changed_N.new_tensor([0.0, 1.0])))  # as `NoiseSurvey`
        return NoiseLevel(
            eta=eta,
            mean_norm=distance_N.mean().item(),
            neighbour_distance=self.neighbour_distance_N.median().item(),
            changed_share=changed_N.mean().item(),
            changed_share_error=smoothed.std().item() / math.sqrt(samples),
            samples=samples,
            drawn=True,
        )

    def eta_for(self, changed_share: float) -> float:
        """The eta at which this share of the tokens comes out as others.

        Raises:
            ConfigError: a share that no eta reaches.
        """
        below, above = 1e-6, 1e6  # what a mechanism takes
        for eta, fits in ((below, 1.0), (above, -1.0)):
            share = self._outcome(eta)[0].mean().item()
            if not fits * (share - changed_share) > 0:
                raise ConfigError(
                    f"expected a changed share that some eta reaches, got {changed_share}: at eta "
                    f"{eta:g} {share:.3g} of these tokens change"
                )
        while above / below > 1 + 1e-4:
            middle = math.sqrt(below * above)
            if self._outcome(middle)[0].mean().item() > changed_share:
                below = middle
            else:
                above = middle
        return math.sqrt(below * above)

    def _outcome(self, eta: float) -> tuple[Tensor, Tensor]:
        """Probability of change, and expected distance, of every sampled token (float64 [N])."""
        changed, expected = [], []
        for distance_UV in self._distances:
            weight_UV = torch.exp(distance_UV * (-eta / 2))
            sum_U = weight_UV.sum(1).double()
            changed.append(1 - 1 / sum_U)
            expected.append((weight_UV * distance_UV).sum(1).double() / sum_U)
        place_N = self._place_N
        return torch.cat(changed)[place_N].cpu(), torch.cat(expected)[place_N].cpu()
