"""How much noise a private tuning needs, fixed before the data is looked at; see `private_sgd`.

The customer of the U-shape plans with the same accountant (`split.customer.private_gradients`).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any, Literal

from blindtune.errors import ConfigError
from blindtune.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class DpConfig:
    """Differential privacy of a tuning, for each record."""

    epsilon: float | None = None
    """Bound of what the adapter tells of any one record; None: trained without."""
    delta: float | None = None
    """Chance that the bound does not hold; None: 1 / (10 x records)."""
    max_grad_norm: float = 1.0
    """C: a record's gradient is scaled down to this norm."""
    unit: Literal["record", "window"] = "record"
    """What is protected. record: one record of the data (texts are not packed). window: a window of
    packed text; a document that spans several is protected less."""

    def __post_init__(self) -> None:
        """Refuse values out of range, and options that nothing would use."""
        for name in ("epsilon", "delta", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"expected dp_{name} above 0 and finite, got {value}")
        if self.delta is not None and self.delta >= 1:
            raise ConfigError(f"expected dp_delta below 1, got {self.delta}")
        if self.unit not in ("record", "window"):
            raise ConfigError(f"expected unit record or window, got {self.unit!r}")
        check_epsilon_given(self)


def check_epsilon_given(config: Any) -> None:
    """Refuse a delta, a norm or a unit without an epsilon: nothing would be private.

    Args:
        config: a `DpConfig` or a `GradientConfig`; what is as by default was not asked for.

    Raises:
        ConfigError: another option than epsilon is not as by default, and epsilon is None.
    """
    given = [f"dp_{f.name}" for f in fields(config) if getattr(config, f.name) != f.default]
    if given and config.epsilon is None:
        raise ConfigError(
            f"expected dp_epsilon with {', '.join(given)}, got none: without it there is no "
            "differential privacy; give dp_epsilon, or leave the others"
        )


@dataclass(frozen=True, kw_only=True)
class DpPlan:
    """What a run will have spent when it ends, known before it begins."""

    epsilon: float
    delta: float
    unit: str
    noise_multiplier: float
    """sigma: deviation of the noise over C."""
    sampling_rate: float
    """Chance of a record to be in a step."""
    steps: int
    max_grad_norm: float
    expected_batch: float
    """Records that a step has on average."""


def plan_noise(config: DpConfig, training: TrainingConfig, records: int) -> DpPlan:
    """The least noise that keeps a run within its epsilon.

    Args:
        config: with an epsilon.
        training: its effective batch is the expected one; steps as without privacy.
        records: N.

    Raises:
        ConfigError: Opacus is not installed; fewer records than two batches;
            no noise reaches this epsilon; early stopping, which would look at private data.
    """
    assert config.epsilon is not None, "a plan needs an epsilon"
    batch = _expected_batch(training, records)
    rate = batch / records
    steps = training.max_steps or math.ceil(records * training.num_train_epochs / batch)
    delta = config.delta or 1 / (10 * records)
    sigma, spent = least_noise(config.epsilon, delta, sampling_rate=rate, steps=steps)
    return DpPlan(
        epsilon=spent,
        delta=delta,
        unit=config.unit,
        noise_multiplier=sigma,
        sampling_rate=rate,
        steps=steps,
        max_grad_norm=config.max_grad_norm,
        expected_batch=float(batch),
    )


def least_noise(
    epsilon: float, delta: float, *, sampling_rate: float, steps: int
) -> tuple[float, float]:
    """The least noise of a Gaussian mechanism that is used several times.

    Args:
        epsilon, delta: what may be spent.
        sampling_rate: chance of a record to be in a step.
        steps: how often it is used.

    Returns:
        The noise's deviation over the sensitivity, and the epsilon that all steps spend with it.

    Raises:
        ConfigError: Opacus is not installed, or no noise reaches this epsilon.
    """
    try:
        from opacus.accountants import PRVAccountant
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError as error:
        raise ConfigError(
            "differential privacy needs Opacus, which is not installed: "
            "run `pip install 'blindtune[dp]'`"
        ) from error
    try:
        with warnings.catch_warnings():
            # Of the cruder bound by which it finds its grid; and log(0) at sampling rate 1, whose
            # infinity is the right limit.
            warnings.filterwarnings("ignore", "Optimal order", UserWarning)
            warnings.filterwarnings("ignore", "divide by zero", RuntimeWarning)
            sigma = get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=sampling_rate,
                steps=steps,
                accountant="prv",
            )
            accountant = PRVAccountant()
            accountant.history = [(sigma, sampling_rate, steps)]
            spent = float(accountant.get_epsilon(delta=delta))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"expected an epsilon that some noise reaches in {steps} steps, got {epsilon}: "
            f"{error}; raise it, or lower the steps (of split tuning: epochs)"
        ) from error
    return float(sigma), spent


def _expected_batch(training: TrainingConfig, records: int) -> int:
    """Records of a step on average; ConfigError where sampling cannot hide one."""
    if training.early_stopping_patience is not None:
        raise ConfigError(
            "expected no early_stopping_patience with differential privacy: when to stop would "
            "be told by private data; leave it out"
        )
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if records < 2 * batch:
        raise ConfigError(
            f"expected at least {2 * batch} records for an expected batch of {batch}, got "
            f"{records}: lower per_device_train_batch_size, give more records, or (plain text, "
            "which is one record a file) take unit window"
        )
    return batch
