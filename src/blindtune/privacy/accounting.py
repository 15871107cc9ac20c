"""What was spent under d_chi: per token, per record (one text), per run.

eta is per unit of distance: two inputs at distance d cannot be told apart better than by a factor
exp(eta d). An epsilon, the whole exponent, therefore exists only for a stated distance: how far the
alternative may be from which the truth is not to be told. A reasonable one is the distance between
words that a reader would exchange; the diameter of the vocabulary (or 2 clip_norm in block-output
mode) makes epsilon a promise about any change at all.

Composition (Dwork and Roth 2014, theorem 3.16, word for word with d_chi):
- Releases: the same token sent with m fresh draws spends m eta. Sending one draw again spends
  nothing. So privatize once and reuse the draw in every epoch; fresh draws for each epoch let the
  vendor average the noise away, and the account says so.
- Record: tokens are noised independently, so under the sum metric (the distance of two texts of
  equal length is the sum of the distances of their tokens) a record has the mechanism's eta, and a
  record whose tokens all may change by `distance` spends the sum over its tokens.
- Run: records of different persons do not add up: what anyone spends is their own record. The sum
  over the run is what a person spends whose text is in all of its records.

With noise factors that depend on the word (contributing tokens) every epsilon is for alternatives
that have the same factor; between words of different factors nothing is bounded.

Not covered: texts of different length (their distance is infinite), tokens that are not counted
(special tokens, padding: public by assumption), labels, the choice of contributing tokens by
private counts, and the same sentence in several records (each spends).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.errors import ConfigError, DataError
from blindtune.privacy.metric_dp import Mechanism


@dataclass(frozen=True, kw_only=True)
class Releases:
    """How often the same text leaves, and whether its noise is drawn anew."""

    epochs: int = 1
    """Times that each record is sent or used."""
    redraw: bool = False
    """False: one draw, reused in every epoch, spends once. True: every epoch draws and spends."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"expected epochs >= 1, got {self.epochs}")

    @property
    def draws(self) -> int:
        """Independent draws of the same token that leave."""
        return self.epochs if self.redraw else 1


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What a run spent. Every epsilon is for alternatives at `distance` a token."""

    distance: float
    """How far a token's alternative may be, in the space that is noised."""
    draws: int
    """Fresh draws of the same token, each of which spends."""
    eta_per_token: float
    """Per unit of distance, of a token with full noise, over all draws."""
    epsilon_per_token: float
    """Of a token with full noise: eta_per_token x distance."""
    epsilon_per_record_mean: float
    """Sum over a record's tokens, averaged over records; inf if any token has no noise."""
    epsilon_per_record_max: float
    """The same for the record that spends most."""
    epsilon_per_run: float
    """Sum over all records: what somebody spends whose text is in every one."""
    records: int
    """Records counted."""
    tokens: int
    """Tokens counted, over all records."""
    weakened_tokens: int
    """Tokens with a noise factor between 0 and 1: they spend 1 / factor as much, against
    alternatives of the same factor."""
    unprotected_tokens: int
    """Tokens without noise: no guarantee at all."""

    def __str__(self) -> str:
        lines = [
            f"token   eta {self.eta_per_token:.4g} per unit of distance"
            + (f" ({self.draws} fresh draws)" if self.draws > 1 else " (one draw, reused)"),
            f"        epsilon {self.epsilon_per_token:.4g} per token, "
            f"alternatives at distance {self.distance:.4g}",
            f"record  epsilon {self.epsilon_per_record_mean:.4g} per record on average, "
            f"{self.epsilon_per_record_max:.4g} at most ({self.records} records)",
            f"run     epsilon {self.epsilon_per_run:.4g} per run of {self.tokens} tokens, for "
            "somebody whose text is in every record",
        ]
        if self.weakened_tokens or self.unprotected_tokens:
            lines.append(
                "        for alternatives with as much noise: between contributing tokens and "
                "others nothing is bounded"
            )
        if self.weakened_tokens:
            lines.append(f"        {self.weakened_tokens} tokens with less noise spend more")
        if self.unprotected_tokens:
            lines.append(f"        {self.unprotected_tokens} tokens have no noise and no guarantee")
        return "\n".join(lines)


def account(
    mechanism: Mechanism,
    factors: Iterable[Tensor],
    distance: float,
    releases: Releases | None = None,
) -> Spending:
    """Add up what a run spends.

    Args:
        mechanism: with eta per token, per unit of distance.
        factors: for each record the noise factors [L] of the tokens that count (leave out padding
            and, where their places are public, special tokens); `torch.ones(L)` without CTI.
        distance: how far a token's alternative may be. In block-output mode a token means a
            position's state, and only 2 clip_norm bounds what any change of the text does to it.
        releases: how often, and whether drawn anew.

    Raises:
        DataError: factors outside [0, 1]. ConfigError: a distance that is not positive or is
            larger than 2 clip_norm; block-output mode without clip_norm.
    """
    releases = releases or Releases()
    if not 0 < distance < math.inf:
        raise ConfigError(f"expected a positive, finite distance, got {distance}")
    if mechanism.mode == "block-output" and mechanism.clip_norm is None:
        raise ConfigError(
            "expected clip_norm in block-output mode, got None: without it no distance bounds how "
            "far one changed token moves the states, so there is no epsilon to state"
        )
    if mechanism.clip_norm is not None and distance > 2 * mechanism.clip_norm:
        raise ConfigError(
            f"expected a distance up to 2 clip_norm = {2 * mechanism.clip_norm:g}, the largest "
            f"there is between clipped states, got {distance:g}"
        )
    epsilon = mechanism.eta * distance * releases.draws
    total, largest, records, tokens, weakened, unprotected = 0.0, 0.0, 0, 0, 0, 0
    for factor_L in factors:
        factor_L = factor_L.detach().double().cpu()
        if not bool(((factor_L >= 0) & (factor_L <= 1)).all()):
            raise DataError("expected noise factors between 0 and 1: 1 is full noise, 0 is none")
        spent = epsilon * factor_L.reciprocal().sum().item()
        total, largest = total + spent, max(largest, spent)
        records, tokens = records + 1, tokens + factor_L.numel()
        unprotected += int((factor_L == 0).sum())
        weakened += int(torch.logical_and(factor_L > 0, factor_L < 1).sum())
    return Spending(
        distance=distance,
        draws=releases.draws,
        eta_per_token=mechanism.eta * releases.draws,
        epsilon_per_token=epsilon,
        epsilon_per_record_mean=total / records if records else 0.0,
        epsilon_per_record_max=largest,
        epsilon_per_run=total,
        records=records,
        tokens=tokens,
        weakened_tokens=weakened,
        unprotected_tokens=unprotected,
    )
