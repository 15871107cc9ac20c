"""Which tokens of a customer's texts get less noise, and how much less each of them gets.

Guarantee: none of its own; see `privacy.token_importance` for what it takes from the mechanism's.

Shapes: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from blindtune.errors import ConfigError
from blindtune.models.margins import Margins
from blindtune.privacy.token_importance import (
    ContributingTokens,
    ImportanceConfig,
    count_tokens,
)
from blindtune.split.bottom import Bottom


def check_labelled(
    importance: ImportanceConfig | None, labels: Tensor | None, classes: int
) -> None:
    """Refuse CTI for texts of which nobody says what they contribute to.

    Raises:
        ConfigError: a fraction is to be spared, without labels or the number of classes.
    """
    if importance is not None and importance.fraction and (labels is None or not classes):
        raise ConfigError(
            "expected labels and classes (their number) with contributing tokens, got "
            f"{'no labels' if labels is None else 'no classes'}: tokens contribute to the class of "
            "their text; give both, or importance with fraction 0"
        )


def contributing_tokens(
    bottom: Bottom,
    content: Sequence[Tensor],
    labels: Tensor | None,
    importance: ImportanceConfig | None,
    classes: int,
) -> ContributingTokens:
    """The tokens that get less noise, counted in what these texts say, without what is around it.

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
        counts = count_tokens(content, labels.tolist(), classes=classes, vocabulary_size=size)
    return ContributingTokens(counts, spared)


def noise_factors(
    contributing: ContributingTokens,
    margins: Margins,
    ids: Sequence[Tensor],
    labels: Tensor | None,
) -> Iterator[Tensor]:
    """For every text the noise factors [L] of the tokens that count, for `accounting.account`.

    The tokens around a text count only where they are noised.
    """
    for i, text_L in enumerate(ids):
        label = None if labels is None else labels[i : i + 1]
        special_L = margins.mask(text_L)
        factors_L = factors_of(contributing, text_L[None], label, special_L[None])[0]
        yield factors_L[~special_L] if contributing.config.special == "keep" else factors_L


def factors_of(
    contributing: ContributingTokens, ids_BL: Tensor, labels_B: Tensor | None, special_BL: Tensor
) -> Tensor:
    """Noise factors [B, L]; without CTI labels change nothing, and need not be classes."""
    labels_B = None if contributing.chosen_CV is None else labels_B
    return contributing.factors(ids_BL, labels_B, special_BL)
