"""Which tokens of a customer's texts get less noise, and how much less each of them gets.

Guarantee: none of its own; see `privacy.token_importance` for what it takes from the mechanism's.

Shapes: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from blindtune.errors import ConfigError
from blindtune.privacy.token_importance import (
    ContributingTokens,
    ImportanceConfig,
    count_tokens,
)
from blindtune.split.bottom import Bottom


def contributing_tokens(
    bottom: Bottom,
    ids: Sequence[Tensor],
    labels: Tensor | None,
    importance: ImportanceConfig | None,
    classes: int,
) -> ContributingTokens:
    """The tokens that get less noise, counted in these texts; special tokens at the least.

    Raises:
        ConfigError: CTI for labels that are no classes.
    """
    spared = importance or ImportanceConfig(fraction=0.0)
    counts = None
    if spared.fraction and labels is not None and classes:
        if labels.is_floating_point():
            raise ConfigError("contributing tokens need classes, got numbers to predict: leave CTI")
        table_VD = bottom.stack.embedding.weight
        assert isinstance(table_VD, Tensor)
        size = int(table_VD.shape[0])
        counts = count_tokens(ids, labels.tolist(), classes=classes, vocabulary_size=size)
    return ContributingTokens(counts, bottom.tokenizer.all_special_ids, spared)


def noise_factors(
    contributing: ContributingTokens, ids: Sequence[Tensor], labels: Tensor | None
) -> Iterator[Tensor]:
    """For every text the noise factors [L] of the tokens that count, for `accounting.account`.

    Special tokens count only where they are noised.
    """
    for i, text_L in enumerate(ids):
        label = None if labels is None else labels[i : i + 1]
        factors_L = factors_of(contributing, text_L[None], label)[0]
        keeps = contributing.config.special == "keep"
        yield factors_L[~contributing.is_special(text_L)] if keeps else factors_L


def factors_of(contributing: ContributingTokens, ids_BL: Tensor, labels_B: Tensor | None) -> Tensor:
    """Noise factors [B, L]; without CTI labels change nothing, and need not be classes."""
    return contributing.factors(ids_BL, None if contributing.chosen_CV is None else labels_B)
