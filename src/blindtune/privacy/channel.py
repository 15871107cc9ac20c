"""How likely each word comes out as each other: P(y | x) of a mechanism that replaces words.

Exponential mode: computed. Token mode: there is no closed form, so it is a **Monte-Carlo
estimate**: the mechanism's own noise is drawn for every word x that is considered, and what comes
out is counted. Each count is smoothed towards the overall frequency of y, weighted by
exp(-d^2 / 8 s^2) with d the distance of x and y and s^2 = (D + 1) / eta^2 the noise's variance a
coordinate: how a pairwise bound of P(y | x) falls with the distance.

Public knowledge only: the table and the mechanism. Attackers use it (Bayes' rule), and so might the
customer, on what was drawn.

Shapes: V vocabulary, K words that are considered, U distinct words that came out, M draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.errors import ConfigError
from blindtune.privacy.metric_dp import Mechanism, Privatizer
from blindtune.privacy.word_sampling import WordSampler


@dataclass(frozen=True, kw_only=True)
class CountingConfig:
    """How P(y | x) is estimated where it must be; exponential mode needs none of it."""

    draws: int = 32
    """Of the mechanism for each word that is considered."""
    smoothing: float = 1.0
    """Weight of the smoothing, in draws."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.draws < 1 or not self.smoothing > 0:
            raise ConfigError(
                "expected draws of at least 1 and a positive smoothing, got "
                f"{self.draws}, {self.smoothing}"
            )


@torch.no_grad()
def log_channel(
    mechanism: Mechanism,
    table_VD: Tensor,
    word_K: Tensor,
    sent_U: Tensor,
    config: CountingConfig | None = None,
    *,
    testing_seed: int | None = None,
) -> Tensor:
    """log P(y | x) of words y that came out and words x: float32 [U, K].

    Args:
        mechanism: of token or exponential mode.
        table_VD: the word embeddings.
        word_K: words x, different ones.
        sent_U: words y, ascending, different ones.
        config: of the estimate.
        testing_seed: of the estimate's noise; for tests.

    Raises:
        ConfigError: another mode.
    """
    if not mechanism.replaces_words:
        raise ConfigError(
            f"expected a mechanism of token or exponential mode, got {mechanism.mode!r}: it sends "
            "no words"
        )
    if mechanism.mode == "exponential":
        sampler = WordSampler(table_VD)
        return sampler.log_probabilities(word_K, mechanism.eta, sent_U).T.float()
    config = config or CountingConfig()
    machine = Privatizer(mechanism, table_VD, testing_seed=testing_seed)
    drawn_MK = machine.tokens(word_K.expand(config.draws, -1))
    spread = (table_VD.shape[1] + 1) / mechanism.eta**2
    distance_UK = torch.cdist(table_VD[sent_U].double(), table_VD[word_K].double())
    return counted_channel(
        drawn_MK, sent_U, torch.exp(-distance_UK.square() / (8 * spread)), len(table_VD), config
    )


def counted_channel(
    drawn_MK: Tensor, sent_U: Tensor, near_UK: Tensor, vocabulary: int, config: CountingConfig
) -> Tensor:
    """log P(y | x) [U, K] from draws for each word x [M, K], smoothed where y is near x [U, K]."""
    draws, words = drawn_MK.shape
    overall_V = torch.bincount(drawn_MK.reshape(-1), minlength=vocabulary).double() + 0.5
    overall_U = overall_V[sent_U] / overall_V.sum()
    place = torch.searchsorted(sent_U, drawn_MK).clamp_max(len(sent_U) - 1)
    hit_MK = sent_U[place] == drawn_MK
    count_UK = torch.zeros(len(sent_U), words, dtype=torch.float64)
    columns_MK = torch.arange(words).expand_as(drawn_MK)
    count_UK.index_put_(
        (place[hit_MK], columns_MK[hit_MK]), torch.ones(1, dtype=torch.float64), accumulate=True
    )
    near_UK = near_UK / near_UK.mean(1, keepdim=True).clamp_min(1e-30)
    smooth_UK = config.smoothing * overall_U[:, None] * near_UK
    return ((count_UK + smooth_UK).clamp_min(1e-30) / (draws + config.smoothing)).log().float()
