"""What an emulator is worth without its owner: the judge of `attacks.emulator_misuse`.

Four things on one scale, nats a token on text that the attacker did not train on: the full model,
the emulator as it is (and tuned, if an adapter is given), the emulator healed on public text by the
number of tokens spent, and a control: a model with as many full layers as the emulator, made of the
full model by dropping evenly spaced layers and trained on the same text at a rate of its own. If
healing gets no further than the control, the emulator gave away no more than a small model would
have.

Shapes: N windows, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blindtune.attacks.emulator_misuse import EmulatorView, HealingConfig, Stop, heal, train_on
from blindtune.evaluation.utility.loss import Perplexity, perplexity
from blindtune.exchange.packages.signing import Trust
from blindtune.models.decoder import Decoder
from blindtune.models.loading import load_model, preferred_device
from blindtune.models.surgery import keep_layers
from blindtune.offsite.adapter import tuned_emulator
from blindtune.offsite.emulator import Emulator, open_emulator
from blindtune.offsite.model_owner.emulation import uniform_choice

Curve = tuple[tuple[int, Perplexity], ...]
"""(tokens of public text spent, loss on the test text)."""


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
    config: HealingConfig | None = None,
    *,
    heals: bool = True,
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
        config: the attacker's.
        heals: False: the emulator is used as it is, and nothing is trained.
        adapter: tuned on this emulator; scored only.
        trust: whose packages are opened; None: anybody's.
        batch_size: windows of one forward pass when scoring.
        on_stop: called with ("healed" or "control", tokens, nats).

    Raises:
        PackageError, ModelError, DataError: see errors.py.
    """
    config = config or HealingConfig()

    def score(model: PreTrainedModel) -> Perplexity:
        return perplexity(model, test_NL, batch_size=batch_size)

    def curve(name: str, model: PreTrainedModel, stops: Iterator[Stop]) -> Curve:
        return tuple(_followed(stops, lambda: score(model), partial(on_stop, name)))

    victim = open_emulator(emulator, dtype=torch.float32, trust=trust)
    victim.model.to(preferred_device())
    tuned = None
    if adapter is not None:
        other = open_emulator(emulator, dtype=torch.float32, trust=trust)
        tuned = score(tuned_emulator(other, adapter, trust=trust).model.to(preferred_device()))
    full = load_model(model, device=preferred_device())
    scored_full, left = score(full), _full_layers(victim)
    control: Curve = ()
    if heals and left < Decoder(full).layer_count:
        small = drop_to(full, left)
        faster = replace(config, learning_rate=config.control_learning_rate)
        control = curve("control", small, train_on(small, public_NL, faster))
        del small
    del full
    untouched = score(victim.model)
    healed: Curve = ()
    if heals:
        stops = heal(EmulatorView(model=victim.model, public_NL=public_NL), config)
        healed = curve("healed", victim.model, stops)
    return Misuse(full=scored_full, emulator=untouched, tuned=tuned, healed=healed, control=control)


def _followed(
    stops: Iterator[Stop], score: Callable[[], Perplexity], told: Callable[[int, float], None]
) -> Iterator[tuple[int, Perplexity]]:
    """The points of a curve, told as they come."""
    for stop in stops:
        found = score()
        told(stop.tokens, found.nats_per_token)
        yield stop.tokens, found


def drop_to(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Keep `count` evenly spaced layers, the first and last among them, in place."""
    keep_layers(model, sorted(uniform_choice(Decoder(model).layer_count, max(2, count))))
    return model


def _full_layers(emulator: Emulator) -> int:
    decoder = Decoder(emulator.model)
    return sum(decoder.is_raw(i) for i in range(decoder.layer_count))
