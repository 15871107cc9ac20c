"""What an emulator is worth without its owner: the judge of `attacks.emulator_misuse`.

Four things on one scale, nats a token on text that the attacker did not train on: the full model,
the emulator as it is (and tuned, if an adapter is given), the emulator healed on public text by the
number of tokens spent, and a control: a model with as many full layers as the emulator, made of the
full model by dropping evenly spaced layers and trained on the same text in the same way. If healing
gets no further than the control, the emulator gave away no more than a small model would have.

Shapes: N windows, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blindtune.attacks.emulator_misuse import EmulatorView, HealingConfig, Stop, heal, train_on
from blindtune.evaluation.utility import perplexity
from blindtune.models.decoder import Decoder
from blindtune.models.loading import load_model
from blindtune.models.surgery import keep_layers
from blindtune.offsite.adapter import tuned_emulator
from blindtune.offsite.emulation import uniform_choice
from blindtune.offsite.emulator import Emulator, open_emulator

Curve = tuple[tuple[int, float], ...]
"""(tokens of public text spent, nats a token on the test text)."""


@dataclass(frozen=True, kw_only=True)
class Misuse:
    """Nats a token on the test text."""

    full: float
    """The full model, untouched."""
    emulator: float
    """The emulator as it was shipped (Emulator ZS)."""
    tuned: float | None
    """With its adapter (Emulator FT); None without one."""
    healed: Curve
    control: Curve

    @property
    def healed_share(self) -> float | None:
        """Share of the emulator's deficit that healing closes; None where there is no deficit."""
        deficit = self.emulator - self.full
        best = min(nats for _, nats in self.healed)
        return (self.emulator - best) / deficit if deficit > 1e-3 else None


def judge_misuse(
    emulator: str | Path,
    model: str | Path,
    public_NL: Tensor,
    test_NL: Tensor,
    config: HealingConfig | None = None,
    *,
    adapter: str | Path | None = None,
    on_stop: Callable[[str, int, float], None] | None = None,
) -> Misuse:
    """Run the attack and its control, and score both.

    Args:
        emulator: the package.
        model: the full model; only for the scores and the control.
        public_NL: what the attacker trains on.
        test_NL: what is scored.
        config: the attacker's.
        adapter: tuned on this emulator; scored only.
        on_stop: called with ("healed" or "control", tokens, nats).

    Raises:
        PackageError, ModelError, DataError: see errors.py.
    """
    config = config or HealingConfig()
    tuned = None
    if adapter is not None:
        tuned = _nats(tuned_emulator(_opened(emulator), adapter).model, test_NL)
    full = load_model(model)
    scored_full = _nats(full, test_NL)
    small = drop_to(full, _full_layers(emulator))
    control = _curve("control", small, train_on(small, public_NL, config), test_NL, on_stop)
    del full, small
    victim = _opened(emulator).model
    untouched = _nats(victim, test_NL)
    stops = heal(EmulatorView(model=victim, public_NL=public_NL), config)
    healed = _curve("healed", victim, stops, test_NL, on_stop)
    return Misuse(full=scored_full, emulator=untouched, tuned=tuned, healed=healed, control=control)


def drop_to(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Keep `count` evenly spaced layers, the first and last among them, in place."""
    keep_layers(model, sorted(uniform_choice(Decoder(model).layer_count, max(2, count))))
    return model


def _opened(emulator: str | Path) -> Emulator:
    return open_emulator(emulator, dtype=torch.float32)


def _full_layers(emulator: str | Path) -> int:
    decoder = Decoder(_opened(emulator).model)
    return sum(decoder.is_raw(i) for i in range(decoder.layer_count))


def _curve(
    name: str,
    model: PreTrainedModel,
    stops: Iterator[Stop],
    test_NL: Tensor,
    on_stop: Callable[[str, int, float], None] | None,
) -> Curve:
    points = []
    for stop in stops:
        nats = _nats(model, test_NL)
        points.append((stop.tokens, nats))
        if on_stop is not None:
            on_stop(name, stop.tokens, nats)
    return tuple(points)


def _nats(model: PreTrainedModel, test_NL: Tensor) -> float:
    return perplexity(model, test_NL).nats_per_token
