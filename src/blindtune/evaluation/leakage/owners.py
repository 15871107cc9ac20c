"""Whose states a transcript holds: what crossed beside the customer's texts, for the judge alone.

Texts that were tuned on are texts of the run's data, each crossed in one draw: within a length,
states and texts are paired one to one so that all distances to the states without noise together
are least. Texts that were only predicted may be of any file. One of them is taken for another draw
of a training text if it lies as near to it as the noise leaves training texts to their own; the
others have no owner.

Not covered: where noise is as large as what sets two texts apart, some other texts are taken for
draws too, and averaging reads less than it could. With CTI predicted texts have more noise than
training texts, so that some of their draws are not recognised. A job keeps the words of all texts
and needs no guess: audit that.

Shapes: L length, D hidden, N texts of one length, S states of that length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.attacks.observation import SeenTexts
from blindtune.privacy.word_groups import WordGroups
from blindtune.split.bottom import Bottom
from blindtune.split.customer.private_states import clean_states

CLEAN_TEXTS = 64  # whose states without noise are made at once
DEVIATIONS = 4.0
"""Of the distance per token, within which a state is another draw of a text."""


@dataclass(frozen=True, kw_only=True)
class Owners:
    """Places of texts by the places of their states in `SeenTexts`."""

    own: dict[int, int]
    """Of states that were tuned on: each text at most once."""
    again: dict[int, int]
    """Of other states, taken for further draws of texts in `own`."""


def owners_of(
    bottom: Bottom,
    groups: WordGroups | None,
    ids: Sequence[Tensor],
    seen: SeenTexts,
    *,
    drawn: bool,
) -> Owners:
    """Find the text [L] of `ids` that each seen state is of.

    Args:
        bottom: makes the states without noise.
        groups: which word stands for which before noise; None: each for itself.
        ids: the customer's texts.
        seen: what crossed.
        drawn: whether there was noise; without it no text has further draws.
    """
    texts, states = _by_length(ids), _by_length(seen.states)
    own: dict[int, int] = {}
    near: list[tuple[int, int, float]] = []
    distances: list[tuple[int, float]] = []
    for length in texts.keys() & states.keys():
        mine = [ids[k] for k in texts[length]]
        distance_SN = _distances(bottom, groups, mine, [seen.states[i] for i in states[length]])
        tuned = [row for row, i in enumerate(states[length]) if seen.tuned[i]]
        paired = dict(zip(tuned, assigned(distance_SN[tuned]), strict=True))
        for row, i in enumerate(states[length]):
            column = paired.get(row)
            if column is not None:
                own[i] = texts[length][column]
                distances.append((length, float(distance_SN[row, column])))
            else:
                column = int(distance_SN[row].argmin())
                near.append((i, texts[length][column], float(distance_SN[row, column])))
    known, again = set(own.values()), dict[int, int]()
    if drawn and distances:
        mean, deviation = _spread(distances)
        for i, k, distance in near:
            length = len(ids[k])
            most = length * mean + DEVIATIONS * deviation * math.sqrt(length)
            if k in known and distance <= most:
                again[i] = k
    return Owners(own=own, again=again)


def assigned(cost_SN: Tensor) -> list[int | None]:
    """For each row a column of its own so that the costs together are least; None: none is left.

    The Hungarian method by shortest augmenting paths (Jonker and Volgenant 1987).
    """
    if cost_SN.shape[0] > cost_SN.shape[1]:
        found: list[int | None] = [None] * cost_SN.shape[0]
        for column, row in enumerate(assigned(cost_SN.T)):
            assert row is not None
            found[row] = column
        return found
    cost_SN = cost_SN.double()
    rows, columns = cost_SN.shape
    potential_S = cost_SN.new_zeros(rows)
    potential_N = cost_SN.new_zeros(columns)
    row_of = [-1] * columns
    for begin in range(rows):
        least_N = torch.full_like(potential_N, torch.inf)
        before_N = torch.full((columns,), -1)
        visited_N = torch.zeros(columns, dtype=torch.bool)
        row, here, path = begin, -1, [begin]
        reached = list[int]()
        while row >= 0:
            reduced_N = cost_SN[row] - potential_S[row] - potential_N
            shorter_N = ~visited_N & (reduced_N < least_N)
            least_N[shorter_N], before_N[shorter_N] = reduced_N[shorter_N], here
            here = int(least_N.masked_fill(visited_N, torch.inf).argmin())
            step = least_N[here].clone()
            potential_S[path] += step
            potential_N[reached] -= step
            least_N[~visited_N] -= step
            visited_N[here] = True
            reached.append(here)
            row = row_of[here]
            path.append(row)
        while here >= 0:  # give each column on the path to the row that reached it
            earlier = int(before_N[here])
            row_of[here] = begin if earlier < 0 else row_of[earlier]
            here = earlier
    place = {row: column for column, row in enumerate(row_of) if row >= 0}
    return [place[row] for row in range(rows)]


def _by_length(rows: Sequence[Tensor]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(len(row), []).append(i)
    return found


def _distances(
    bottom: Bottom, groups: WordGroups | None, ids: Sequence[Tensor], states: Sequence[Tensor]
) -> Tensor:
    """Squared distances [S, N] of states to those of texts without noise, all of one length."""
    flat = torch.stack(list(states)).flatten(1)
    mine = ids if groups is None else [groups.apply(text) for text in ids]
    found = []
    for begin in range(0, len(mine), CLEAN_TEXTS):
        clean = torch.stack(clean_states(bottom, mine[begin : begin + CLEAN_TEXTS])).flatten(1)
        found.append(torch.cdist(flat, clean.to(flat)).square())
    return torch.cat(found, dim=1)


def _spread(distances: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Mean and deviation of a token's squared distance, from (tokens, distance) of whole texts."""
    mean = sum(d for _, d in distances) / sum(n for n, _ in distances)
    variance = sum((d - n * mean) ** 2 / n for n, d in distances) / len(distances)
    return mean, math.sqrt(variance)
