"""Words in the place of words: by a mechanism, by groups, or by a mechanism among groups.

One place says what a customer sends in the place of its words, so that whoever attacks it or states
its privacy means the same. With groups every word becomes its group's representative first, and a
mechanism that replaces words then draws among the representatives alone.

Guarantee: the mechanism's (`metric_dp`) with distances between representatives, and that of
`word_groups` inside a group. Tokens of factor 0 have neither.

Shapes: B batch, L length, V vocabulary, G groups, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.privacy.metric_dp import Mechanism, Privatizer
from blindtune.privacy.word_groups import WordGroups


def words_to_draw(table_VD: Tensor, groups: WordGroups | None) -> Tensor:
    """Rows of the words that can come out: all [V, D], or the representatives [G, D]."""
    return table_VD if groups is None else table_VD[groups.representatives]


def places_of(ids: Tensor, groups: WordGroups | None) -> Tensor:
    """Which of `words_to_draw` stands for each token, same shape as the ids."""
    if groups is None:
        return ids
    return torch.searchsorted(groups.representatives, groups.apply(ids))


def privatizer_of(
    mechanism: Mechanism | None,
    table_VD: Tensor,
    groups: WordGroups | None = None,
    *,
    testing_seed: int | None = None,
) -> Privatizer | None:
    """The mechanism at work on these words; None without one.

    Args:
        mechanism: the noise.
        table_VD: the word embedding's weight.
        groups: of words, where each becomes its group's.
        testing_seed: for tests only: noise that anyone can repeat. Warns.
    """
    if mechanism is None:
        return None
    table = words_to_draw(table_VD, groups) if mechanism.replaces_words else None
    return Privatizer(mechanism, table, testing_seed=testing_seed)


def replaced(
    privatizer: Privatizer | None,
    groups: WordGroups | None,
    ids_BL: Tensor,
    factors_BL: Tensor,
    kept_BL: Tensor | None = None,
) -> Tensor:
    """The tokens that enter the bottom in the place of these [B, L].

    Args:
        privatizer: as by `privatizer_of`, with the same groups.
        groups: of words; None: every word is its own.
        ids_BL: what the texts say.
        factors_BL: of the noise, in [0, 1].
        kept_BL: bool, where tokens stay as they are, whatever their group; None: nowhere. Their
            factors are 0.
    """
    coarse_BL = ids_BL if groups is None else groups.apply(ids_BL, kept_BL)
    if privatizer is None or not privatizer.mechanism.replaces_words:
        return coarse_BL
    drawn_BL = privatizer.tokens(places_of(ids_BL, groups), factors_BL)
    if groups is None:
        return drawn_BL
    return torch.where(factors_BL == 0, coarse_BL, groups.representatives[drawn_BL])
