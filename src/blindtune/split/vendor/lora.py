"""One job's share of the vendor's model: LoRA, head, optimizer. The base is frozen and shared.

Every job has a named PEFT adapter in the one base model; before any work the job's own is made
the active one. Nothing here is safe for two threads: the vendor gives turns.

Shapes: B batch, L length, T real tokens, D hidden, F features, C outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blindtune.errors import ConfigError, MismatchError, VerificationError
from blindtune.exchange.wire.messages import pack, unpack
from blindtune.models.decoder import Decoder
from blindtune.split.partition import (
    Cut,
    PooledHead,
    Stack,
    Task,
    default_pooling,
    feature_size,
    run_vendor,
    task_loss,
)
from blindtune.split.terms import TuningConfig
from blindtune.split.vendor.open_forwards import Graph, Graphs, OpenForward
from blindtune.training.optimizers import build_optimizer, build_scheduler


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model that a vendor tunes, before any job touched it."""

    stack: Stack
    cut: Cut
    attention: tuple[str, ...]
    """Linear maps of the vendor's layers, by their path in the model."""
    feed_forward: tuple[str, ...]
    transposed: bool
    """Whether the linear maps are stored as [in, out] (GPT-2)."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.stack.model.parameters()).device
        return device


def freeze(stack: Stack, cut: Cut) -> Served:
    """Freeze a model, and note where LoRA may go.

    Raises:
        ConfigError: the model has adapters already, of another vendor or a PEFT model's.
    """
    if any("lora_" in name for name, _ in stack.model.named_modules()):
        raise ConfigError("expected a model without adapters, it has some: load it again")
    stack.model.requires_grad_(False).eval()
    attention, feed_forward = [], []
    for i in cut.vendor_layers:
        if isinstance(stack, Decoder):
            inside = [p.path for p in stack.projections(i)]
            other = [p.path for p in stack.feed_forward(i)]
        else:
            inside, other = list(stack.family.attention), list(stack.family.feed_forward)
        attention += [f"{stack.family.layers}.{i}.{path}" for path in inside]
        feed_forward += [f"{stack.family.layers}.{i}.{path}" for path in other]
    return Served(
        stack=stack,
        cut=cut,
        attention=tuple(attention),
        feed_forward=tuple(feed_forward),
        transposed=isinstance(stack.model.get_submodule(attention[0]), Conv1D),
    )


@final
class JobLora:
    """LoRA, head and optimizer of one job.

    Args:
        served: the shared model.
        name: of the adapter; letters, digits and `_`.
        config: how it is tuned.
        graphs: where what backward passes need is kept, of all jobs.
        task, outputs: of the head; None in the U-shape, which has none here.
    """

    def __init__(
        self,
        served: Served,
        name: str,
        config: TuningConfig,
        graphs: Graphs,
        *,
        task: Task | None,
        outputs: int = 0,
    ) -> None:
        self._graphs = graphs
        self._served, self._name, self._config, self._task = served, name, config, task
        stack = served.stack
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self._inject()
            self._head = None
            if task is not None:
                pooling = config.pooling or default_pooling(stack)
                self._head = PooledHead(feature_size(stack), outputs, pooling).to(served.device)
        self._dropouts = [
            module.lora_dropout[name]
            for module in stack.model.modules()
            if hasattr(module, "lora_dropout") and name in module.lora_dropout
        ]
        for module in self._dropouts:
            module.eval()  # new modules are in training mode
        head = [] if self._head is None else list(self._head.named_parameters(prefix="head"))
        own = [(n, p) for n, p in stack.model.named_parameters() if f".{name}." in n]
        self._parameters = dict(own + head)
        self._optimizer = build_optimizer(
            nn.ParameterList(self._parameters.values()), config.learning_rate, config.weight_decay
        )
        self._scheduler = build_scheduler(
            self._optimizer, config.schedule, config.warmup_steps, config.max_steps
        )
        self._gathered: list[Tensor] | None = None
        self._open: dict[int, OpenForward] = {}

    def _inject(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        served, config = self._served, self._config
        more = served.feed_forward if config.lora_targets == "all" else ()
        targets = [*served.attention, *more]
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            fan_in_fan_out=served.transposed,
        )
        inject_adapter_in_model(lora, served.stack.model, adapter_name=self._name)
        # PEFT's note of what it did; it warns of a second adapter, and keeps what is deleted.
        del served.stack.model.peft_config

    @property
    def settled(self) -> bool:
        """Whether no gradient and no forward waits: what a checkpoint may be made of."""
        return self._gathered is None and not self._open

    def batch(
        self,
        hidden_TD: Tensor,
        lengths: tuple[int, ...],
        labels: Tensor,
        *,
        weight: float,
        input_gradient: bool,
        draw: int,
    ) -> tuple[float, dict[str, float], Tensor | None]:
        """Two-part: add the gradient of weight x mean loss to the next step's.

        Args:
            draw: number of the request, which dropout is drawn from.

        Returns:
            The loss, metrics, and the gradient of `hidden_TD` if asked for.

        Raises:
            VerificationError: the loss or a gradient is not finite; nothing was added.
        """
        assert self._head is not None
        assert self._task is not None
        with self._active(draw):
            rows_TD = hidden_TD.detach().to(self._served.device).requires_grad_(input_gradient)
            hidden_BLD, mask_BL = unpack(rows_TD, lengths)
            features_BLF = run_vendor(self._served.stack, self._served.cut, hidden_BLD, mask_BL)
            outputs_BC = self._head(features_BLF, mask_BL)
            labels = labels.to(outputs_BC.device)
            loss = task_loss(outputs_BC, labels, self._task)
            wanted = [*self._parameters.values(), *([rows_TD] if input_gradient else [])]
            found = torch.autograd.grad(loss * weight, wanted)
        _check_finite([loss, *found])
        self._gather(found[: len(self._parameters)])
        metrics = {}
        if self._task == "classification":
            metrics["accuracy"] = float((outputs_BC.argmax(1) == labels).float().mean())
        return float(loss.detach()), metrics, found[-1] if input_gradient else None

    def forward(self, number: int, hidden_TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """U-shape: the trunk's outputs [T, D]; the forward is open under its number."""
        opened = OpenForward(hidden_TD, lengths)
        graph = self._through(number, opened)
        out_TD = graph[1]
        _check_finite([out_TD])
        self._open[number] = opened
        self._graphs.keep(opened, graph)
        return out_TD.detach()

    def _through(self, number: int, opened: OpenForward) -> Graph:
        """The trunk's pass of forward `number`, the first or again: the same either way."""
        with self._active(number):
            rows_TD = opened.hidden_TD.detach().to(self._served.device).requires_grad_()
            hidden_BLD, mask_BL = unpack(rows_TD, opened.lengths)
            out_BLD = run_vendor(self._served.stack, self._served.cut, hidden_BLD, mask_BL)
            return rows_TD, pack(out_BLD, mask_BL)[0]

    def backward(self, number: int, gradient_TD: Tensor) -> Tensor:
        """U-shape: add the gradients that belong to forward `number`; the inputs' gradient.

        Raises:
            MismatchError: there is no such open forward, or its outputs have another shape.
            VerificationError: a gradient is not finite; nothing was added.
        """
        if number not in self._open:
            raise MismatchError(f"no forward {number} is open: send one, and use it once")
        opened = self._open[number]
        if gradient_TD.shape != opened.hidden_TD.shape:
            raise MismatchError(
                f"expected a gradient {list(opened.hidden_TD.shape)}, got {list(gradient_TD.shape)}"
            )
        rows_TD, out_TD = self._graphs.take(opened) or self._through(number, opened)
        with self._active(number):
            found = torch.autograd.grad(
                out_TD, [*self._parameters.values(), rows_TD], gradient_TD.to(out_TD.device)
            )
        _check_finite(found)
        del self._open[number]
        self._gather(found[:-1])
        return found[-1]

    @property
    def open_forwards(self) -> int:
        """Forwards whose gradient has not come."""
        return len(self._open)

    @property
    def open_tokens(self) -> int:
        """Their tokens."""
        return sum(len(opened.hidden_TD) for opened in self._open.values())

    def release(self) -> None:
        """Let go of what can be computed again; from any thread, at any time."""
        for opened in list(self._open.values()):
            self._graphs.take(opened)

    def step(self) -> float:
        """The optimizer's step with what was gathered; the norm of the gradient before clipping.

        Raises:
            MismatchError: nothing was gathered, or a forward still waits for its gradient.
        """
        if self._gathered is None or self._open:
            raise MismatchError(
                "expected gradients and no open forward before a step: send the backward first"
            )
        norm = nn.utils.get_total_norm(self._gathered)
        _check_finite([norm])
        for parameter, gradient in zip(self._parameters.values(), self._gathered, strict=True):
            parameter.grad = gradient
        if self._config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(
                self._parameters.values(), self._config.max_grad_norm, norm
            )
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        self._gathered = None
        return float(norm)

    @torch.no_grad()
    def predict(self, hidden_TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Outputs [B, C] of the head; in the U-shape what leaves the trunk, [T, D]."""
        with self._active(None):
            hidden_BLD, mask_BL = unpack(hidden_TD.to(self._served.device), lengths)
            out_BLF = run_vendor(self._served.stack, self._served.cut, hidden_BLD, mask_BL)
            out: Tensor = (
                pack(out_BLF, mask_BL)[0] if self._head is None else self._head(out_BLF, mask_BL)
            )
        _check_finite([out])
        return out

    def state(self) -> dict[str, Any]:
        """Everything that training changes: copies of weights, of the rest what is there now."""
        assert self.settled, "a checkpoint is made after a step"
        return {
            "parameters": {n: p.detach().cpu().clone() for n, p in self._parameters.items()},
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go back to what `state` gave; open gradients and forwards are dropped."""
        assert state["parameters"].keys() == self._parameters.keys()
        for name, parameter in self._parameters.items():
            parameter.copy_(state["parameters"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self.release()
        self._gathered, self._open = None, {}

    def remove(self) -> None:
        """Take the adapter out of the shared model."""
        from peft.functional import delete_adapter, set_adapter

        set_adapter(self._served.stack.model, [])  # else PEFT makes another job's active, and warns
        delete_adapter(self._served.stack.model, self._name, "lora_")
        self.release()
        self._open = {}

    @contextmanager
    def _active(self, draw: int | None) -> Iterator[None]:
        """This job's adapter in the model, its dropout drawn from its seed and the request."""
        from peft.functional import set_adapter

        set_adapter(self._served.stack.model, self._name)
        if draw is None or not self._config.lora_dropout:
            yield
            return
        source = hashlib.sha256(f"{self._config.seed} {draw}".encode()).digest()
        try:
            for module in self._dropouts:
                module.train()
            with torch.random.fork_rng():
                torch.manual_seed(int.from_bytes(source[:7], "little"))
                yield
        finally:
            for module in self._dropouts:
                module.eval()

    def _gather(self, found: Sequence[Tensor]) -> None:
        if self._gathered is None:
            self._gathered = [gradient.clone() for gradient in found]
        else:
            torch._foreach_add_(self._gathered, list(found))


def _check_finite(tensors: Sequence[Tensor]) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise VerificationError(
            "the loss, an output or a gradient is NaN or infinite, nothing was applied: "
            "check the data, lower the learning rate"
        )
