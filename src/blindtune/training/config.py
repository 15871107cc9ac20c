"""What a training run is given, and what it gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from blindtune.errors import ConfigError
from blindtune.kinds import check_kinds
from blindtune.training.optimizers import SCHEDULES, ScheduleName


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What decides the result of a run; names as in `transformers.TrainingArguments`."""

    learning_rate: float = 6e-4
    """Peak learning rate of AdamW; measured for adapters. Lower it for all weights of a model."""
    max_steps: int | None = None
    """Optimizer steps; None: as many as `num_train_epochs` need."""
    num_train_epochs: float = 1.0
    """Passes over the data when max_steps is None."""
    per_device_train_batch_size: int = 8
    """Examples of one process in one forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes an optimizer step. Effective batch = this x batch size x processes."""
    lr_scheduler_type: ScheduleName = "linear"
    """linear or cosine (to 0 at the last step), or constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns that off."""
    seed: int = 42
    """Order of the examples, and dropout."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a new lowest validation loss; None: never."""
    load_best_model_at_end: bool = True
    """With a validation set: end with the weights of the lowest validation loss."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_kinds(self)
        positive: dict[str, float | None] = {
            "learning_rate": self.learning_rate,
            "max_steps": self.max_steps,
            "num_train_epochs": self.num_train_epochs,
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "early_stopping_patience": self.early_stopping_patience,
        }
        not_negative: dict[str, float | None] = {
            "warmup_steps": self.warmup_steps,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "seed": self.seed,
        }
        _check_numbers(positive, not_negative)
        if self.lr_scheduler_type not in SCHEDULES:
            raise ConfigError(
                f"lr_scheduler_type must be one of {', '.join(SCHEDULES)}, "
                f"got {self.lr_scheduler_type!r}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What changes speed, memory and bookkeeping; the result, by eval_steps and precision alone."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16, for GPUs (CPUs are slower with it): matrix products in it, by autocast, and what is
    not trained is rounded to it, in half the memory. Trained weights are float32 either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    per_device_eval_batch_size: int = 8
    """Examples of one process in one forward pass of the validation."""
    eval_steps: int | None = None
    """Steps between evaluations; None: a tenth of the run. The last step is always evaluated. Only
    an evaluated step can be the best one, so another value is another run."""
    save_steps: int | None = None
    """Steps between checkpoints; None: as eval_steps. The last step is always saved."""
    logging_steps: int = 1
    """Steps between entries of the loss history."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the last complete checkpoint of the same run; never: start anew."""
    tensorboard: bool = False
    """Write TensorBoard logs beside the checkpoints (needs the extra of that name)."""
    threads: int | None = None
    """CPU threads of torch during the run; None: as they are."""
    silent: bool = False
    """No progress bar (there is none without a terminal either)."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_kinds(self)
        positive: dict[str, float | None] = {
            "per_device_eval_batch_size": self.per_device_eval_batch_size,
            "eval_steps": self.eval_steps,
            "save_steps": self.save_steps,
            "logging_steps": self.logging_steps,
            "threads": self.threads,
        }
        _check_numbers(positive, {})
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        if self.resume not in ("auto", "never"):
            raise ConfigError(f"resume must be auto or never, got {self.resume!r}")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run did."""

    steps: int
    """Optimizer steps of the whole run, earlier parts of a resumed one included."""
    tokens: int
    """Tokens seen (padding left out) by all processes in the whole run."""
    seconds: float
    """Wall time of this call, validation and checkpoints included."""
    tokens_per_second: float
    """Tokens of this call over its seconds."""
    peak_memory_bytes: int
    """GPU: allocated on this process's device. CPU: resident set of the whole process."""
    train_loss: tuple[tuple[int, float], ...]
    """(step, mean loss since the entry before) in nats a token."""
    validation_loss: tuple[tuple[int, float], ...]
    """(step, loss) in nats a token."""
    best_step: int | None
    """Step of the lowest validation loss; None without validation."""
    resumed_from: int | None
    """Step of the checkpoint that this call went on from."""


def _check_numbers(
    positive: dict[str, float | None], not_negative: dict[str, float | None]
) -> None:
    """Raise ConfigError for the first number that is out of range; None is let through."""
    for numbers, lowest, words in ((positive, 0, "above 0"), (not_negative, -1, "0 or more")):
        for name, value in numbers.items():
            fits = value is None or (value > 0 if lowest == 0 else value >= 0)
            if not fits or value == math.inf:
                raise ConfigError(f"{name} must be {words} and finite, got {value}")
