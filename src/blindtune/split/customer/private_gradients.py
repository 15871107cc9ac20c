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
kill sends what it has sent, and one whose stored gradients are gone does not go on.

**What is not covered.** The texts (the privatizer's promise is for them, and the two add up for a
whole record); lengths; how many classes there are; another job with the same records, which spends
again; a document in several windows, or a person with several records. The noise is floating-point
(arXiv 2107.10138): its last bits are not those of a Gaussian.

Shapes: B records, C outputs, L length, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blindtune.atomic import atomic_file
from blindtune.errors import ConfigError, DataError, PolicyError
from blindtune.exchange.wire.messages import Partition
from blindtune.privacy.entropy import Uniforms, system_uniforms
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PlannedBatch
from blindtune.training.dp_plan import DpConfig, least_noise
from blindtune.training.private_sgd import gaussian

_FORGOTTEN = "forgotten"


@dataclass(frozen=True, kw_only=True)
class GradientPlan:
    """What the gradients of a job will have spent when it ends, known before it begins."""

    epsilon: float
    delta: float
    unit: str
    """What is protected: the target of a record, or of a window of text."""
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


def plan_gradients(config: DpConfig, task: str, records: int, passes: int) -> GradientPlan | None:
    """The least noise that keeps a job's gradients within their epsilon; None without one.

    Gradients of words have no natural size, so all are scaled to C. A class moves the gradient of
    cross-entropy by the outputs (probabilities less the label as one 1 among zeros) from one corner
    to another: by the square root of 2, however large C is.

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
    sigma, spent, delta = least_noise(config, records, sampling_rate=1.0, steps=passes)
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


def check_fit(config: DpConfig, privatizer: PrivatizerConfig, partition: Partition) -> None:
    """Raise ConfigError where noise on gradients protects nothing, or something else does."""
    if config.epsilon is None:
        return
    if partition != "u-shape":
        raise ConfigError(
            "in the two-part split labels are sent, so noise on gradients would protect nothing: "
            "leave dp_epsilon, and give label_epsilon; or ask the vendor for a u-shape package"
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
        folder: where noised gradients are kept, so that a job can go on; it must be there. None:
            nowhere, for jobs that cannot be gone on with.
        uniforms: where the noise comes from.
    """

    def __init__(
        self, plan: GradientPlan, folder: Path | None, uniforms: Uniforms = system_uniforms
    ) -> None:
        self._plan, self._folder, self._uniforms = plan, folder, uniforms
        self._forgotten = 0
        if folder is not None and (mark := folder / _FORGOTTEN).exists():
            self._forgotten = int(mark.read_text())

    def cover(self, tensor: Tensor, batch: PlannedBatch) -> None:
        """Let the gradient by this tensor [B, ...] be noised before it goes on, towards the vendor.

        Args:
            tensor: of one record a row; all of the loss's gradients pass by it.
            batch: whose mean loss, weighed by its share of the step, is differentiated.
        """
        tensor.register_hook(lambda gradient: self._noised(gradient, batch))

    def forget(self, number: int) -> None:
        """Remove what belongs to requests up to `number`; no job goes back before it."""
        if self._folder is None or number <= self._forgotten:
            return
        with atomic_file(self._folder / _FORGOTTEN) as partial:  # first: or they are drawn anew
            partial.write_text(str(number))
        self._forgotten = number
        for path in self._folder.glob("*.safetensors"):
            if int(path.stem) <= number:
                path.unlink()

    def _noised(self, gradient: Tensor, batch: PlannedBatch) -> Tensor:
        if self._folder is None:
            return self._drawn(gradient, batch)
        path = self._folder / f"{batch.number}.safetensors"
        if path.exists():
            return _read(path).to(gradient)
        if batch.number <= self._forgotten:
            raise PolicyError(
                f"the vendor went back to request {batch.number}, and noise on the same gradients "
                "drawn again would spend again: begin another job with another --out"
            )
        drawn = self._drawn(gradient, batch)
        with atomic_file(path) as partial:
            partial.touch(mode=0o600)
            save_file({"gradient": drawn}, partial)
            partial.chmod(0o600)  # if the library made another file in its place
        return drawn

    def _drawn(self, gradient: Tensor, batch: PlannedBatch) -> Tensor:
        """Every record's gradient with noise; B rows, each its share of the step's mean."""
        plan, rows = self._plan, gradient.detach().cpu().double().flatten(1) * batch.step_texts
        rows[~rows.isfinite().all(1)] = 0  # a vendor may send what has no gradient
        factor_B1 = plan.max_grad_norm / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
        rows *= factor_B1 if plan.scaled else factor_B1.clamp(max=1.0)
        rows += plan.deviation * gaussian(self._uniforms, rows.shape)
        return (rows / batch.step_texts).view(gradient.shape).to(gradient)


def _read(path: Path) -> Tensor:
    try:
        gradient: Tensor = load_file(path)["gradient"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(
            f"{path}: expected a gradient that was sent, cannot read it, and another draw would "
            "spend again: put it back, or begin another job"
        ) from error
    return gradient
