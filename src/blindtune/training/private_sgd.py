"""DP-SGD: training whose result hardly depends on any one record (arXiv 1607.00133, algorithm 1).

**Guarantee.** The trained weights are (epsilon, delta)-differentially private for adding or
removing one record: whatever is computed from them, any attack, is bounded. Each step draws every
record with the same chance (Poisson sampling), scales each record's gradient down to norm C, adds
Gaussian noise of deviation sigma C to their sum, and divides by the *expected* number of records.
Per-record gradients and the accountant (privacy loss random variables, arXiv 2106.02848) are
Opacus's; what is to be spent is planned in `dp_plan`.

**Conditions.** One record of the data is one example. The noise is drawn by whoever trains, from
numbers that nobody else can repeat. Steps and noise are fixed before the data is looked at.

**What is not covered.** A person with several records spends epsilon for each. What is released
beside the weights (losses, the number of records, the choice among several tunings) spends more.
Tokenizer, settings and the model before tuning are taken as public. The noise is floating-point
(arXiv 2107.10138): its last bits are not those of a Gaussian.

Shapes: B records of one pass, N records, any shape of a parameter.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blindtune.atomic import remove_left_overs
from blindtune.errors import ConfigError, TrainingError
from blindtune.training import checkpoint
from blindtune.training.batches import collate, padding_id
from blindtune.training.config import RunConfig, TrainingConfig, TrainingResult
from blindtune.training.dataset import TokenDataset
from blindtune.training.dp_plan import DpPlan
from blindtune.training.loss import accepts_logits_to_keep, record_losses
from blindtune.training.optimizers import build_optimizer, build_scheduler
from blindtune.training.progress import (
    OnProgress,
    StepReport,
    Stopwatch,
    peak_memory_bytes,
    progress_bar,
    reset_peak_memory,
)
from blindtune.training.surroundings import surroundings

Uniforms = Callable[..., Tensor]
"""uniforms(*shape): float64 numbers, independent and uniform on (0, 1]."""
_UNREAD = ("max_grad_norm", "eval_steps", "per_device_eval_batch_size", "logging_steps")
"""What a plain run reads and a private one does not."""


def fit_private(
    model: nn.Module,
    train: TokenDataset,
    config: TrainingConfig,
    plan: DpPlan,
    out_dir: str | Path,
    uniforms: Uniforms,
    run: RunConfig | None = None,
    identity: Mapping[str, Any] | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> TrainingResult:
    """Train the parameters that require a gradient, in place, under a plan.

    The model ends in evaluation mode with the weights of the last step: choosing a better one would
    look at private data. Interrupted, the same call goes on from the last checkpoint with fresh
    noise; steps that were lost are not released and not counted, so the plan holds.

    Args:
        model: a causal language model with transformers' calling convention.
        train: one example a record.
        config: what decides the result, but for `max_grad_norm`, which is the plan's.
        plan: from `dp_plan.plan_noise`, for as many records.
        out_dir: place of the checkpoints.
        uniforms: where sampling and noise come from.
        run, identity, on_progress: as for `loop.fit`.

    Raises:
        ConfigError: no per-record gradients of this model; checkpoints of another run; whatever
            `check_private` refuses. TrainingError: gradients not finite.
    """
    run = run or RunConfig()
    check_private(config, run)
    folder = Path(out_dir) / "checkpoints"
    optimizer = build_optimizer(model, config.learning_rate, config.weight_decay)
    schedule = config.lr_scheduler_type
    scheduler = build_scheduler(optimizer, schedule, config.warmup_steps, plan.steps)
    known = {**asdict(config), **asdict(plan), "train": train.fingerprint(), **(identity or {})}
    known["model"] = checkpoint.model_key(model)
    state = _prepare(folder, known, run, model, optimizer, scheduler)
    done, before, watch = state["step"], state["tokens"], Stopwatch()
    every = run.save_steps or -(-plan.steps // 10)
    reset_peak_memory()
    torch.manual_seed(config.seed + done)  # dropout; noise and sampling have numbers of their own
    model.train()
    with surroundings(model, run), _per_record(model), progress_bar(plan.steps, run.silent) as show:
        listeners = [show] if on_progress is None else [show, on_progress]
        for step in range(done + 1, plan.steps + 1):
            loss, seen = _private_step(model, train, config, plan, uniforms, step)
            optimizer.step()
            scheduler.step()
            state["step"], state["tokens"] = step, state["tokens"] + seen
            state["log"].append((step, loss))
            if step % every == 0 or step == plan.steps:
                _save(folder, step, model, optimizer, scheduler, state)
            rate = (state["tokens"] - before) / max(watch.seconds, 1e-9)
            for listener in listeners:
                listener(_report(plan, state, rate))
    return _result(plan, state, state["tokens"] - before, watch.seconds, done)


def check_private(config: TrainingConfig, run: RunConfig) -> None:
    """Raise ConfigError for what a run cannot have under differential privacy, or does not read."""
    usual = {**asdict(TrainingConfig()), **asdict(RunConfig())}
    given = {**asdict(config), **asdict(run)}
    if unread := [name for name in _UNREAD if given[name] != usual[name]]:
        raise ConfigError(
            f"expected no {' or '.join(unread)} with differential privacy, which would not use it: "
            "gradients are scaled down to dp_max_grad_norm, the loss of every step is kept, and "
            "the last step is taken without an evaluation: leave it out"
        )
    if run.gradient_checkpointing or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "expected one process without gradient_checkpointing for differential privacy: "
            "per-record gradients need every activation once"
        )
    if run.tensorboard:
        raise ConfigError(
            "expected no tensorboard with differential privacy, whose steps it is not told of: "
            "leave it, progress is on standard error"
        )
    if run.precision != "float32":
        raise ConfigError(
            f"expected precision float32 with differential privacy, got {run.precision}: norms of "
            "rounded gradients bound less than is accounted for"
        )


def _result(
    plan: DpPlan, state: Mapping[str, Any], tokens: int, seconds: float, done: int
) -> TrainingResult:
    """What became of a run; `tokens` of this call, `done` steps before it."""
    return TrainingResult(
        steps=plan.steps,
        tokens=state["tokens"],
        seconds=seconds,
        tokens_per_second=tokens / max(seconds, 1e-9),
        peak_memory_bytes=peak_memory_bytes(),
        train_loss=tuple((int(step), float(loss)) for step, loss in state["log"]),
        validation_loss=(),
        best_step=None,
        resumed_from=done or None,
    )


def _report(plan: DpPlan, state: Mapping[str, Any], rate: float) -> StepReport:
    return StepReport(
        step=state["step"],
        max_steps=plan.steps,
        tokens=state["tokens"],
        tokens_per_second=rate,
        train_loss=state["log"][-1][1],
        validation_loss=None,
    )


def _private_step(
    model: nn.Module,
    train: TokenDataset,
    config: TrainingConfig,
    plan: DpPlan,
    uniforms: Uniforms,
    step: int,
) -> tuple[float, int]:
    """Set every trained parameter's gradient; (mean loss of the step's records, their tokens)."""
    chosen = (uniforms(len(train)) <= plan.sampling_rate).nonzero().flatten().tolist()
    trained = [p for p in model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in trained]
    size, losses, tokens = config.per_device_train_batch_size, 0.0, 0
    keeps = accepts_logits_to_keep(model)
    for begin in range(0, len(chosen), size):
        records = [train[i] for i in chosen[begin : begin + size]]
        batch = collate(records, padding_id(model))
        inputs = {key: value.to(trained[0].device) for key, value in batch.items()}
        loss_B = record_losses(model, inputs, logits_to_keep=keeps)
        loss_B.sum().backward()
        add_clipped(sums, trained, plan.max_grad_norm, len(records))
        losses += float(loss_B.detach().sum())
        tokens += sum(len(record["input_ids"]) for record in records)
    if not all(bool(total.isfinite().all()) for total in sums):
        raise TrainingError(
            f"step {step}: expected finite gradients, got inf or nan: lower the learning_rate, or "
            "check that the model's weights are finite; completed checkpoints are kept"
        )
    deviation = plan.noise_multiplier * plan.max_grad_norm
    for parameter, total in zip(trained, sums, strict=True):
        noise = gaussian(uniforms, parameter.shape).to(total.device, total.dtype)
        parameter.grad = total.add_(noise, alpha=deviation).div_(plan.expected_batch)
    return losses / max(1, len(chosen)), tokens


def add_clipped(
    sums: list[Tensor], trained: list[nn.Parameter], max_grad_norm: float, records: int
) -> None:
    """Add every record's gradient, scaled down to `max_grad_norm` over all parameters together.

    Takes and clears `grad_sample` [B, ...] of every parameter.

    Raises:
        ConfigError: a parameter has no gradient for each record.
    """
    samples: list[Tensor] = []
    for parameter in trained:
        sample = getattr(parameter, "grad_sample", None)
        parameter.grad_sample = None  # type: ignore[attr-defined]
        parameter.grad = None
        if not isinstance(sample, Tensor) or len(sample) != records:
            raise ConfigError(
                "expected a gradient of every record, this model's layers mix them (OPT folds "
                "records and tokens together): train with LoRA in its attention, or without "
                "differential privacy"
            )
        samples.append(sample)
    squares_B = torch.stack([s.flatten(1).double().square().sum(1) for s in samples]).sum(0)
    factor_B = (max_grad_norm / squares_B.sqrt().clamp_min(1e-30)).clamp(max=1.0)
    for total, sample in zip(sums, samples, strict=True):
        total += torch.tensordot(factor_B.to(sample.dtype), sample, dims=1)


def gaussian(uniforms: Uniforms, shape: torch.Size) -> Tensor:
    """Independent standard normal numbers (Box and Muller 1958), float64."""
    count = -(-shape.numel() // 2)
    length, angle = (-2 * uniforms(count).log()).sqrt(), 2 * math.pi * uniforms(count)
    both = torch.cat([length * angle.cos(), length * angle.sin()])
    return both[: shape.numel()].view(shape)


@contextmanager
def _per_record(model: nn.Module) -> Iterator[None]:
    """Keep gradients record by record while the block runs."""
    from opacus.grad_sample import GradSampleHooks

    inner: Any = model
    while hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    inner.enable_input_require_grads()  # the first layer's hooks need a gradient to pass by
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        yield
    finally:
        hooks.remove_hooks()
        inner.disable_input_require_grads()
        for parameter in model.parameters():
            for name in ("grad_sample", "_forward_counter"):
                if hasattr(parameter, name):
                    delattr(parameter, name)


def _prepare(
    folder: Path,
    identity: Mapping[str, Any],
    run: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> dict[str, Any]:
    """Begin the folder of checkpoints, or go on from the newest."""
    start = checkpoint.last_checkpoint(folder) if run.resume == "auto" else None
    if start is None:
        checkpoint.begin_run(folder, identity)
        return {"step": 0, "tokens": 0, "log": []}
    checkpoint.check_run(folder, identity)
    remove_left_overs(folder)
    checkpoint.load_weights(start / checkpoint.WEIGHTS_NAME, model)
    found = checkpoint.load_trainer(start)
    optimizer.load_state_dict(found["optimizer"])
    scheduler.load_state_dict(found["lr_scheduler"])
    state: dict[str, Any] = json.loads((start / "trainer_state.json").read_text())
    return state


def _save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    state: Mapping[str, Any],
) -> None:
    trainer = {"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}
    checkpoint.save_checkpoint(folder, step, model, trainer, json.dumps(state))
