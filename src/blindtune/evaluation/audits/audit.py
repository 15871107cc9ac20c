"""What an audit finds: attacks that were run, what each measured, and what it could not run.

An audit of an emulator is for its owner before shipping, of an adapter for the data owner before
returning it, of split tuning for the customer before a real run. Each plays the adversary of its
subject with what that adversary has. A measured leak is real; one that was not found proves
nothing, so every audit sets the accounted guarantee beside its findings, or says that there is
none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from blindtune.errors import ConfigError
from blindtune.kinds import check_kinds

Kind = Literal["emulator", "adapter", "split"]


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """How hard the attacks try, and how much is scored."""

    confidence: float = 0.95
    """Of each interval alone."""
    test_tokens: int = 8192
    """About so many tokens are scored at most, spread evenly over the file: of an emulator's test
    text, or of texts that are attacked in split tuning."""
    healing_steps: int = 64
    """Emulator: optimizer steps that the attacker spends on public text; 0 leaves healing out."""
    healing_batch_size: int = 4
    """Emulator: windows of public text a step."""
    healing_learning_rate: tuple[float, ...] = (5e-5, 2e-4)
    """Emulator: of the attacker's AdamW; healed anew at each, as what heals best depends on the
    emulator. The best counts."""
    max_records: int = 400
    """Adapter: judge at most this many trained records and as many others, spread evenly."""
    false_positive_rate: float = 0.01
    """Adapter: share of other records that the attack may accuse falsely."""
    public_tokens: int = 32768
    """Split: the attacker learns from texts that hold about so many tokens."""
    attack_seconds: float = 300.0
    """Split: after these no epoch of an attack's training, no step of dummy embeddings and no word
    of a language model begins; each has a clock of its own."""
    fresh_draws: int = 8
    """Split: independent draws that are averaged, to show what sending one draw prevents."""
    batch_size: int = 8
    """Windows or records of one forward pass; changes speed and memory only."""
    seed: int = 0
    """Of the attacker's batches."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_kinds(self)
        for name in ("confidence", "false_positive_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"expected {name} between 0 and 1, got {getattr(self, name)}")
        for name, least in (
            ("test_tokens", 2), ("healing_steps", 0), ("healing_batch_size", 1),
            ("max_records", 2), ("batch_size", 1), ("public_tokens", 2), ("fresh_draws", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"expected {name} >= {least}, got {getattr(self, name)}")
        rates = self.healing_learning_rate
        if not rates or not min(rates) > 0:
            raise ConfigError(f"expected healing_learning_rate > 0, got {list(rates)}")
        if not self.attack_seconds > 0:
            raise ConfigError(f"expected attack_seconds > 0, got {self.attack_seconds}")


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig:
    """What the adversary of split tuning has, wants and does beyond what every audit runs."""

    prior: str | None = None
    """A causal language model (a directory, a hub name, an embedded model) that weighs what attacks
    found, beside trigrams; one of other words spells them its way. Seconds a text. Needs
    --public."""
    attribute_column: str | None = None
    """Column of --data and --public with an attribute of each text, such as who wrote it, that the
    adversary guesses. Needs both."""
    dummies: bool = False
    """Behind layers: search for the words of which the bottom makes the states that were seen."""

    def __post_init__(self) -> None:
        """Refuse empty names."""
        for name in ("prior", "attribute_column"):
            if getattr(self, name) == "":
                raise ConfigError(f"expected a name as {name}, got an empty one: leave it out")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One attack and one figure of it."""

    attack: str
    knew: str
    """One sentence: what the attacker had and did."""
    measure: str
    """What `value` is, such as "perplexity" or "AUC"."""
    value: float
    low: float | None = None
    """Lower end of the interval; None where there is none."""
    high: float | None = None
    meaning: str
    """One sentence: what the figure means for the reader."""

    @property
    def shown(self) -> str:
        """The figure for people."""
        return show(self.value)

    @property
    def interval(self) -> str:
        """The interval for people; empty without one."""
        return (
            ""
            if self.low is None or self.high is None
            else f"{show(self.low)} to {show(self.high)}"
        )


@dataclass(frozen=True, kw_only=True)
class NotRun:
    """An attack that fits the subject and was not run."""

    attack: str
    needs: str
    """What it needs, as an option to give."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Everything that one audit found."""

    kind: Kind
    subject: str
    """What was audited, as it was named."""
    verdict: str
    """One or two sentences: what the strongest attack got."""
    guarantee: tuple[str, ...]
    """What is accounted for and holds against every attack, or that nothing is."""
    findings: tuple[Finding, ...]
    strongest: int
    """Which of the findings the reader must look at first."""
    not_run: tuple[NotRun, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain facts about the subject and the data, by name."""
    settled: bool = True
    """Whether every attack that is trained ended by itself; False: `attack_seconds` ended one."""
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Healing: (public tokens spent, nats a token) by name of the curve."""

    def plain(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def show(value: float) -> str:
    """A figure: shares with three digits behind the point, larger numbers with two."""
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:,.2f}"
