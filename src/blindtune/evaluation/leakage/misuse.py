"""What an emulator is worth without its owner: the judge of `attacks.emulator_misuse`.

Four things on one scale, nats a token on text that the attacker did not train on: the full model,
the emulator as it is (and tuned, if an adapter is given), the emulator healed on public text by the
number of tokens spent, and a control: a model with as many full layers as the emulator, made of the
full model by dropping evenly spaced layers and trained on the same text at a rate of its own. Where
healing gets further than the control, the emulator gave away more than a small model would have;
where it does not, this healing found no more. Both are scored on the same windows and compared
window by window.

Shapes: N windows, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blindtune.attacks.emulator_misuse import EmulatorView, HealingConfig, Stop, heal, train_on
from blindtune.errors import MismatchError
from blindtune.evaluation.utility.loss import Perplexity, mean_loss, window_sums
from blindtune.evaluation.utility.paired import mean_of
from blindtune.exchange.packages.manifest import EmulatorManifest
from blindtune.exchange.packages.signing import Trust
from blindtune.models.decoder import Decoder
from blindtune.models.fingerprint import fingerprint
from blindtune.models.loading import load_model, preferred_device
from blindtune.models.surgery import keep_layers
from blindtune.offsite.adapter import tuned_emulator
from blindtune.offsite.emulator import Emulator, open_emulator
from blindtune.offsite.model_owner.emulation import full_model_facts, uniform_choice

Curve = tuple[tuple[int, Perplexity], ...]
"""(tokens of public text spent, loss on the test text)."""


@dataclass(frozen=True, kw_only=True)
class Lead:
    """By how much one model is better than another on the same windows, in nats a token."""

    nats: float
    """Negative: it is worse."""
    reach: float
    """Half of the interval; infinite for a single window."""


@dataclass(frozen=True, kw_only=True)
class Misuse:
    """Losses on the test text."""

    full: Perplexity
    """The full model, untouched."""
    emulator: Perplexity
    """The emulator as it was shipped (Emulator ZS)."""
    tuned: Perplexity | None
    """With its adapter (Emulator FT); None without one."""
    healed: Curve
    control: Curve
    """Both empty where healing was not asked for; the control also where it would be the full
    model: an emulator with as many layers whole has no smaller model to be compared with."""
    learning_rate: float | None
    """At which the emulator was healed; of several, the one that got furthest."""
    lead: Lead | None
    """Of the healed emulator over the control, each at its best; None without either."""

    @property
    def healed_best(self) -> Perplexity:
        """The attacker's best stop."""
        return best(self.healed)[1]

    @property
    def settled(self) -> bool:
        """Whether the best stop came before the last: more text would have made nothing better."""
        return not self.healed or best(self.healed) != self.healed[-1]

    @property
    def healed_share(self) -> float | None:
        """Share of the emulator's deficit that healing closes; None where there is no deficit."""
        shipped = self.emulator.nats_per_token
        deficit = shipped - self.full.nats_per_token
        closed = shipped - self.healed_best.nats_per_token
        return closed / deficit if deficit > 1e-3 else None


def best(curve: Curve) -> tuple[int, Perplexity]:
    """The stop of the lowest loss, with the tokens spent until there."""
    return min(curve, key=lambda stop: stop[1].nats_per_token)


def judge_misuse(
    emulator: str | Path,
    model: str | Path,
    public_NL: Tensor,
    test_NL: Tensor,
    attackers: Sequence[HealingConfig] = (HealingConfig(),),
    *,
    confidence: float = 0.95,
    adapter: str | Path | None = None,
    trust: Trust | None = None,
    batch_size: int = 8,
    on_stop: Callable[[str, int, float], None] = lambda *_: None,
) -> Misuse:
    """Run the attack and its control, and score both.

    Args:
        emulator: the package.
        model: the full model; only for the scores and the control.
        public_NL: what the attacker trains on.
        test_NL: what is scored.
        attackers: ways to heal, such as learning rates, as what heals best depends on the
            emulator; each begins with what was shipped, and the best counts. The control is trained
            as the first one says. None: the emulator is used as it is, and nothing is trained.
        confidence: of the lead's interval.
        adapter: tuned on this emulator; scored only.
        trust: whose packages are opened; None: anybody's.
        batch_size: windows of one forward pass when scoring.
        on_stop: called with ("control" or "healed at RATE", tokens, nats).

    Raises:
        MismatchError: the emulator was made of another model, or the adapter on another emulator.
        PackageError, ModelError, DataError: see errors.py.
    """
    judge = _Judge(emulator, test_NL, batch_size, trust, on_stop)
    victim = judge.opened()
    full = load_model(model, device=preferred_device())
    check_full_model(full, victim.manifest, model)
    untouched, left = mean_loss(*judge.score(victim.model)), _full_layers(victim)
    del victim
    tuned = None
    if adapter is not None:
        tuned = mean_loss(*judge.score(tuned_emulator(judge.opened(), adapter, trust=trust).model))
    scored_full = mean_loss(*judge.score(full))
    control: _Points = ()
    if attackers and left < Decoder(full).layer_count:
        control = judge.control(drop_to(full, left), public_NL, attackers[0])
    del full
    healed, by = judge.best(public_NL, attackers) if attackers else ((), None)
    return Misuse(
        full=scored_full,
        emulator=untouched,
        tuned=tuned,
        healed=_curve(healed),
        control=_curve(control),
        learning_rate=by.learning_rate if by else None,
        lead=_lead(healed, control, confidence) if healed and control else None,
    )


def check_full_model(model: PreTrainedModel, emulator: EmulatorManifest, place: str | Path) -> None:
    """Refuse another model than the one that an emulator was made of.

    Args:
        model: at `place`; without weights (on the meta device) its size alone is compared.

    Raises:
        MismatchError: it is another one.
    """
    found, made_of = full_model_facts(model), emulator.full_model
    same = (found.parameters, found.layers) == (made_of.parameters, made_of.layers)
    if same and model.device.type != "meta":
        same = fingerprint(model) == emulator.model
    if not same:
        raise MismatchError(
            f"{place}: expected the model that the emulator was made of (fingerprint "
            f"{emulator.model[:12]}..., {made_of.layers} layers), got another one of "
            f"{found.layers} layers: give the model of this emulator"
        )


_Scores = tuple[Tensor, Tensor]
"""Nats and scored tokens of every window, shape N."""
_Points = tuple[tuple[int, _Scores], ...]
"""(tokens of public text spent, what the test text's windows cost then)."""


class _Judge:
    """Opens the emulator, and scores whatever is made of it."""

    def __init__(
        self,
        emulator: str | Path,
        test_NL: Tensor,
        batch_size: int,
        trust: Trust | None,
        on_stop: Callable[[str, int, float], None],
    ) -> None:
        self._emulator, self._trust = emulator, trust
        self._test_NL, self._batch_size, self._on_stop = test_NL, batch_size, on_stop

    def opened(self) -> Emulator:
        victim = open_emulator(self._emulator, dtype=torch.float32, trust=self._trust)
        victim.model.to(preferred_device())
        return victim

    def score(self, model: PreTrainedModel) -> _Scores:
        return window_sums(model, self._test_NL, batch_size=self._batch_size)

    def follow(self, name: str, model: PreTrainedModel, stops: Iterator[Stop]) -> _Points:
        """The points of a curve, told as they come."""
        points = []
        for stop in stops:
            found = self.score(model)
            self._on_stop(name, stop.tokens, mean_loss(*found).nats_per_token)
            points.append((stop.tokens, found))
        return tuple(points)

    def control(self, small: PreTrainedModel, public_NL: Tensor, config: HealingConfig) -> _Points:
        faster = replace(config, learning_rate=config.control_learning_rate)
        return self.follow("control", small, train_on(small, public_NL, faster))

    def best(
        self, public_NL: Tensor, attackers: Sequence[HealingConfig]
    ) -> tuple[_Points, HealingConfig]:
        """What the best of these gets, and which one it is."""
        tries = [(self.healed(public_NL, one), one) for one in attackers]
        return min(tries, key=lambda found: _best_point(found[0])[1])

    def healed(self, public_NL: Tensor, config: HealingConfig) -> _Points:
        view = EmulatorView(model=self.opened().model, public_NL=public_NL)
        return self.follow(f"healed at {config.learning_rate:g}", view.model, heal(view, config))


def _curve(points: _Points) -> Curve:
    return tuple((tokens, mean_loss(*scores)) for tokens, scores in points)


def _best_point(points: _Points) -> tuple[_Scores, float]:
    """The stop of the lowest loss, and that loss."""
    losses = [mean_loss(*scores).nats_per_token for _, scores in points]
    lowest = min(losses)
    return points[losses.index(lowest)][1], lowest


def _lead(healed: _Points, control: _Points, confidence: float) -> Lead:
    """Of the best stop over the control's, paired window by window."""
    (mine_N, tokens_N), (theirs_N, _) = (_best_point(points)[0] for points in (healed, control))
    ahead = mean_of((theirs_N - mine_N)[None], tokens_N, 0.5 + confidence / 2)
    return Lead(nats=ahead.value, reach=float(ahead.errors.norm()))


def drop_to(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Keep `count` evenly spaced layers, the first and last among them, in place."""
    keep_layers(model, sorted(uniform_choice(Decoder(model).layer_count, max(2, count))))
    return model


def _full_layers(emulator: Emulator) -> int:
    decoder = Decoder(emulator.model)
    return sum(decoder.is_raw(i) for i in range(decoder.layer_count))
