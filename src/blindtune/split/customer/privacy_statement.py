"""What a customer is told of its privacy before anything is sent, and what is kept of it.

A statement says how strong the noise is beside this vocabulary, how many tokens change, what is
spent under d_chi (`privacy.accounting`), and in words what no epsilon covers. It is computed from
the private texts, so it stays with the customer.

Guarantee: none of its own; it states the mechanism's (`privacy.metric_dp`). An eta chosen by
`changed_share` follows from a sample of the private tokens; the number itself is not sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from blindtune.errors import ConfigError
from blindtune.models.margins import shown_tokens
from blindtune.privacy.accounting import Releases, Spending, account
from blindtune.privacy.draw_level import DrawSurvey
from blindtune.privacy.metric_dp import MAX_ETA, Mechanism
from blindtune.privacy.noise_level import NoiseSurvey
from blindtune.privacy.replacing import places_of, words_to_draw
from blindtune.privacy.twin_words import MOST_TWINS, twin_share
from blindtune.privacy.word_groups import WordGroups
from blindtune.split.bottom import Bottom
from blindtune.split.customer.private_gradients import GradientPlan
from blindtune.split.customer.private_states import PrivateStates, clean_states
from blindtune.split.customer.privatizer_config import PrivatizerConfig, PrivatizerName
from blindtune.split.customer.spared_tokens import contributing_tokens, noise_factors

LARGE_EPSILON = 10.0
"""From here on the bound on an attacker's odds, exp(epsilon), rules out nothing in practice."""
_STATES = 64
"""Texts whose states without noise are looked at in block-output mode."""


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """What a set of texts spends when its states are sent."""

    privatizer: PrivatizerName
    eta: float | None
    """Per token, per unit of L2 distance in the space that is noised."""
    noise_norm: float | None
    """Expected norm of the noise, D / eta; exponential: distance of the word that comes out."""
    typical_norm: float | None
    """What to compare it with: the median distance of one of these tokens to its nearest other
    word (with groups: between representatives); in block-output mode the median norm of a state."""
    expected_change: float | None
    """Share of tokens expected to change (vector mode: that the nearest word is another)."""
    changed: float | None
    """Where words are replaced: the share that did change in the draw that is sent."""
    spending: dict[str, Any] | None
    """Under d_chi, by token, record and run; None where no epsilon can be stated."""
    account: str
    """The same in words."""
    notes: tuple[str, ...]
    """What is sent besides, and what is not covered."""
    gradients: GradientPlan | None = None
    """DP-SGD of the U-shape: what all gradients spend of each target, and the noise on them."""

    def __str__(self) -> str:
        """Some lines for people."""
        lines = [f"Privacy of what will be sent (privatizer {self.privatizer})"]
        if self.eta is not None and self.noise_norm is not None and self.typical_norm is not None:
            beside = {
                "block-output": "norm of a state",
                "groups": "distance of your words' representatives to their nearest other one",
            }.get(self.privatizer, "distance of your words to their nearest other word")
            drawn = self.privatizer == "exponential"
            what = "words drawn at a mean distance of" if drawn else "noise of mean norm"
            lines.append(
                f"  eta {self.eta:.4g} per token: {what} {self.noise_norm:.3g}, "
                f"{self.noise_norm / self.typical_norm:.3g} x the median {beside} "
                f"({self.typical_norm:.3g})"
            )
        if self.expected_change is not None:
            did = "" if self.changed is None else f"; {self.changed:.1%} did in this draw"
            lines.append(f"  tokens that change: {self.expected_change:.1%} expected{did}")
        elif self.changed is not None:
            lines.append(f"  tokens that change: {self.changed:.1%}")
        lines += [f"  {line}" for line in self.account.splitlines()]
        if self.spending and float(self.spending["epsilon_per_token"]) > LARGE_EPSILON:
            lines.append(
                "  so large an epsilon rules out nothing in practice: what protects is that "
                "attacks fail; `blindtune audit` tries them"
            )
        lines += [f"  - {note}" for note in self.notes]
        return "\n".join(lines)


def choose_eta(bottom: Bottom, ids: Sequence[Tensor], config: PrivatizerConfig) -> float | None:
    """The eta that is asked for, or the one at which the wanted share of these tokens changes.

    Raises:
        ConfigError: no eta gives that share, or the bottom has so many words twice that a share of
            changed tokens says nothing.
    """
    if config.changed_share is None:
        return config.eta
    rows_VD, place_T = _measured(bottom, _words(bottom, ids), config.privatizer)
    if (twins := twin_share(rows_VD, place_T)) > MOST_TWINS:
        raise ConfigError(
            f"expected a bottom whose words differ, {twins:.0%} of your tokens have another word "
            "in nearly the same place, so that changing one into the other hides nothing: take a "
            "bottom of a model that is known in public, or give an eta and look at an audit"
        )
    return _survey(config.privatizer, rows_VD, place_T).eta_for(config.changed_share)


def state_privacy(
    bottom: Bottom,
    private: PrivateStates,
    config: PrivatizerConfig,
    eta: float | None,
    *,
    groups: WordGroups | None = None,
    classes: int = 0,
    epochs: int = 1,
    gradients: GradientPlan | None = None,
    training: bool = True,
    shortened: int = 0,
) -> PrivacyStatement:
    """Say what sending these states spends.

    Args:
        bottom: the package.
        private: the states, as `privatize` drew them with this config.
        config, eta: what they were drawn with; `cti_fraction` counts where there are labels.
        groups: the job's, where words become their groups'.
        classes: number of classes, with CTI.
        epochs: how often each record is sent; one draw, however often.
        gradients: of the U-shape, where they leave with noise.
        training: False for texts to predict.
        shortened: how many of the texts lost their end, being longer than is read.
    """
    mechanism = config.mechanism(eta)
    notes = _notes(bottom, private, config, gradients, training=training, shortened=shortened)
    if mechanism is None:
        return PrivacyStatement(
            privatizer=config.privatizer, eta=None, noise_norm=None, typical_norm=None,
            expected_change=None, changed=private.changed, spending=None,
            account=_without_noise(bottom, private, groups), notes=notes, gradients=gradients,
        )  # fmt: skip
    factors = _factors(bottom, private, config, classes)
    norm, typical, change, warnings = _noise(bottom, private, config, mechanism, factors, groups)
    spending, text = _account(mechanism, typical, factors, epochs)
    return PrivacyStatement(
        privatizer=config.privatizer,
        eta=mechanism.eta,
        noise_norm=norm,
        typical_norm=typical,
        expected_change=change,
        changed=private.changed,
        spending=None if spending is None else _plain(spending),
        account=text,
        notes=(*warnings, *notes),
        gradients=gradients,
    )


def _noise(
    bottom: Bottom,
    private: PrivateStates,
    config: PrivatizerConfig,
    mechanism: Mechanism,
    factors: Sequence[Tensor],
    groups: WordGroups | None,
) -> tuple[float, float, float | None, list[str]]:
    """Norm of the noise, what to compare it with, share of tokens expected to change, warnings."""
    if mechanism.mode == "block-output":
        states_TD = torch.cat(clean_states(bottom, private.ids[:_STATES]))
        typical = states_TD.norm(dim=1).median().item()
        return bottom.hidden_size / mechanism.eta, typical, None, []
    words = _words(bottom, private.ids)
    rows_VD, place_T = _measured(bottom, words, config.privatizer, groups)
    survey = _survey(config.privatizer, rows_VD, place_T)
    level = survey.at(mechanism.eta)
    change = level.changed_share
    if config.cti_fraction:
        change = _change_with_factors(survey, mechanism.eta, torch.cat(list(factors)))
    if groups is not None:
        change = _change_with_groups(bottom, words, groups, mechanism.eta)
    warnings = _warnings(twin_share(rows_VD, place_T))
    return level.mean_norm, level.neighbour_distance, change, warnings


def _plain(spending: Spending) -> dict[str, Any]:
    """As JSON can hold it: what has no bound is "inf"."""
    return {k: "inf" if v == math.inf else v for k, v in asdict(spending).items()}


def _change_with_factors(survey: NoiseSurvey | DrawSurvey, eta: float, factors_T: Tensor) -> float:
    """Expected share of tokens that change, as if those with less noise were words like others."""
    values, counts = factors_T.unique(return_counts=True)
    shares: list[float] = (counts / counts.sum()).tolist()
    changed = (
        share * survey.at(min(eta / factor, MAX_ETA)).changed_share
        for factor, share in zip(values.tolist(), shares, strict=True)
        if factor
    )
    return float(sum(changed))


def _factors(
    bottom: Bottom, private: PrivateStates, config: PrivatizerConfig, classes: int
) -> list[Tensor]:
    """Noise factors [L] of the tokens of every text that count."""
    if config.privatizer == "block-output":  # every position is noised, those around a text too
        return [torch.ones(len(text_L)) for text_L in private.ids]
    labels, importance = private.labels, config.importance()
    content = [bottom.margins.content(text_L) for text_L in private.ids]
    contributing = contributing_tokens(bottom, content, labels, importance, classes)
    return list(noise_factors(contributing, bottom.margins, private.ids, labels))


def _without_noise(bottom: Bottom, private: PrivateStates, groups: WordGroups | None) -> str:
    if groups is None:
        return "no noise: no promise; states are read back by a small trained network"
    words, count = len(groups.representative_V), len(groups.representatives)
    alone = groups.alone(_words(bottom, private.ids)).double().mean().item()
    return (
        f"{words:,} words in {count:,} groups: which word of its group a token was is hidden "
        "perfectly, whatever the vendor computes; which group it is of is not hidden at all\n"
        f"{private.changed or 0:.1%} of your tokens leave as other words, {alone:.1%} are of words "
        "that no group hides; a guess by frequency alone gets what did not change right, and a "
        "language model, which reads sentences, may get half of the others too (blindtune "
        "audit --prior MODEL tries one)"
    )


def _account(
    mechanism: Mechanism, typical: float, factors: Sequence[Tensor], epochs: int
) -> tuple[Spending | None, str]:
    distance = typical
    if mechanism.mode == "block-output":
        if mechanism.clip_norm is None:
            return None, (
                "without clip_norm no epsilon can be stated for a token or a text: nothing bounds "
                "how far one changed word moves the states"
            )
        distance = 2 * mechanism.clip_norm
    found = account(mechanism, factors, distance, Releases(epochs=epochs))
    return found, str(found)


def _words(bottom: Bottom, ids: Sequence[Tensor]) -> Tensor:
    """What texts say; if they say nothing, the tokens around them."""
    content = torch.cat([bottom.margins.content(text_L) for text_L in ids])
    return content if len(content) else torch.cat(list(ids))


def _measured(
    bottom: Bottom,
    words: Tensor,
    privatizer: PrivatizerName,
    groups: WordGroups | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows [V, D] among which noise moves words, and which of them these words are.

    With groups: those of representatives.
    """
    embedding = bottom.stack.embedding
    with torch.no_grad():  # a module may scale its rows, and vector mode noises what it gives
        table_VD = embedding.weight
        assert isinstance(table_VD, Tensor)
        if privatizer == "vector":
            table_VD = embedding(torch.arange(len(table_VD), device=table_VD.device))
    return words_to_draw(table_VD, groups), places_of(words, groups)


def _survey(
    privatizer: PrivatizerName, rows_VD: Tensor, place_T: Tensor
) -> NoiseSurvey | DrawSurvey:
    """What noise does to these words."""
    survey = DrawSurvey if privatizer == "exponential" else NoiseSurvey
    return survey(rows_VD, place_T)


def _warnings(twins: float) -> list[str]:
    if twins <= MOST_TWINS:
        return []
    return [
        f"WARNING: {twins:.0%} of these tokens have another word of the bottom in nearly the same "
        "place; where one becomes the other nothing is hidden, and the shares of changed tokens "
        "count it as changed"
    ]


def _change_with_groups(bottom: Bottom, words: Tensor, groups: WordGroups, eta: float) -> float:
    """Expected share of tokens that leave as others: all but representatives that are drawn again.

    A word that stands not even for itself never comes out.
    """
    own = words[groups.apply(words) == words]
    if not len(own):
        return 1.0
    survey = _survey("groups", *_measured(bottom, own, "groups", groups))
    same = 1 - survey.at(eta).changed_share
    return 1 - len(own) / len(words) * same


def _notes(
    bottom: Bottom,
    private: PrivateStates,
    config: PrivatizerConfig,
    gradients: GradientPlan | None,
    *,
    training: bool,
    shortened: int,
) -> tuple[str, ...]:
    notes = ["sent besides the states: number of tokens of every text, their order, times"]
    if config.privatizer == "none":
        notes.insert(0, "WARNING: the vendor can read nearly all of the texts")
    notes += _around(bottom, config)
    if config.privatizer == "groups":
        notes.append(
            "the vendor sees the representative of every word's group; words that are a group of "
            "their own are seen as they are, and no promise covers a whole text"
        )
    if config.privatizer in ("token", "exponential"):
        notes.append(
            "the vendor may recover the tokens that were drawn, by looking up the nearest word: a "
            "token that changed shows it another word, one that did not shows it yours"
        )
    if training:
        notes.append(_targets_said(bottom, private, config, gradients))
    if training and config.cti_fraction:
        notes.append(
            f"contributing tokens have {config.cti_factor:g} of the noise in training texts; that "
            "shows them, and the label, to the vendor: no epsilon covers which words contribute"
        )
    again = "in every epoch" if training else "when these texts are predicted again for this job"
    notes.append(f"drawn once, and sent again {again}: that spends nothing more")
    return (*notes, *_left_out(shortened))


def _left_out(shortened: int) -> list[str]:
    if not shortened:
        return []
    return [
        f"the file has texts that are longer than what is read of each: {shortened:,} lose their "
        "end, which is neither sent nor learned from (a larger max_length reads more)"
    ]


def _targets_said(
    bottom: Bottom, private: PrivateStates, config: PrivatizerConfig, gradients: GradientPlan | None
) -> str:
    """What leaves of labels, or of what a language model predicts."""
    if gradients is not None:
        return f"{gradients}; another job with these texts adds as much"
    if private.labels is None and config.targets == "sent":
        return "the words that were sent are what is predicted: gradients tell nothing beside them"
    if private.labels is not None and config.label_epsilon is not None:
        did = "" if private.changed_labels is None else f" ({private.changed_labels:.1%} changed)"
        return (
            f"labels were drawn anew, once{did}: what leaves tells at most epsilon "
            f"{config.label_epsilon:g} of each, beside what its text tells and how many classes "
            "there are; another job with these texts draws again and adds as much"
        )
    if bottom.cut.partition == "two-part":
        return "labels are sent as they are: if they are secret, give a label_epsilon"
    what, least = "labels", "a label_epsilon"
    if private.labels is None:
        what, least = "true tokens", "targets sent, or a dp_epsilon,"
    elif private.labels.is_floating_point():
        what, least = "numbers", "a dp_epsilon"
    return (
        f"the {what} stay here, but gradients computed from them are sent, and give them away to "
        f"whoever knows the model: choose {least} against that"
    )


def _around(bottom: Bottom, config: PrivatizerConfig) -> list[str]:
    """Which tokens have no noise because of their place."""
    if config.special == "noise" or config.privatizer in ("block-output", "none"):
        return []
    sides = ((bottom.margins.before, "before"), (bottom.margins.after, "after"))
    said = [f"{', '.join(shown_tokens(bottom.tokenizer, ids))} {w} it" for ids, w in sides if ids]
    return [f"not noised are the tokens around every text: {'; '.join(said)}"] if said else []
