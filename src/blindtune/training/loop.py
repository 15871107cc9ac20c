"""`fit`: train whatever parameters of a causal language model require a gradient.

The loop is `transformers.Trainer`; what differs from its defaults: the head runs only at labelled
positions, the loss is the mean over all target tokens of the effective batch (see `batches`),
checkpoints hold no frozen weight, and an interrupted run goes on to the same result.
It starts as one process, or as several under `torchrun` or `accelerate launch --multi_gpu` (that
is the flag on CPUs too: `accelerate launch --cpu` starts one process whatever its number says).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blindtune.atomic import remove_left_overs
from blindtune.errors import ConfigError
from blindtune.training import checkpoint
from blindtune.training.config import RunConfig, TrainingConfig, TrainingResult
from blindtune.training.dataset import TokenDataset
from blindtune.training.optimizers import build_optimizer, build_scheduler
from blindtune.training.progress import (
    OnProgress,
    Stopwatch,
    peak_memory_bytes,
    progress_bar,
    reset_peak_memory,
)
from blindtune.training.surroundings import surroundings

__all__ = ["RunConfig", "TrainingConfig", "TrainingResult", "fit"]


def fit(
    model: nn.Module,
    train: TokenDataset,
    validation: TokenDataset | None,
    config: TrainingConfig,
    out_dir: str | Path,
    *,
    run: RunConfig | None = None,
    identity: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> TrainingResult:
    """Train the parameters that require a gradient, in place.

    The model ends in evaluation mode, with the weights of the lowest validation loss (of the last
    step without validation). Files go to `out_dir`/checkpoints; only the first process writes. The
    global random states are seeded.

    Args:
        model: a causal language model with transformers' calling convention.
        train: examples.
        validation: examples for choosing the best step; optional.
        config: what decides the result.
        out_dir: place of the checkpoints; the same call with the same place resumes.
        run: speed and bookkeeping.
        identity: what else decides the result, as JSON values by name; checkpoints that were made
            under other values do not go on.
        on_progress: called after every optimizer step.

    Raises:
        ConfigError: nothing to train; early stopping without validation; checkpoints of another
            run.
        TrainingError: a loss or gradient is not finite.
        OutputError: a checkpoint cannot be written.
    """
    run = run or RunConfig()
    check_stopping(config, validated=validation is not None)
    own, place = identity or {}, Path(out_dir)
    with surroundings(model, run):
        return _run(model, train, validation, config, place, run, own, on_progress)


def check_stopping(config: TrainingConfig, *, validated: bool) -> None:
    """Raise ConfigError for early stopping where nothing is validated on."""
    if config.early_stopping_patience is not None and not validated:
        raise ConfigError(
            "early_stopping_patience needs a validation set, got none: give one, or leave it out"
        )


def _run(
    model: nn.Module,
    train: TokenDataset,
    validation: TokenDataset | None,
    config: TrainingConfig,
    out_dir: Path,
    run: RunConfig,
    identity: Mapping[str, Any],
    on_progress: OnProgress | None,
) -> TrainingResult:
    from transformers.trainer_callback import TrainerState

    from blindtune.training.trainer import Reporter, best_of, history, out_of_patience

    args = _arguments(config, run, out_dir, len(train), validation is not None)
    trainer = _make_trainer(model, train, validation, config, run, args)
    whole = _identity(model, train, validation, config, args)
    if run.precision != "float32":
        whole["precision"] = run.precision
    assert not whole.keys() & identity.keys(), "fit names these itself"
    start = _prepare_folder({**whole, **identity}, run, args)
    state = TrainerState()
    if start is not None:
        state = TrainerState.load_from_json(str(start / "trainer_state.json"))
    before = state.num_input_tokens_seen
    finished = state.global_step >= args.max_steps or out_of_patience(
        history(state.log_history, "eval_loss"), config.early_stopping_patience
    )
    reset_peak_memory()
    watch = Stopwatch()
    if start is not None and finished:
        checkpoint.load_weights(start / checkpoint.WEIGHTS_NAME, model)
    else:
        with progress_bar(args.max_steps, run.silent or args.process_index > 0) as show:
            trainer.add_callback(Reporter([show, on_progress] if on_progress else [show]))
            if run.tensorboard and args.process_index == 0:
                trainer.add_callback(_tensorboard(out_dir))
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        state = trainer.state
    trainer.accelerator.wait_for_everyone()
    best = best_of(history(state.log_history, "eval_loss"))
    if best is not None and config.load_best_model_at_end and best[0] != state.global_step:
        checkpoint.load_weights(checkpoint.best_path(Path(args.output_dir), best[0]), model)
    seconds = watch.seconds
    return TrainingResult(
        steps=state.global_step,
        tokens=state.num_input_tokens_seen,
        seconds=seconds,
        tokens_per_second=(state.num_input_tokens_seen - before) / seconds,
        peak_memory_bytes=peak_memory_bytes(),
        train_loss=tuple(history(state.log_history, "loss")),
        validation_loss=tuple(history(state.log_history, "eval_loss")),
        best_step=best[0] if best else None,
        resumed_from=int(start.name.partition("-")[2]) if start else None,
    )


def _make_trainer(
    model: nn.Module,
    train: TokenDataset,
    validation: TokenDataset | None,
    config: TrainingConfig,
    run: RunConfig,
    args: Any,
) -> Any:
    from blindtune.training.trainer import TokenTrainer

    optimizer = build_optimizer(model, config.learning_rate, config.weight_decay)
    scheduler = build_scheduler(
        optimizer, config.lr_scheduler_type, config.warmup_steps, args.max_steps
    )
    return TokenTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        optimizers=(optimizer, scheduler),
        patience=config.early_stopping_patience,
        keep_best=config.load_best_model_at_end,
        eval_batch_size=run.per_device_eval_batch_size,
        precision=run.precision,
    )


def _arguments(
    config: TrainingConfig, run: RunConfig, out_dir: Path, examples: int, evaluate: bool
) -> Any:
    """The Trainer's own arguments; makes the process group when launched as several processes."""
    from transformers import TrainingArguments

    args = TrainingArguments(
        output_dir=str(out_dir / "checkpoints"),
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        logging_steps=run.logging_steps,
        save_strategy="steps",
        eval_strategy="steps" if evaluate else "no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(),  # said plainly, else no group is made on CPUs
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ConfigError(
            f"expected the {launched} launched processes to train together, {args.world_size} "
            "joined: launch with torchrun, or accelerate launch --multi_gpu (on CPUs too)"
        )
    effective_batch = (
        args.world_size * config.per_device_train_batch_size * config.gradient_accumulation_steps
    )
    epoch_steps = math.ceil(examples * config.num_train_epochs / effective_batch)
    args.max_steps = config.max_steps or epoch_steps
    args.eval_steps = run.eval_steps or max(1, args.max_steps // 10)
    args.save_steps = run.save_steps or args.eval_steps
    _ = args.n_gpu  # sets the devices up, so that the next line stays
    args._n_gpu = min(args.n_gpu, 1)  # one process, one device: several need a launcher
    return args


def _identity(
    model: nn.Module,
    train: TokenDataset,
    validation: TokenDataset | None,
    config: TrainingConfig,
    args: Any,
) -> dict[str, Any]:
    """Everything that decides the result; a checkpoint goes on only under the same."""
    per_process = config.per_device_train_batch_size * config.gradient_accumulation_steps
    settings = asdict(config)
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        del settings[key]  # may change as long as the effective batch stays
    return {
        **settings,
        "effective_batch": per_process * args.world_size,
        "train": train.fingerprint(),
        "validation": validation.fingerprint() if validation else None,
        "eval_steps": args.eval_steps if validation else None,  # the steps that can be the best
        "model": checkpoint.model_key(model),
    }


def _prepare_folder(identity: Mapping[str, Any], run: RunConfig, args: Any) -> Path | None:
    """Check or begin the folder of checkpoints; returns the checkpoint to go on from."""
    folder = Path(args.output_dir)
    start = checkpoint.last_checkpoint(folder) if run.resume == "auto" else None
    if start is not None:
        checkpoint.check_run(folder, identity)
    if args.process_index == 0:  # the others would be in its way
        if start is None:
            checkpoint.begin_run(folder, identity)
        else:
            remove_left_overs(folder)
    if args.world_size > 1:
        torch.distributed.barrier()
    return start


def _tensorboard(out_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard=True needs the package tensorboard, it is not installed: "
            "pip install 'blindtune[tensorboard]'"
        ) from error
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(out_dir / "tensorboard")))
