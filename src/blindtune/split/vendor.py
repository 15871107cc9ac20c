"""The vendor: one frozen model, many customers' jobs, a handler message -> message a stream.

It runs behind any transport; `exchange.serving.Server` takes `Vendor.session` as it is. Requests
of a job are applied once and in order (exchange.delivery), checked before anything is computed,
and refused without effect when something is wrong with them. The model works for one request at a
time, and every customer who waits gets the same share of its time (split.turns).

What the vendor sees: hidden states, lengths, times, and in the two-part split labels. No token
ids. It knows nothing of privatizers (tests/test_architecture.py).

Shapes: B sequences, T real tokens, D hidden.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, final

import msgspec

from blindtune.errors import ConfigError, MismatchError, VerificationError
from blindtune.exchange.codec import MessageLimits
from blindtune.exchange.delivery import Deliveries
from blindtune.exchange.events import (
    JobCancelled,
    JobExpired,
    JobOpened,
    JobSaved,
    Observer,
    Worked,
    ignore,
    kind_of,
)
from blindtune.exchange.messages import (
    PROTOCOL_VERSION,
    WINDOW,
    Batch,
    Cancel,
    Checkpoint,
    Checkpointed,
    Forward,
    Hello,
    JobState,
    Message,
    Numbered,
    OpenJob,
    Outputs,
    Predict,
    Predictions,
    Refusal,
    ResumeJob,
    Status,
    Step,
    Welcome,
    named,
)
from blindtune.exchange.transport import Handler
from blindtune.split.admission import RefusedError, check_labels, check_opening, check_rows
from blindtune.split.job import Job
from blindtune.split.lora import JobLora, Served, serve
from blindtune.split.open_forwards import Graphs
from blindtune.split.partition import Cut, Stack, longest_sequence
from blindtune.split.store import JobRecord, JobStore
from blindtune.split.terms import VendorLimits, tuning_of
from blindtune.split.turns import Turns
from blindtune.version import PROGRAM

ENDED = {
    "cancelled": "this job was cancelled",
    "closed": "this job has expired: nobody had asked for it in long, and it was removed",
}
EXPIRY_GRACE_SECONDS = 3600.0
ENDED_KEPT = 32
"""Ended jobs of a customer that are remembered, to tell it that they have ended."""


@final
class Vendor:
    """Holds the whole model, runs and tunes the layers that are the vendor's.

    Args:
        stack: the whole model; it is frozen, and belongs to this object from now on.
        cut: who holds what.
        bottom: id of the bottom package that customers were given (`write_bottom`).
        directory: where jobs and their checkpoints are kept.
        limits: what a job may use.
        payload: largest message.
        observer: is told of jobs and of the model's work.

    Raises:
        ConfigError: the cut is one of another model.
        OutputError: the directory holds jobs of another model or cut.
    """

    def __init__(
        self,
        stack: Stack,
        cut: Cut,
        bottom: str,
        directory: str | Path,
        *,
        limits: VendorLimits | None = None,
        payload: MessageLimits | None = None,
        observer: Observer = ignore,
    ) -> None:
        if stack.layer_count != cut.layers:
            raise ConfigError(
                f"expected a cut of a model of {stack.layer_count} layers, got one of {cut.layers}"
            )
        self.limits = limits or VendorLimits()
        self._served: Served = serve(stack, cut)
        self._bottom = bottom
        self._payload = payload or MessageLimits()
        self._store = JobStore(directory, bottom)
        self._jobs = {r.name: Job(record=r) for r in self._store.records()}
        self._overdue: dict[str, float] = {}  # since when (monotonic) a job has looked overdue
        self._opening = threading.Lock()
        self._turns = Turns()
        self._graphs = Graphs(self.limits.max_message_tokens)
        self._tell = observer
        # One thread works with the model, whoever's turn it is: memory allocators keep for every
        # thread what its largest batch took, and OpenMP keeps workers for every thread.
        self._model = ThreadPoolExecutor(1, thread_name_prefix="blindtune-model")
        most = longest_sequence(stack) or 2**20
        self._longest = min(most, self.limits.max_sequence_tokens or most)
        self.expire()

    @contextmanager
    def session(self, customer: str) -> Iterator[Handler]:
        """A handler for one stream of an authenticated customer."""
        session = _Session(self, customer)
        try:
            yield session.handle
        finally:
            session.end()

    def open_jobs(self) -> int:
        """How many jobs are open, of all customers; those that rest on the disk too."""
        return sum(job.record.state == "open" for job in list(self._jobs.values()))

    def welcome(self) -> Welcome:
        """The terms that every customer is told."""
        stack, cut = self._served.stack, self._served.cut
        return Welcome(
            version=PROTOCOL_VERSION,
            program=PROGRAM,
            model_type=stack.config.model_type,
            partitions=(cut.partition,),
            cut=cut.cut,
            hidden_size=stack.hidden_size,
            bottom=self._bottom,
            max_tokens=self.limits.max_message_tokens,
            max_payload_bytes=self._payload.max_payload_bytes,
        )

    def open(self, customer: str, opening: OpenJob) -> Job:
        """Open a job, or find it again; durable before it is returned."""
        check_opening(opening, self._served.cut, self._bottom, self.limits)
        name, digest = _name_of(opening.token)
        self.expire()
        with self._opening:
            job = self._jobs.get(name)
            if job is None:
                record = JobRecord(
                    name=name,
                    owner=customer,
                    token_sha256=digest,
                    task=opening.task,
                    outputs=opening.outputs,
                    precision=opening.precision,
                    options=opening.options,
                )
                self._check_room(customer)
                job = Job(record=record)
                with self._turns.take(customer):
                    job.lora = self._attach(record)
                    try:
                        self._store.states(name).save(0, job.snapshot())
                        self._store.write(record)
                    except BaseException:
                        job.lora.remove()
                        raise
                self._jobs[name] = job
                self._tell(JobOpened(customer=customer, job=name))
        job = self.find(customer, opening.token)
        if not job.record.agrees(opening):
            raise MismatchError("this job was opened with other terms: use them, or another token")
        return job

    def find(self, customer: str, token: str) -> Job:
        """A customer's job by its token; PolicyError to everybody else."""
        name, digest = _name_of(token)
        job = self._jobs.get(name)
        if (
            job is None
            or job.record.owner != customer
            or not hmac.compare_digest(job.record.token_sha256, digest)
        ):
            raise RefusedError("unknown-job", "there is no such job: open it")
        with job.lock:
            if job.record.state == "open":
                self._store.touch(name)
            if job.lora is None and job.record.state == "open":
                self._go_back(job, self._store.states(name).numbers()[-1])
        return job

    def expire(self) -> None:
        """End the open jobs that nobody has asked for in `max_idle_days`; forget those long ended.

        Only those that looked so `EXPIRY_GRACE_SECONDS` ago already: a clock that jumps ahead and
        is set right again takes no job away.
        """
        now, limit = time.monotonic(), 86400 * self.limits.max_idle_days
        for name, job in list(self._jobs.items()):
            if job.record.state != "open" or self._store.idle_seconds(name) <= limit:
                self._overdue.pop(name, None)
            elif now - self._overdue.setdefault(name, now) >= EXPIRY_GRACE_SECONDS:
                with job.lock:
                    if job.record.state == "open" and now - job.asked > EXPIRY_GRACE_SECONDS:
                        self._end(job, "closed")
                        self._tell(JobExpired(customer=job.record.owner, job=name))
        self._forget_ended(limit)

    def _forget_ended(self, limit: float) -> None:
        """Remove what is left of ended jobs: older than `limit` seconds, or beyond a few each."""
        ended: dict[str, list[tuple[float, str]]] = {}
        for name, job in list(self._jobs.items()):
            if job.record.state != "open":
                ended.setdefault(job.record.owner, []).append(
                    (self._store.idle_seconds(name), name)
                )
        for found in ended.values():
            for place, (seconds, name) in enumerate(sorted(found)):
                if place >= ENDED_KEPT or seconds > limit:
                    self._store.remove(name)
                    self._jobs.pop(name, None)

    def rewind(self, job: Job, number: int) -> None:
        """Take a job back to its checkpoint after request `number`."""
        states = self._store.states(job.record.name)
        if number not in states.numbers():
            raise MismatchError(
                f"no checkpoint after request {number} is kept: resume at one that is"
            )
        with job.lock:
            job.deliveries.take_over()  # streams before this one may change nothing more
            self._go_back(job, number)
            states.drop_after(number)

    def _go_back(self, job: Job, number: int) -> None:
        state = self._store.states(job.record.name).load(number)
        with self._turns.take(job.record.owner):
            lora = job.lora or self._attach(job.record)
            lora.load(state["lora"])
        job.go_back(number, state, lora)

    def checkpoint(self, job: Job, sequence: int) -> Message:
        """Make the state after the last applied request durable, unless `sequence` is already.

        It is when the customer asks again because the reply was lost; by then a batch that was
        sent ahead may have been applied, and no step has followed it.
        """
        assert job.lora is not None
        if sequence > job.deliveries.applied:
            return Refusal(code="out-of-order", message=f"request {sequence} was not applied yet")
        if sequence <= job.durable:
            return Checkpointed(sequence=job.durable)
        if not job.lora.settled:
            raise MismatchError("a checkpoint is made after a step: send the step first")
        number, begin = job.deliveries.applied, time.monotonic()
        # Without a turn: the job's own lock is held, and others' work does not touch its weights.
        self._store.states(job.record.name).save(number, job.snapshot())
        job.durable = number
        seconds = time.monotonic() - begin
        self._tell(JobSaved(
            customer=job.record.owner, job=job.record.name, request=number, seconds=seconds
        ))  # fmt: skip
        return Checkpointed(sequence=number)

    def cancel(self, job: Job) -> None:
        """End a job and forget what it learned."""
        with job.lock:
            if job.record.state != "cancelled":
                self._end(job, "cancelled")
                self._tell(JobCancelled(customer=job.record.owner, job=job.record.name))

    def _end(self, job: Job, state: Literal["cancelled", "closed"]) -> None:
        job.deliveries.take_over()
        self._store.forget(job.record, state)
        job.record = msgspec.structs.replace(job.record, state=state)
        job.durable = job.deliveries.applied
        if job.lora is not None:
            with self._turns.take(job.record.owner):
                job.lora.remove()
            job.lora = None

    def apply(self, job: Job, message: Message) -> Message:
        """Apply a numbered request wholly, or raise and leave the job as it was."""
        assert isinstance(message, Numbered)
        tokens = len(message.hidden_TD) if isinstance(message, Batch | Forward) else 0
        self._check_message(job, message)
        with self._turn(job, message, tokens):
            if isinstance(message, Forward):
                self._check_open(job, message)  # in the turn: nobody else opens one meanwhile
            reply = self._model.submit(job.work, message).result()
        job.count(message, reply)
        return reply

    def predict(self, job: Job, message: Predict) -> Message:
        """Use the tuned model; changes nothing but the count of tokens."""
        assert job.lora is not None
        self._check_rows(message)
        job.check_left(message, self.limits)
        with self._turn(job, message, len(message.hidden_TD)):
            predicted = self._model.submit(job.lora.predict, message.hidden_TD, message.lengths)
            out = predicted.result()
        reply: Message
        if job.record.task == "hidden":
            reply = Outputs(sequence=None, precision=job.record.precision, hidden_TD=out)
        else:
            reply = Predictions(logits_BC=out)
        job.count(message, reply)
        return reply

    @contextmanager
    def _turn(self, job: Job, message: Message, tokens: int) -> Iterator[None]:
        """A turn at the model: what it takes is the job's, and is told if nothing is raised."""
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

    def _attach(self, record: JobRecord) -> JobLora:
        task = None if record.task == "hidden" else record.task
        config = tuning_of(record.options)
        return JobLora(
            self._served, record.name, config, self._graphs, task=task, outputs=record.outputs
        )

    def _check_room(self, customer: str) -> None:
        live = [job.record.owner for job in self._jobs.values() if job.record.state == "open"]
        own = live.count(customer)
        if len(live) >= self.limits.max_jobs or own >= self.limits.max_jobs_per_customer:
            raise RefusedError("limit", "too many jobs are open: cancel one, or ask again later")

    def _check_message(self, job: Job, message: Numbered) -> None:
        headless = job.record.task == "hidden"
        if isinstance(message, Batch) == headless and not isinstance(message, Step):
            raise MismatchError(f"{type(message).__name__} does not belong to this job's partition")
        job.check_left(message, self.limits)
        if isinstance(message, Batch | Forward):
            self._check_rows(message)
        if isinstance(message, Batch):
            check_labels(message.labels, job.record.task, job.record.outputs)

    def _check_open(self, job: Job, message: Forward) -> None:
        """Whether a job, and its customer, may have another forward wait for its gradient."""
        assert job.lora is not None
        if job.lora.open_forwards >= WINDOW:
            raise RefusedError("limit", f"{WINDOW} forwards are open: send their gradients first")
        own = [j.lora for j in list(self._jobs.values()) if j.record.owner == job.record.owner]
        rows, limits = len(message.hidden_TD), self.limits
        for open_tokens, most, whose in (
            (job.lora.open_tokens, limits.max_message_tokens, "this job"),
            (
                sum(lora.open_tokens for lora in own if lora is not None),
                limits.open_tokens,
                "your jobs",
            ),
        ):
            if open_tokens + rows > most:
                raise RefusedError(
                    "limit",
                    f"{open_tokens} tokens of {whose} wait for their gradients and {rows} more "
                    f"came, at most {most} may: send the gradients first, or cancel a job",
                )

    def _check_rows(self, message: Batch | Forward | Predict) -> None:
        check_rows(
            message.hidden_TD, message.lengths, width=self._served.stack.hidden_size,
            longest=self._longest, limits=self.limits,
        )  # fmt: skip


class _Session:
    """One stream: hello, then a job, then requests for that job."""

    def __init__(self, vendor: Vendor, customer: str) -> None:
        self._vendor, self._customer = vendor, customer
        self._greeted = False
        self._job: Job | None = None
        self._lease: tuple[Deliveries, int] | None = None

    def end(self) -> None:
        """Let go of what only a customer who is there needs at once.

        The job stays as it is, for whoever resumes it; if a stream has taken it over meanwhile, its
        open forwards are computed again, and nothing else.
        """
        lora = None if self._job is None else self._job.lora
        if lora is not None:
            lora.release()

    def handle(self, message: Message) -> Message:
        """Answer one request."""
        try:
            return self._answer(message)
        except RefusedError as error:
            return Refusal(code=error.code, message=str(error))

    def _answer(self, message: Message) -> Message:
        vendor, job = self._vendor, self._job
        if isinstance(message, Hello):
            if PROTOCOL_VERSION not in message.versions:
                raise VerificationError(f"expected version {PROTOCOL_VERSION} of the protocol")
            self._greeted = True
            return vendor.welcome()
        if not self._greeted:
            raise RefusedError("out-of-order", "expected hello first")
        if isinstance(message, OpenJob | ResumeJob):
            return self._take(message)
        if job is None:
            raise RefusedError("out-of-order", "expected a job to be opened or resumed first")
        if isinstance(message, Status):
            return job.state()
        if isinstance(message, Cancel):
            vendor.cancel(job)
            return job.state()
        assert self._lease is not None
        deliveries, lease = self._lease
        job.asked = time.monotonic()
        with job.lock:
            if job.record.state != "open" or job.lora is None:
                raise RefusedError("policy", ENDED[job.record.state])
            if isinstance(message, Predict):
                return vendor.predict(job, message)
            if isinstance(message, Checkpoint):
                if deliveries is not job.deliveries or not deliveries.leased_to(lease):
                    raise RefusedError("out-of-order", "another stream has taken this job over")
                return vendor.checkpoint(job, message.sequence)
            if not isinstance(message, Numbered):
                raise VerificationError(f"{named(message)} is not a request")
            return deliveries.deliver(message, partial(vendor.apply, job), lease=lease)

    def _take(self, message: OpenJob | ResumeJob) -> JobState:
        if self._job is not None:
            raise RefusedError("out-of-order", "a stream serves one job: open another stream")
        if isinstance(message, OpenJob):
            job = self._vendor.open(self._customer, message)
        else:
            job = self._vendor.find(self._customer, message.token)
            if message.at not in (None, job.deliveries.applied) and job.record.state == "open":
                self._vendor.rewind(job, message.at)
        self._job = job
        with job.lock:
            self._lease = (job.deliveries, job.deliveries.take_over())
            return job.state()


def _name_of(token: str) -> tuple[str, str]:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return f"job_{digest[:16]}", digest
