"""What a customer asks of a job, and what a vendor allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import msgspec

from blindtune.errors import ConfigError, PolicyError
from blindtune.kinds import check_kinds
from blindtune.split.partition import Pooling
from blindtune.training.optimizers import SCHEDULES, ScheduleName

Targets = Literal["attention", "all"]
OPEN_MESSAGES = 4
"""Of the largest size, whose gradients a customer may owe where nothing else is said."""
PADDED = 2
"""Times the tokens of the largest message that a batch may take with its padding."""


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """How the vendor tunes a job; sent by the customer as the options of `OpenJob`."""

    lora_rank: int = 8
    """Rank of LoRA in the vendor's layers."""
    lora_alpha: float = 16.0
    """LoRA's scale is lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout before LoRA's first factor; the same after a crash."""
    lora_targets: Targets = "all"
    """attention: its linear maps only; all: those of the feed-forward network too."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns that off."""
    schedule: ScheduleName = "constant"
    """constant, or linear or cosine to 0 at max_steps."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    max_steps: int = 0
    """Length of a schedule that is not constant; 0: as many as all epochs make."""
    pooling: Pooling | None = None
    """What the vendor's head reads: first or last token, or the mean; None: the mean for encoders,
    the last token for decoders."""
    seed: int = 0
    """Of the first weights and of dropout."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_kinds(self)
        numbers = (self.learning_rate, self.weight_decay, self.max_grad_norm, self.lora_alpha)
        if self.lora_rank < 1 or not 0 <= self.lora_dropout < 1 or not self.lora_alpha > 0:
            raise ConfigError(
                "expected lora_rank >= 1, lora_alpha > 0 and lora_dropout in [0, 1), got "
                f"{self.lora_rank}, {self.lora_alpha}, {self.lora_dropout}"
            )
        if not self.learning_rate > 0 or not all(0 <= n < 1e6 for n in numbers):  # NaN is neither
            raise ConfigError("learning_rate must be above 0, the other numbers from 0 to 1e6")
        if not all(0 <= n < 2**31 for n in (self.warmup_steps, self.max_steps, self.seed)):
            raise ConfigError("warmup_steps, max_steps and seed must be from 0 to 2147483647")
        if self.schedule not in SCHEDULES or self.lora_targets not in get_args(Targets):
            raise ConfigError(
                f"expected schedule {', '.join(SCHEDULES)} and lora_targets attention or all, got "
                f"{self.schedule!r} and {self.lora_targets!r}"
            )
        if self.pooling is not None and self.pooling not in get_args(Pooling):
            raise ConfigError(f"expected pooling first, mean or last, got {self.pooling!r}")

    def options(self) -> dict[str, int | float | bool | str | None]:
        """As the options of `OpenJob`."""
        return asdict(self)


def tuning_of(options: Mapping[str, Any]) -> TuningConfig:
    """A customer's options, judged; PolicyError says what is wrong with them."""
    unknown = sorted(set(options) - {field.name for field in fields(TuningConfig)})
    if unknown:
        raise PolicyError(f"unknown options {', '.join(unknown[:5])}: leave them out")
    try:
        config = msgspec.convert(dict(options), TuningConfig)
        if config.schedule != "constant" and config.max_steps < 1:
            raise ConfigError(f"max_steps is needed for a {config.schedule} schedule")
        return config
    except (msgspec.ValidationError, ConfigError) as error:
        raise PolicyError(f"these options are not possible: {error}") from error


@dataclass(frozen=True, kw_only=True)
class VendorLimits:
    """What a vendor allows a job; requests beyond it are refused and change nothing."""

    max_message_tokens: int = 16384
    """Tokens of one message, and of the forwards of a job that wait for their gradients (U-shape);
    with the padding that its lengths imply, at most twice as many."""
    max_open_tokens: int | None = None
    """Tokens of forwards that wait for their gradients, of all jobs of a customer (U-shape); None:
    as many as four messages may have."""
    max_sequence_tokens: int | None = None
    """Tokens of one sequence; None: as many as the model takes, 2048 where it has no limit."""
    max_job_tokens: int = 1_000_000_000
    """Tokens that a job may train on and predict, together."""
    max_job_bytes: int = 1_000_000_000_000
    """Bytes of tensors that a job may send and be sent, as they are written on the wire, and that
    its checkpoints hold when they are stored."""
    max_steps: int = 1_000_000
    """Optimizer steps of a job."""
    max_seconds: float = 86400.0
    """Time that the model has worked for a job."""
    max_jobs: int = 64
    """Open jobs, of all customers."""
    max_jobs_per_customer: int = 8
    """Open jobs of one customer."""
    max_idle_days: float = 30.0
    """A job that nobody asked for in as many days expires: all that it learned is removed."""
    max_rank: int = 64
    """LoRA's rank."""
    max_outputs: int = 1024
    """Classes or regression targets."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_kinds(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ConfigError(f"{field.name} must be above 0, got {value}")
        if self.open_tokens < self.max_message_tokens:
            raise ConfigError(
                "expected max_open_tokens of at least max_message_tokens "
                f"({self.max_message_tokens}), got {self.max_open_tokens}: raise it, or nobody "
                "could send the largest message"
            )

    @property
    def open_tokens(self) -> int:
        """What `max_open_tokens` comes to."""
        return self.max_open_tokens or OPEN_MESSAGES * self.max_message_tokens
