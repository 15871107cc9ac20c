"""What fresh draws would give away: the same texts sent again and again, with new noise each time.

The mean of m draws has 1 / sqrt(m) of the noise, so every mechanism without reuse is undone by
patience: m draws spend m eta (`privacy.accounting`). blindtune draws once and sends the same
states in every epoch; then all submissions are one and the same, and this attack says so and finds
what one draw gives.

Vector and block-output mode: the states are averaged, which is exact at cut 0 and nearly so where
the noise is small against what the blocks bend. Token mode: each draw is read and the tokens are
put to the vote; where no word wins, the nearest to the mean of the words that were read.

Where the noise is known, and public text there is, Bayes' rule reads more: the likelihoods of all
draws are multiplied (`weighed_draws`).

Shapes: L length of one text, D hidden, M submissions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blindtune.attacks.adversary import Candidates, Guess, StatesView
from blindtune.attacks.embedding_inversion import nearest_tokens
from blindtune.attacks.likelihoods import ChannelConfig, token_candidates, vector_candidates
from blindtune.errors import DataError
from blindtune.privacy.nearest import NearestRows


def fresh_draws(submissions: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """The submissions (states of all texts) that differ from every earlier one."""
    kept: list[Sequence[Tensor]] = []
    for states in submissions:
        known = (
            all(torch.equal(a, b) for a, b in zip(states, earlier, strict=True)) for earlier in kept
        )
        if not any(known):
            kept.append(states)
    return kept


def averaged_tokens(
    view: StatesView,
    resubmissions: Sequence[Sequence[Tensor]],
    attack: Callable[[StatesView], Guess] = nearest_tokens,
) -> Guess:
    """What an attack reads when it may use every submission of the same texts.

    Args:
        view: the first submission.
        resubmissions: states of the same texts in the same order, as they were sent later.
        attack: reads one set of states.

    Raises:
        DataError: a resubmission of other texts.
    """
    draws = _draws(view, resubmissions)
    if view.mechanism is not None and view.mechanism.replaces_words and len(draws) > 1:
        return _voted(view, [attack(replace(view, states=tuple(states))) for states in draws])
    mean = tuple(torch.stack(rows).mean(0) for rows in zip(*draws, strict=True))
    return attack(replace(view, states=mean))


def weighed_draws(
    view: StatesView,
    resubmissions: Sequence[Sequence[Tensor]],
    sent: Callable[[StatesView], Guess] = nearest_tokens,
    config: ChannelConfig | None = None,
) -> Candidates:
    """Words by the noise's likelihoods of every submission together, and how common they are.

    Args:
        view: the first submission, with public text; of token or exponential mode, or of vector
            mode at cut 0.
        resubmissions: as for `averaged_tokens`.
        sent: the tokens that went into the bottom; for modes that replace words.
        config: of these too.

    Raises:
        ConfigError: another mode. DataError: no public text, or a resubmission of other texts.
    """
    first, *rest = _draws(view, resubmissions)
    view, config = replace(view, states=tuple(first)), config or ChannelConfig()
    view.require_public("Bayes' rule")
    if view.mechanism is None or not view.mechanism.replaces_words:
        return vector_candidates(view, config.candidates, again=rest)
    again = [sent(replace(view, states=tuple(states))) for states in rest]
    return token_candidates(view, sent(view), config, again=again)


def _draws(view: StatesView, resubmissions: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    for states in resubmissions:
        if [s.shape for s in states] != [s.shape for s in view.states]:
            raise DataError("expected resubmissions of the same texts, got other lengths")
    return fresh_draws([view.states, *resubmissions])


def _voted(view: StatesView, readings: Sequence[Guess]) -> Guess:
    """The word that was read most often, of equals the nearest to the mean of all.

    If no word was read twice: the word nearest to the mean, read or not.
    """
    table_VD = view.table_VD.cpu()
    rows = NearestRows(table_VD)
    found = []
    for of_text in zip(*readings, strict=True):
        read_ML = torch.stack(of_text)
        votes_ML = (read_ML[:, None] == read_ML[None]).sum(0)
        vector_MLD = table_VD[read_ML].double()
        mean_LD = vector_MLD.mean(0)
        away_ML = (vector_MLD - mean_LD).norm(dim=2)
        tied_ML = votes_ML == votes_ML.amax(0)
        best_1L = away_ML.masked_fill(~tied_ML, torch.inf).argmin(0, keepdim=True)
        won_L = read_ML.gather(0, best_1L)[0]
        found.append(torch.where(votes_ML.amax(0) > 1, won_L, rows.find(mean_LD)))
    return tuple(found)
