"""The exponential mechanism over a vocabulary: a word is drawn, the nearer the likelier.

Source: McSherry and Talwar 2007, with the distance as the score, for metric differential privacy
(Chatzikokolakis et al. 2013), on words as in Carvalho et al. 2021 (arXiv 2107.07928), but without
their truncation. A word w becomes w' with

    P(w' | w) = exp(-eta/2 ||e_w - e_w'||) / Z(w),   Z(w) = sum over v of exp(-eta/2 ||e_w - e_v||).

By the triangle inequality exp(-eta/2 ||e_x - e_w'||) and Z(x) each change by a factor of at most
exp(eta/2 ||e_x - e_x'||) from x to x', so P(w' | x) <= exp(eta ||e_x - e_x'||) P(w' | x'): the
guarantee of d_chi at the same eta, with its conditions and all that it does not cover
(`metric_dp`). Here the whole vocabulary is the range, special tokens and unused rows too.

How it is drawn: the largest of log-probability + Gumbel noise is a draw from a softmax (Gumbel
1954), and so is first a block of the vocabulary by its sum, then a word inside it. Two short rows
of noise stand for one of V numbers, without approximation.

Not covered beside what `metric_dp` names: distances are float64, to a relative error below 1e-7,
and uniform numbers have 53 bits, so probabilities below 2^-53 are drawn as 0 or as 2^-53.

Shapes: N tokens, U words, V vocabulary, D hidden, K blocks, B words of a block, S words looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from blindtune.privacy.entropy import Uniforms
from blindtune.privacy.nearest import NearestRows, Tiling

PORTION_NUMBERS = 2**23  # float64 scores held at once
DRAWN_NUMBERS = 2**20  # Gumbel numbers held at once
CLOSE = 1e-6  # a squared distance below this share of the squared norms is measured again


def word_distances(rows: NearestRows, ids_U: Tensor) -> Tensor:
    """L2 distances of some words to every word of the table, float64 [U, V], 0 to themselves."""
    table_VD = rows.table_VD
    word_UD = table_VD[ids_U].double()
    squared_U1 = rows.squared_norms_V[ids_U][:, None]
    found = []
    for first in range(0, len(table_VD), rows.tiling.rows):
        row_TD = table_VD[first : first + rows.tiling.rows].double()
        norm_UT = squared_U1 + rows.squared_norms_V[first : first + len(row_TD)]
        gap_UT = torch.addmm(norm_UT, word_UD, row_TD.T, alpha=-2)
        word, row = (gap_UT <= CLOSE * norm_UT).nonzero().unbind(1)
        gap_UT[word, row] = (word_UD[word] - row_TD[row]).square().sum(1)
        found.append(gap_UT.sqrt_())
    return torch.cat(found, 1)


@final
class WordSampler:
    """Draws words of a table by the exponential mechanism.

    Args:
        table_VD: the vocabulary's embeddings, any floating dtype and device; not copied.
        tiling: rows of a tile: speed and memory, not probabilities.

    Attributes:
        rows: the table, checked and measured.

    Raises:
        DataError: the table is empty, not 2-D, or holds numbers that are not finite.
    """

    def __init__(self, table_VD: Tensor, tiling: Tiling | None = None) -> None:
        self.rows = NearestRows(table_VD, tiling)
        self._block = math.isqrt(len(table_VD) - 1) + 1

    @torch.no_grad()
    def draw(self, ids_N: Tensor, eta: float, uniforms: Uniforms) -> Tensor:
        """A fresh, independent draw for every token: int64 [N].

        Args:
            ids_N: words of the table.
            eta: per token, per unit of distance.
            uniforms: where randomness comes from.
        """
        word_U, place_N = ids_N.unique(return_inverse=True)
        drawn_N = torch.empty_like(ids_N)
        for begin, score_UV in self._scores(word_U, eta):
            mine = (place_N >= begin) & (place_N < begin + len(score_UV))
            tokens = mine.nonzero().squeeze(1)
            drawn_N[tokens] = self._drawn(score_UV, place_N[tokens] - begin, uniforms)
        return drawn_N

    @torch.no_grad()
    def log_probabilities(self, ids_U: Tensor, eta: float, of_S: Tensor | None = None) -> Tensor:
        """log P(w' | w): float64 [U, V], or [U, S] for the words w' of `of_S` alone."""
        found = []
        for _, score_UV in self._scores(ids_U, eta):
            chosen = score_UV if of_S is None else score_UV[:, of_S]
            found.append(chosen - score_UV.logsumexp(1, keepdim=True))
        width = len(self.rows.table_VD) if of_S is None else len(of_S)
        empty = self.rows.squared_norms_V.new_empty(0, width)
        return torch.cat(found) if found else empty

    def _scores(self, word_U: Tensor, eta: float) -> Iterator[tuple[int, Tensor]]:
        """-eta/2 distance [U, V] of some words at a time, and the index of the first of them."""
        size = max(1, PORTION_NUMBERS // len(self.rows.table_VD))
        for begin in range(0, len(word_U), size):
            words = word_U[begin : begin + size]
            yield begin, word_distances(self.rows, words).mul_(-eta / 2)

    def _drawn(self, score_UV: Tensor, place_N: Tensor, uniforms: Uniforms) -> Tensor:
        """A word for every token, whose scores are row `place_N`: first its block, then itself."""
        words, size = score_UV.shape
        blocks = -(-size // self._block)
        padded = (0, blocks * self._block - size)
        score_UKB = torch.nn.functional.pad(score_UV, padded, value=-torch.inf).view(
            words, blocks, self._block
        )
        sum_UK = score_UKB.logsumexp(2)
        found = []
        for place in place_N.split(max(1, DRAWN_NUMBERS // self._block)):
            block = _largest(sum_UK[place], uniforms)
            found.append(block * self._block + _largest(score_UKB[place, block], uniforms))
        return torch.cat(found) if found else place_N


def _largest(score_NK: Tensor, uniforms: Uniforms) -> Tensor:
    """Index of the largest score after Gumbel noise [N]: a draw from softmax(score)."""
    # u = 1 stands for all above 1 - 2^-53, so that the noise is finite.
    race_NK = uniforms(*score_NK.shape).log_().neg_().clamp_min_(2.0**-54)
    index_N: Tensor = (score_NK - race_NK.log_().to(score_NK.device)).argmax(1)
    return index_N
