"""The vendor's jobs, in memory and on the disk: opened, found again, taken back, and ended.

A job is durable before its customer is told of it, and so is everything that a checkpoint holds.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, final

import msgspec

from blindtune.errors import DataError, MismatchError, OutputError
from blindtune.exchange.wire.events import JobCancelled, JobClosed, JobOpened, JobSaved, Observer
from blindtune.exchange.wire.messages import Checkpointed, Message, OpenJob, Refusal
from blindtune.split.terms import VendorLimits
from blindtune.split.vendor.admission import RefusedError, check_opening
from blindtune.split.vendor.job import Job, tensor_bytes
from blindtune.split.vendor.shared_model import SharedModel
from blindtune.split.vendor.store import JobRecord, JobStore

logger = logging.getLogger(__name__)

UNREADABLE = "what is kept of this job cannot be read here: ask the vendor"
EXPIRY_GRACE_SECONDS = 3600.0
NO_CUSTOMER = ""
"""Whose turn it is when the vendor ends a job; no customer has an empty name."""
ENDED_KEPT = 32
"""Ended jobs of a customer that are remembered, to tell it that they have ended."""


@final
class JobBook:
    """All jobs of a vendor; iterating gives those that it knows now.

    Args:
        directory: where jobs and their checkpoints are kept.
        bottom: id of the bottom package that customers were given.
        model: whose adapters they tune.
        limits: what a job may use.
        tell: is told of jobs.

    Raises:
        OutputError: the directory holds jobs of another model or cut.

    Attributes:
        store: what is on the disk.
    """

    def __init__(
        self,
        directory: str | Path,
        bottom: str,
        model: SharedModel,
        limits: VendorLimits,
        tell: Observer,
    ) -> None:
        self.store = JobStore(directory, bottom)
        self._bottom, self._model, self._limits, self._tell = bottom, model, limits, tell
        self._jobs = {r.name: Job(record=r) for r in self.store.records()}
        for job in self:
            if job.record.state != "open":  # killed before, by another version
                self.store.drop_states(job.record.name)
        self._overdue: dict[str, float] = {}  # since when (monotonic) a job has looked overdue
        self._opening: dict[str, str] = {}  # jobs that are being opened, and whose they are
        self._places = threading.Condition()  # never held while a turn is waited for

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def open(self, customer: str, opening: OpenJob) -> Job:
        """Open a job, or find it again; durable before it is returned."""
        check_opening(opening, self._model.served.cut, self._bottom, self._limits)
        name, digest = _name_of(opening.token)
        self._check_readable(name)
        self.expire()
        record = JobRecord(
            name=name,
            owner=customer,
            token_sha256=digest,
            task=opening.task,
            outputs=opening.outputs,
            precision=opening.precision,
            options=opening.options,
        )
        if self._take_place(record):
            self._begin(record)
            self._tell(JobOpened(customer=customer, job=name))
        job = self.find(customer, opening.token)
        if not job.record.agrees(opening):
            raise MismatchError("this job was opened with other terms: use them, or another token")
        return job

    def find(self, customer: str, token: str) -> Job:
        """A customer's job by its token; PolicyError to everybody else."""
        name, digest = _name_of(token)
        self._check_readable(name)
        job = self._jobs.get(name)
        if (
            job is None
            or job.record.owner != customer
            or not hmac.compare_digest(job.record.token_sha256, digest)
        ):
            raise RefusedError("unknown-job", "there is no such job: open it")
        with job.lock:
            if job.lora is None and job.record.state == "open":
                self._wake(job)
            if job.record.state == "open":
                try:
                    self.store.touch(name)
                except FileNotFoundError:  # somebody has removed its folder, or what was agreed
                    self._close(job)
        return job

    def rewind(self, job: Job, number: int) -> None:
        """Take a job back to its checkpoint after request `number`; what it used stays used."""
        states = self.store.states(job.record.name)
        if number not in states.numbers():
            raise MismatchError(
                f"no checkpoint after request {number} is kept: resume at one that is"
            )
        with job.lock:
            job.deliveries.take_over()  # streams before this one may change nothing more
            state = self._read(job, number)
            record = msgspec.structs.replace(job.record, undone=job.undone_by(state))
            self.store.write(record)  # a vendor killed now counts too much rather than too little
            self._go_back(job, number, state)
            job.record = record
            states.drop_after(number)

    def checkpoint(self, job: Job, sequence: int) -> Message:
        """Make the state after the last applied request durable, unless `sequence` is already.

        It is when the customer asks again because the reply was lost; by then a batch that was
        sent ahead may have been applied, and no step has followed it. What is stored counts as
        bytes of the job. One that takes it beyond its limit is made nevertheless: no request, and
        so no other checkpoint, can follow it.
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
        state = job.snapshot()
        state["bytes"] += tensor_bytes(state)
        self.store.states(job.record.name).save(number, state)
        job.bytes, job.durable = state["bytes"], number
        seconds = time.monotonic() - begin
        self._tell(JobSaved(
            customer=job.record.owner, job=job.record.name, request=number, seconds=seconds
        ))  # fmt: skip
        return Checkpointed(sequence=number)

    def cancel(self, job: Job) -> None:
        """End a job and forget what it learned."""
        with job.lock:
            if job.record.state == "cancelled":
                self.store.drop_states(job.record.name)  # it is said again that there are none
            else:
                self._end(job, "cancelled")
                self._tell(JobCancelled(customer=job.record.owner, job=job.record.name))

    def expire(self) -> None:
        """End the open jobs that nobody has asked for in `max_idle_days`; forget those long ended.

        Only those that looked so `EXPIRY_GRACE_SECONDS` ago already: a clock that jumps ahead and
        is set right again takes no job away. Openings that were killed leave no trace either. What
        the disk refuses is logged, and does not keep the other jobs.
        """
        now, limit = time.monotonic(), 86400 * self._limits.max_idle_days
        for job in self:
            with _logged(job.record.name):
                self._end_overdue(job, now, limit)
        with self._places:
            self._forget_ended(limit)
            with _logged("what killed openings left"):
                self.store.remove_unopened(EXPIRY_GRACE_SECONDS, self._opening)

    def _end_overdue(self, job: Job, now: float, limit: float) -> None:
        name = job.record.name
        if job.record.state != "open" or self.store.idle_seconds(name) <= limit:
            self._overdue.pop(name, None)
        elif (
            now - self._overdue.setdefault(name, now) >= EXPIRY_GRACE_SECONDS
            and now - job.asked > EXPIRY_GRACE_SECONDS  # else its lock may be held for long
        ):
            with job.lock:
                if job.record.state == "open" and now - job.asked > EXPIRY_GRACE_SECONDS:
                    self._close(job)

    def _forget_ended(self, limit: float) -> None:
        """Remove what is left of ended jobs: older than `limit` seconds, or beyond a few each."""
        ended: dict[str, list[tuple[float, str]]] = {}
        for job in self:
            if job.record.state != "open":
                name = job.record.name
                with _logged(name):
                    idle = self.store.idle_seconds(name)
                    ended.setdefault(job.record.owner, []).append((idle, name))
        for found in ended.values():
            for place, (seconds, name) in enumerate(sorted(found)):
                if place >= ENDED_KEPT or seconds > limit:
                    self._jobs.pop(name, None)  # if it cannot be removed, the next start tries
                    with _logged(name):
                        self.store.remove(name)

    def _take_place(self, record: JobRecord) -> bool:
        """Take a place for a job that is to be opened; False if it is known.

        Waits while the same job is being opened, and for no other.
        """
        with self._places:
            self._places.wait_for(lambda: record.name not in self._opening)
            if record.name in self._jobs:
                return False
            self._check_room(record.owner)
            self._opening[record.name] = record.owner
            return True

    def _begin(self, record: JobRecord) -> None:
        """Make a job in the place that was taken for it, or give the place back."""
        made = None
        try:
            made = self._make(record)
        finally:
            with self._places:
                if made is not None:
                    self._jobs[record.name] = made
                del self._opening[record.name]
                self._places.notify_all()

    def _make(self, record: JobRecord) -> Job:
        with self._model.turn(record.owner):
            job = Job(record=record, lora=self._model.attach(record))
            try:
                self.store.states(record.name).save(0, job.snapshot())
                self.store.write(record)
            except BaseException:
                self._model.detach(record)
                raise
        return job

    def _wake(self, job: Job) -> None:
        """Read a job that rests on the disk; one without a state is closed."""
        if kept := self.store.states(job.record.name).numbers():
            self._go_back(job, kept[-1], self._read(job, kept[-1]))
        else:
            self._close(job)

    def _read(self, job: Job, number: int) -> dict[str, Any]:
        try:
            return self.store.states(job.record.name).load(number)
        except DataError as error:
            raise RefusedError("policy", UNREADABLE) from error

    def _go_back(self, job: Job, number: int, state: dict[str, Any]) -> None:
        with self._model.turn(job.record.owner):
            lora = job.lora or self._model.attach(job.record)
            lora.load(state["lora"])
        job.go_back(number, state, lora)

    def _close(self, job: Job) -> None:
        self._end(job, "closed")
        self._tell(JobClosed(customer=job.record.owner, job=job.record.name))

    def _end(self, job: Job, state: Literal["cancelled", "closed"]) -> None:
        job.deliveries.take_over()
        job.deliveries.forget()
        self.store.forget(job.record, state)
        job.record = msgspec.structs.replace(job.record, state=state)
        job.durable = job.deliveries.applied
        if job.lora is not None:
            # What the vendor itself ends does not queue behind its customer's requests.
            whose = job.record.owner if state == "cancelled" else NO_CUSTOMER
            with self._model.turn(whose):
                self._model.detach(job.record)
            job.lora = None

    def _check_readable(self, name: str) -> None:
        if name in self.store.unreadable:
            raise RefusedError("policy", UNREADABLE)

    def _check_room(self, customer: str) -> None:
        live = [job.record.owner for job in self if job.record.state == "open"]
        live += self._opening.values()
        own = live.count(customer)
        if len(live) >= self._limits.max_jobs or own >= self._limits.max_jobs_per_customer:
            raise RefusedError("limit", "too many jobs are open: cancel one, or ask again later")


@contextmanager
def _logged(name: str) -> Iterator[None]:
    """Log what the disk refuses about one job, and go on."""
    try:
        yield
    except (OSError, OutputError) as error:
        logger.error("%s cannot be put in order: look at its folder (%s)", name, error)


def _name_of(token: str) -> tuple[str, str]:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return f"job_{digest[:16]}", digest
