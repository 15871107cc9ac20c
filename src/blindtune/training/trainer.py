"""`transformers.Trainer` with this project's batches, loss, validation and checkpoints.

Importing this module imports the Trainer (seconds): `loop.fit` does it when it is called.
Not supported: sharded training (FSDP, DeepSpeed); plain data parallelism is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, final

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl

from blindtune.errors import ConfigError, TrainingError
from blindtune.training import checkpoint
from blindtune.training.batches import BatchOrder, collate, padding_id
from blindtune.training.dataset import TokenDataset
from blindtune.training.loss import accepts_logits_to_keep, count_targets, next_token_loss
from blindtune.training.progress import OnProgress, StepReport, Stopwatch
from blindtune.training.surroundings import products_in

History = list[tuple[int, float]]
"""(optimizer step, loss) in nats a token."""


def history(log: list[dict[str, Any]], key: str) -> History:
    """The values that the Trainer logged under one key."""
    return [(int(entry["step"]), float(entry[key])) for entry in log if key in entry]


def best_of(validation: History) -> tuple[int, float] | None:
    """The first evaluation with the lowest loss."""
    return min(validation, key=lambda point: point[1], default=None)


def out_of_patience(validation: History, patience: int | None) -> bool:
    """Whether the last `patience` evaluations were all no better than the best before them."""
    best = best_of(validation)
    if best is None or patience is None:
        return False
    return len(validation) - 1 - validation.index(best) >= patience


@final
class TokenTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """The loop; see the module. `evaluate` also keeps the best weights and stops early."""

    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: TokenDataset,
        eval_dataset: TokenDataset | None,
        optimizers: tuple[Any, Any],
        patience: int | None,
        keep_best: bool,
        eval_batch_size: int,
        precision: str,
    ) -> None:
        """Make the Trainer; all that is configured comes in `args`, as numbers or as objects."""
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ConfigError(
                "expected plain data parallelism, got sharded training: launch with --multi_gpu "
                "or --cpu"
            )
        self.model_accepts_loss_kwargs = True  # transformers before `loss_is_scaled_for_ga`
        self._folder = Path(args.output_dir)
        self._patience = patience
        self._keep_best = keep_best
        self._eval_batch_size = eval_batch_size
        self._precision = precision
        self._random: list[dict[str, Tensor]] = []
        self._logits_to_keep = accepts_logits_to_keep(model)
        self._pad_token_id = padding_id(model)

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """This process's share of every step's examples."""
        order = BatchOrder(
            examples=len(self.train_dataset),
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            steps=self.args.max_steps,
            seed=self.args.seed,
            processes=self.args.world_size,
            rank=self.args.process_index,
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=order,
            collate_fn=partial(collate, pad_token_id=self._pad_token_id),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """One step's micro-batches, and the targets in the whole effective batch."""
        batches = list(islice(epoch_iterator, num_batches))
        targets = sum(count_targets(batch["labels"]) for batch in batches)
        tokens = sum(int(_mask(batch).sum()) for batch in batches)
        counts = torch.tensor([targets, tokens], device=device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        self.state.num_input_tokens_seen += int(counts[1])
        return batches, counts[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """This micro-batch's part of the effective batch's mean loss.

        Gradients are averaged over processes, so each process's part counts that many times.
        """
        assert num_items_in_batch is not None, "get_batch_samples counts the targets"
        total = self._loss(model, inputs)
        loss: Tensor = total * (self.accelerator.num_processes / num_items_in_batch)
        self._require_finite("training loss", float(loss.detach()))
        return loss

    def _loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with products_in(self._precision, self.args.device):
            return next_token_loss(model, batch, logits_to_keep=self._logits_to_keep)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """A loss can be finite while a gradient is not: stop before it reaches the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._require_finite("gradient norm", float(norm))
        return norm

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss over all targets of the validation set, in nats a token."""
        metrics = {"eval_loss": self._validation_loss()}
        self._require_finite("validation loss", metrics["eval_loss"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        validation = history(self.state.log_history, "eval_loss")
        best = best_of(validation)
        if self._keep_best and best == validation[-1] and self.is_world_process_zero():
            path = checkpoint.best_path(self._folder, self.state.global_step)
            checkpoint.save_weights(path, self.model)
        if out_of_patience(validation, self._patience):
            self.control.should_training_stop = True
            self.control.should_save = True
        return metrics

    @torch.no_grad()
    def _validation_loss(self) -> float:
        rank, processes = self.args.process_index, self.args.world_size
        mine = range(rank, len(self.eval_dataset), processes)
        sums = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        for first in range(0, len(mine), self._eval_batch_size):
            rows = [self.eval_dataset[i] for i in mine[first : first + self._eval_batch_size]]
            batch = self._prepare_inputs(collate(rows, self._pad_token_id))
            loss = self._loss(self.model, batch)
            sums += torch.tensor([float(loss), count_targets(batch["labels"])])
        if processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum")
        return float(sums[0] / sums[1])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        states = gather_object([_random_states()])
        if not self.is_world_process_zero():
            return
        trainer = {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "random": states,
        }
        checkpoint.save_checkpoint(
            self._folder, self.state.global_step, self.model, trainer, _to_json(self.state)
        )
        best = best_of(history(self.state.log_history, "eval_loss"))
        checkpoint.keep_best(self._folder, best[0] if best else None)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        path = Path(resume_from_checkpoint)
        checkpoint.load_weights(path / checkpoint.WEIGHTS_NAME, model or self.model)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            found = checkpoint.load_trainer(Path(checkpoint_folder))
            self.optimizer.load_state_dict(found["optimizer"])
            self.lr_scheduler.load_state_dict(found["lr_scheduler"])
            self._random = found["random"]

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        """Transformers calls this after the optimizer's: the large file is read once for both."""
        if checkpoint_folder is not None:
            state = self._random[self.args.process_index % len(self._random)]
            torch.set_rng_state(state["cpu"])
            if "cuda" in state and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda"])

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"step {self.state.global_step + 1}: expected a finite {what}, got {value}: try a "
                f"learning_rate below {self.args.learning_rate:g}, more warmup_steps, or check "
                "that the model's weights are finite; completed checkpoints are kept"
            )


@final
class Reporter(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Passes every step on as a `StepReport`."""

    def __init__(self, listeners: list[OnProgress]) -> None:
        """Call these after every step."""
        self._listeners = listeners
        self._watch = Stopwatch()
        self._tokens_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._watch = Stopwatch()
        self._tokens_before = state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report; losses are the newest logged ones."""
        tokens = state.num_input_tokens_seen - self._tokens_before
        report = StepReport(
            step=state.global_step,
            max_steps=state.max_steps,
            tokens=state.num_input_tokens_seen,
            tokens_per_second=tokens / max(self._watch.seconds, 1e-9),
            train_loss=_newest(state.log_history, "loss"),
            validation_loss=_newest(state.log_history, "eval_loss"),
        )
        for listener in self._listeners:
            listener(report)


def _newest(log: list[dict[str, Any]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(log) if key in entry), None)


def _mask(batch: Mapping[str, Tensor]) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"]))


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _to_json(state: Any) -> str:
    return json.dumps(asdict(state), indent=1, sort_keys=True)
