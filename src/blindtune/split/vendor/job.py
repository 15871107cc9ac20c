"""A job in the vendor's memory: what it was opened with, how far it is, and how a request moves it.

Nothing here is safe for two threads: whoever works on a job holds its lock, and a turn at the model
(`split.vendor.turns`) where the model is used.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from blindtune.exchange.wire.codec import stored_bytes
from blindtune.exchange.wire.delivery import Deliveries
from blindtune.exchange.wire.messages import (
    Backward,
    Batch,
    BatchResult,
    Forward,
    Gradients,
    JobState,
    Message,
    Numbered,
    Outputs,
    Predict,
    Step,
    Stepped,
)
from blindtune.split.terms import VendorLimits
from blindtune.split.vendor.admission import RefusedError
from blindtune.split.vendor.lora import JobLora
from blindtune.split.vendor.store import JobRecord, Usage


@dataclass(eq=False)
class Job:
    """A job in memory. `lora` is None until a stream asks for the job."""

    record: JobRecord
    lora: JobLora | None = None
    deliveries: Deliveries = field(default_factory=Deliveries)
    durable: int = 0
    steps: int = 0
    tokens: int = 0
    bytes: int = 0
    """Of tensors, sent and received, as they are on the wire; and of what checkpoints held."""
    seconds: float = 0.0
    asked: float = field(default_factory=time.monotonic)
    """When somebody last asked for it in this process, or when it was read."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held before the numbers' own lock and the turn at the model, never after them."""

    def state(self) -> JobState:
        """What the customer is told."""
        return JobState(
            job=self.record.name,
            state=self.record.state,
            applied=self.deliveries.applied,
            durable=self.durable,
            steps=self.steps,
            tokens=self.tokens,
        )

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint holds; `lora` is there and settled."""
        assert self.lora is not None
        replies = [
            torch.frombuffer(bytearray(frame), dtype=torch.uint8)
            for frame in self.deliveries.remembered()
        ]
        return {
            "lora": self.lora.state(),
            "replies": replies,
            "steps": self.steps,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "seconds": self.seconds,
        }

    def used(self) -> Usage:
        """What limits count: what led to where the job is, and what the customer went back from."""
        undone = self.record.undone
        return Usage(
            steps=self.steps + undone.steps,
            tokens=self.tokens + undone.tokens,
            bytes=self.bytes + undone.bytes,
            seconds=self.seconds + undone.seconds,
        )

    def undone_by(self, state: dict[str, Any]) -> Usage:
        """What was used and is not in the counts of `state`, to which the job is to go back."""
        used = self.used()
        return Usage(
            steps=used.steps - state["steps"],
            tokens=used.tokens - state["tokens"],
            bytes=used.bytes - state.get("bytes", 0),
            seconds=used.seconds - state["seconds"],
        )

    def go_back(self, number: int, state: dict[str, Any], lora: JobLora) -> None:
        """Become what `snapshot` gave after request `number`; `lora` holds its weights already."""
        replies = [bytes(frame.numpy()) for frame in state["replies"]]
        self.deliveries.forget()  # streams that are left behind hold on to them
        self.lora, self.deliveries = lora, Deliveries(applied=number, replies=replies)
        self.steps, self.tokens = state["steps"], state["tokens"]
        self.bytes = state.get("bytes", 0)  # checkpoints of earlier versions lack it
        self.seconds = state["seconds"]
        self.durable = number

    def check_left(self, message: Message, limits: VendorLimits) -> None:
        """Whether the job may still use what a request needs.

        Raises:
            RefusedError: it may not.
        """
        rows = message.hidden_TD if isinstance(message, Batch | Forward | Predict) else ()
        used = self.used()
        for count, most, unit in (
            (used.seconds, limits.max_seconds, "seconds"),
            (used.steps if isinstance(message, Step) else 0, limits.max_steps, "steps"),
            (used.tokens + len(rows) - 1, limits.max_job_tokens, "tokens"),
            (used.bytes + stored_bytes(message) - 1, limits.max_job_bytes, "bytes"),
        ):
            if count >= most:
                raise RefusedError("limit", f"the job used its {most:.12g} {unit}: ask the vendor")

    def count(self, message: Message, reply: Message) -> None:
        """Count what a request used that was applied; the model's time is counted by its turn."""
        if isinstance(message, Batch | Forward | Predict):
            self.tokens += len(message.hidden_TD)
        self.steps += isinstance(message, Step)
        self.bytes += stored_bytes(message) + stored_bytes(reply)

    def work(self, message: Numbered) -> Message:
        """The model's part of a request, wholly or not at all; the counts are the caller's.

        The reply is on the CPU: it is remembered, and must not keep the model's memory.
        """
        lora, precision, number = self.lora, self.record.precision, message.sequence
        assert lora is not None
        if isinstance(message, Batch):
            loss, metrics, gradient_TD = lora.batch(
                message.hidden_TD,
                message.lengths,
                message.labels,
                weight=message.weight,
                input_gradient=message.input_gradient,
                draw=number,
            )
            return BatchResult(
                sequence=number, precision=precision, loss=loss, metrics=metrics,
                gradient_TD=None if gradient_TD is None else gradient_TD.cpu(),
            )  # fmt: skip
        if isinstance(message, Forward):
            out_TD = lora.forward(number, message.hidden_TD, message.lengths)
            return Outputs(sequence=number, precision=precision, hidden_TD=out_TD.cpu())
        if isinstance(message, Backward):
            found_TD = lora.backward(message.forward, message.gradient_TD)
            wanted = found_TD.cpu() if message.input_gradient else None
            return Gradients(sequence=number, precision=precision, gradient_TD=wanted)
        return Stepped(sequence=number, steps=self.steps + 1, gradient_norm=lora.step())


def tensor_bytes(state: object) -> int:
    """Bytes of all tensors in dicts and sequences, whatever their depth."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(tensor_bytes, state.values()))
    return sum(map(tensor_bytes, state)) if isinstance(state, list | tuple) else 0
