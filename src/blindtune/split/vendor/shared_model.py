"""The vendor's one frozen model, which works for every job, one request at a time.

A request is checked before anything is computed, and refused without effect when something is wrong
with it. Every customer who waits gets the same share of the model's time (split.vendor.turns).
Whoever asks for work holds the job's lock.

Shapes: B sequences, T real tokens, D hidden, C outputs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import final

from blindtune.errors import MismatchError
from blindtune.exchange.wire.events import Observer, Worked, kind_of
from blindtune.exchange.wire.messages import (
    Batch,
    Forward,
    Message,
    Numbered,
    Outputs,
    Predict,
    Predictions,
    Step,
)
from blindtune.models.decoder import UNLIMITED_CONTEXT, context_limit
from blindtune.split.partition import Cut, Stack
from blindtune.split.terms import VendorLimits, tuning_of
from blindtune.split.vendor.admission import check_labels, check_rows, check_waiting
from blindtune.split.vendor.job import Job
from blindtune.split.vendor.lora import JobLora, Served, freeze
from blindtune.split.vendor.open_forwards import Graphs
from blindtune.split.vendor.store import JobRecord
from blindtune.split.vendor.turns import Turns


@final
class SharedModel:
    """A model, and the adapters of the jobs that are in memory.

    Args:
        stack: the whole model; it is frozen, and belongs to this object from now on.
        cut: who holds what.
        limits: what a job may use.
        tell: is told of the model's work.

    Attributes:
        served: the model before any job touched it.
    """

    def __init__(self, stack: Stack, cut: Cut, limits: VendorLimits, tell: Observer) -> None:
        self.served: Served = freeze(stack, cut)
        self._limits, self._tell = limits, tell
        self._turns = Turns()
        self._graphs = Graphs(limits.max_message_tokens)
        self._loras: dict[str, tuple[str, JobLora]] = {}  # with their owners, by the job's name
        # One thread works with the model, whoever's turn it is: memory allocators keep for every
        # thread what its largest batch took, and OpenMP keeps workers for every thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blindtune-model")
        most, asked = context_limit(stack.config), limits.max_sequence_tokens
        known = [limit for limit in (most, asked) if limit is not None]
        self._longest = min(known, default=UNLIMITED_CONTEXT)

    def turn(self, customer: str) -> AbstractContextManager[float]:
        """A turn at the model, as `attach` and `detach` need it."""
        return self._turns.take(customer)

    def attach(self, record: JobRecord) -> JobLora:
        """Put a job's adapter into the model, as it is before its first step; in a turn."""
        task = None if record.task == "hidden" else record.task
        lora = JobLora(
            self.served, record.name, tuning_of(record.options), self._graphs,
            task=task, outputs=record.outputs,
        )  # fmt: skip
        self._loras[record.name] = (record.owner, lora)
        return lora

    def detach(self, record: JobRecord) -> None:
        """Take it out again; in a turn."""
        _, lora = self._loras.pop(record.name)
        lora.remove()

    def apply(self, job: Job, message: Message) -> Message:
        """Apply a numbered request wholly, or raise and leave the job as it was."""
        assert isinstance(message, Numbered)
        tokens = len(message.hidden_TD) if isinstance(message, Batch | Forward) else 0
        self._check(job, message)
        with self._work(job, message, tokens):
            if isinstance(message, Forward):  # in the turn: nobody else opens one meanwhile
                self._check_waiting(job, tokens)
            reply = self._thread.submit(job.work, message).result()
        job.count(message, reply)
        return reply

    def predict(self, job: Job, message: Predict) -> Message:
        """Use the tuned model; changes nothing but the count of tokens."""
        assert job.lora is not None
        self._check_rows(message)
        job.check_left(message, self._limits)
        with self._work(job, message, len(message.hidden_TD)):
            predicted = self._thread.submit(job.lora.predict, message.hidden_TD, message.lengths)
            out = predicted.result()
        reply: Message
        if job.record.task == "hidden":
            reply = Outputs(sequence=None, precision=job.record.precision, hidden_TD=out)
        else:
            reply = Predictions(logits_BC=out)
        job.count(message, reply)
        return reply

    @contextmanager
    def _work(self, job: Job, message: Message, tokens: int) -> Iterator[None]:
        """A turn for a request: what it takes is the job's, and is told if nothing is raised."""
        with self._turns.take(job.record.owner) as waited:
            begin = time.monotonic()
            try:
                yield
            finally:
                seconds = time.monotonic() - begin
                job.seconds += seconds
        self._tell(Worked(
            customer=job.record.owner, job=job.record.name, kind=kind_of(message), tokens=tokens,
            wait_seconds=waited, seconds=seconds,
        ))  # fmt: skip

    def _check(self, job: Job, message: Numbered) -> None:
        headless = job.record.task == "hidden"
        if isinstance(message, Batch) == headless and not isinstance(message, Step):
            raise MismatchError(f"{type(message).__name__} does not belong to this job's partition")
        job.check_left(message, self._limits)
        if isinstance(message, Batch | Forward):
            self._check_rows(message)
        if isinstance(message, Batch):
            check_labels(message.labels, job.record.task, job.record.outputs)

    def _check_rows(self, message: Batch | Forward | Predict) -> None:
        check_rows(
            message.hidden_TD, message.lengths, width=self.served.stack.hidden_size,
            longest=self._longest, limits=self._limits,
        )  # fmt: skip

    def _check_waiting(self, job: Job, tokens: int) -> None:
        assert job.lora is not None
        own = [lora for owner, lora in self._loras.values() if owner == job.record.owner]
        check_waiting(
            tokens, forwards=job.lora.open_forwards, of_job=job.lora.open_tokens,
            of_customer=sum(lora.open_tokens for lora in own), limits=self._limits,
        )  # fmt: skip
