"""DP-SGD at the customer of the U-shape: gradients that hardly depend on any one target.

The targets of a U-shape job (labels, numbers, or a language model's true words) stay at the
customer and leave through gradients alone. Here every record's gradient is shortened to norm C and
gets Gaussian noise (arXiv 1607.00133, algorithm 1) where its target enters: at the head's outputs,
C numbers of a record, or, where the model's own head predicts words, at what leaves the trunk. The
head's own gradient, and all that crosses, are computed from the noised ones. Records are not
summed before they leave, so no other record hides one: the noise covers each alone.

**Guarantee.** Whatever leaves in all passes is (epsilon, delta)-differentially private for
replacing one record's target by any other, against a vendor who knows the model, all states and
all other targets, answers whatever it likes, and kills the customer's process at any time.
Accounted by Opacus (privacy loss random variables, arXiv 2106.02848): one release of each record a
pass, none of them by chance.

**Conditions.** A gradient is noised once, and stored before it is sent: a job that goes on after a
kill sends what it has sent, and one whose stored gradients are gone does not go on. Nobody goes on
with a copy or a backup of the job.

**What is not covered.** The texts (the privatizer's promise is for them, and the two add up for a
whole record); lengths; which classes there are (a target is replaced by another of these); another
job with the same records, which spends again; a document in several windows, or a person with
several records. The noise is floating-point (arXiv 2107.10138): its last bits are not those of a
Gaussian.

Shapes: B records, C outputs, L length, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blindtune.atomic import remove_left_overs, secret_file
from blindtune.errors import ConfigError, DataError, PolicyError
from blindtune.exchange.wire.messages import Partition
from blindtune.privacy.entropy import Uniforms, system_uniforms
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PlannedBatch
from blindtune.training.dp_plan import check_epsilon_given, least_noise
from blindtune.training.private_sgd import gaussian

Unit = Literal["record", "window"]


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """Differential privacy of what gradients tell of each target, in the U-shape."""

    epsilon: float | None = None
    """Bound of what all gradients together tell of one text's target: its class or number, or the
    true words of a window. The text itself is the privatizer's. None: gradients have no noise."""
    delta: float | None = None
    """Chance that the bound does not hold; None: 1 / (10 x texts)."""
    max_grad_norm: float = 1.0
    """C: norm to which a text's gradient is shortened; those of words are all brought to it."""
    unit: Unit = "record"
    """What is protected: record (a labelled text) or window (of a language model's text; a document
    that spans several is protected less)."""

    def __post_init__(self) -> None:
        """Refuse values out of range, and options that nothing would use."""
        for name in ("epsilon", "delta", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"expected dp_{name} above 0 and finite, got {value}")
        if self.delta is not None and self.delta >= 1:
            raise ConfigError(f"expected dp_delta below 1, got {self.delta}")
        if self.unit not in get_args(Unit):
            raise ConfigError(f"expected unit record or window, got {self.unit!r}")
        check_epsilon_given(self)


@dataclass(frozen=True, kw_only=True)
class GradientPlan:
    """What the gradients of a job will have spent when it ends, known before it begins."""

    epsilon: float
    delta: float
    unit: Unit
    """Whose target is protected."""
    passes: int
    """How often a gradient of each record leaves."""
    max_grad_norm: float
    """C."""
    scaled: bool
    """Whether shorter gradients are brought up to C too."""
    sensitivity: float
    """How far apart another target can move a record's gradient."""
    noise_multiplier: float
    """Deviation of the noise over the sensitivity."""

    @property
    def deviation(self) -> float:
        """Of the noise on every number of a record's gradient."""
        return self.noise_multiplier * self.sensitivity

    def __str__(self) -> str:
        """What is promised, in words."""
        target = "each text's target" if self.unit == "record" else "what each window predicts"
        return (
            f"gradients leave with noise (DP-SGD: {self.deviation:.3g} on every number, a text's "
            f"gradient has norm {self.max_grad_norm:g} at most): all passes together tell at most "
            f"epsilon {self.epsilon:.3g} of {target}, but for a chance of {self.delta:.2g}"
        )


def plan_gradients(
    config: GradientConfig, task: str, records: int, passes: int
) -> GradientPlan | None:
    """The least noise that keeps a job's gradients within their epsilon; None without one.

    Gradients of words have no natural size, so all are scaled to C. A class moves the gradient of
    cross-entropy by the outputs (probabilities less the label as one 1 among zeros) from one corner
    to another: by the square root of 2, however large C is. Any other loss may move it by 2 C, as
    in regression.

    Args:
        config: what is to be spent.
        task: classification, regression, language-model.
        records: N.
        passes: how often a gradient of each leaves.

    Raises:
        ConfigError: windows of text that are called records, or the other way round; or as
            `dp_plan.least_noise`.
    """
    if config.epsilon is None:
        return None
    words = task == "language-model"
    if words != (config.unit == "window"):
        raise ConfigError(
            "expected dp_unit window for language-model: what is protected is a window of text, "
            "and a document that spans several is protected less"
            if words
            else f"expected dp_unit record for {task}: each text is a record"
        )
    delta = config.delta or 1 / (10 * records)
    sigma, spent = least_noise(config.epsilon, delta, sampling_rate=1.0, steps=passes)
    furthest = 2 * config.max_grad_norm
    return GradientPlan(
        epsilon=spent,
        delta=delta,
        unit=config.unit,
        passes=passes,
        max_grad_norm=config.max_grad_norm,
        scaled=words,
        sensitivity=min(furthest, math.sqrt(2)) if task == "classification" else furthest,
        noise_multiplier=sigma,
    )


def check_fit(config: GradientConfig, privatizer: PrivatizerConfig, partition: Partition) -> None:
    """Raise ConfigError where noise on gradients protects nothing, or something else does."""
    if config.epsilon is None:
        return
    if partition != "u-shape":
        raise ConfigError(
            "in the two-part split labels are sent, so noise on gradients would protect nothing: "
            "ask the vendor for a u-shape package; or leave dp_epsilon (classes have label_epsilon)"
        )
    if privatizer.label_epsilon is not None or privatizer.targets == "sent":
        given = "label_epsilon" if privatizer.label_epsilon is not None else "targets sent"
        raise ConfigError(
            f"expected dp_epsilon or {given}, got both: with {given} gradients tell no more than "
            "is promised already; choose one (for true words, targets true)"
        )
    if privatizer.cti_fraction:
        raise ConfigError(
            "expected dp_epsilon or cti_fraction, got both: tokens that are spared by their label "
            "show it"
        )


@final
class GradientNoise:
    """Noise on the gradients of one job, each noised once.

    Args:
        plan: how much.
        folder: where noised gradients are kept, so that a job can go on, and beside it, in a .json,
            how far they were noised; `begin` makes both. None: nowhere, for jobs that cannot be
            gone on with.
        uniforms: where the noise comes from.

    Raises:
        DataError: what was noised before is gone, or of another plan.
    """

    def __init__(
        self, plan: GradientPlan, folder: Path | None, uniforms: Uniforms = system_uniforms
    ) -> None:
        self._plan, self._folder, self._uniforms = plan, folder, uniforms
        self._noised_to = 0
        if folder is not None:
            self._noised_to = _read_mark(folder, plan)
            remove_left_overs(folder)

    @staticmethod
    def begin(plan: GradientPlan, folder: Path) -> GradientNoise:
        """For a job of which nothing was sent yet.

        Raises:
            OutputError: the folder cannot be written.
        """
        folder.mkdir(mode=0o700, exist_ok=True)
        _write_mark(folder, plan, 0)
        return GradientNoise(plan, folder)

    def cover(self, tensor: Tensor, batch: PlannedBatch) -> None:
        """Let the gradient by this tensor [B, ...] be noised before it goes on, towards the vendor.

        Args:
            tensor: of one record a row, which depends on that record's target alone; all of the
                loss's gradients pass by it. A plan of classification is for the outputs of plain
                cross-entropy; for any other loss make one of regression.
            batch: whose mean loss, weighed by its share of the step, is differentiated.

        Its backward raises:
            PolicyError: this gradient was noised before, and is not kept.
            DataError: what is kept of it cannot be read.
            OutputError: it cannot be kept.
        """
        tensor.register_hook(lambda gradient: self._noised(gradient, batch))

    def forget(self, number: int) -> None:
        """Remove what belongs to requests up to `number`: no job goes back before it."""
        if self._folder is not None:
            for path in self._folder.glob("*.safetensors"):
                if int(path.stem) <= number:
                    path.unlink()

    def _noised(self, gradient: Tensor, batch: PlannedBatch) -> Tensor:
        path = None if self._folder is None else self._folder / f"{batch.number}.safetensors"
        if path is not None and path.exists():
            noised = _read_gradient(path, gradient)
        elif batch.number <= self._noised_to:
            raise PolicyError(
                f"the gradients of request {batch.number} were sent before and are not kept, and "
                "noise on them drawn again would spend more than was promised: give this job up. "
                "Another one with these texts spends its own epsilon besides"
            )
        else:
            noised = self._drawn(gradient, batch)
            if path is not None:
                with secret_file(path) as partial:
                    save_file({"gradient": noised}, partial)
        self._mark(batch.number)
        return noised

    def _mark(self, number: int) -> None:
        """Note how far gradients are noised, after these are kept: a kill between loses nothing."""
        if number > self._noised_to:
            if self._folder is not None:
                _write_mark(self._folder, self._plan, number)
            self._noised_to = number

    def _drawn(self, gradient: Tensor, batch: PlannedBatch) -> Tensor:
        """Every record's gradient with noise; B rows, each its share of the step's mean."""
        plan, rows_BN = self._plan, gradient.detach().cpu().double().flatten(1) * batch.step_texts
        rows_BN[~rows_BN.isfinite().all(1)] = 0  # a vendor may send what has no gradient
        factor_B1 = plan.max_grad_norm / rows_BN.norm(dim=1, keepdim=True).clamp_min(1e-30)
        rows_BN *= factor_B1 if plan.scaled else factor_B1.clamp(max=1.0)
        rows_BN += plan.deviation * gaussian(self._uniforms, rows_BN.shape)
        return (rows_BN / batch.step_texts).view(gradient.shape).to(gradient)


class _Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a job's gradients were noised, and by which plan."""

    plan: GradientPlan
    noised_to: int
    """The last request."""


def _mark_path(folder: Path) -> Path:
    return folder.with_suffix(".json")


def _write_mark(folder: Path, plan: GradientPlan, number: int) -> None:
    with secret_file(_mark_path(folder)) as partial:
        partial.write_bytes(msgspec.json.encode(_Mark(plan, number)))


def _read_mark(folder: Path, plan: GradientPlan) -> int:
    path = _mark_path(folder)
    try:
        mark = msgspec.json.decode(path.read_bytes(), type=_Mark)
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(
            f"{path}: expected how far gradients were noised, cannot read it, and noise on them "
            "drawn again would spend more than was promised: put it back, or give the job up"
        ) from error
    if mark.plan != plan:
        raise DataError(f"{path}: expected gradients of this plan, these are of another one")
    return mark.noised_to


def _read_gradient(path: Path, like: Tensor) -> Tensor:
    try:
        gradient: Tensor = load_file(path)["gradient"]
        return gradient.view(like.shape).to(like)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise DataError(
            f"{path}: expected the gradient that was sent, cannot read it, and noise on it drawn "
            "again would spend more than was promised: put it back, or give the job up"
        ) from error
