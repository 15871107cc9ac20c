"""One call's work on a customer's job: reach the vendor, send what is missing, note every loss."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from blindtune.errors import VerificationError
from blindtune.exchange.wire.messages import WINDOW
from blindtune.exchange.wire.resuming import ResumingTransport
from blindtune.split.bottom import Bottom
from blindtune.split.customer.access import AccessConfig, Connect, Traffic, patiently, resume_job
from blindtune.split.customer.job import CustomerJob, LossLog
from blindtune.split.customer.private_gradients import GradientNoise, GradientPlan
from blindtune.split.customer.private_states import PrivateStates
from blindtune.split.customer.private_texts import Purpose
from blindtune.split.customer.requests import (
    PassConfig,
    PlannedBatch,
    check_batches,
    open_job,
    train,
)
from blindtune.split.customer.ushape import Top, customers_head, go_on, train_u_shape
from blindtune.split.terms import TuningConfig
from blindtune.training.progress import OnProgress, StepReport


@dataclass(frozen=True)
class Work:
    """What every stage of one call needs."""

    job: CustomerJob
    connect: Connect
    access: AccessConfig
    traffic: Traffic
    bottom: Bottom
    private: PrivateStates
    tuning: TuningConfig
    passes: PassConfig
    task: Purpose
    outputs: int
    """Classes, or targets of regression; 0 for language models."""
    gradients: GradientPlan | None = None
    """U-shape: the noise on what is sent back."""
    true_targets: bool = False
    """Of language models: whether the texts' own words are predicted, as the customer asked."""


def tune_two_part(work: Work, watch: Watch) -> None:
    """Stream what the vendor has not applied yet."""
    transport = _open_or_resume(work)
    try:
        check_batches(transport.welcome, work.private, work.passes)
        applied = transport.job.applied
        with work.job.loss_log(applied) as log:
            # What was trained but not noted is asked for again; the vendor remembers its replies.
            answered = max(max(log.losses, default=0), applied - WINDOW)
            watch.begin(log, applied=applied, answered=min(answered, applied))
            train(
                transport,
                work.private,
                work.passes,
                applied=applied,
                answered=answered,
                on_loss=watch.loss,
            )
    finally:
        transport.close()


def tune_u_shape(work: Work, watch: Watch) -> None:
    """Go on at the newest state that both parties kept."""
    head = customers_head(work.bottom, work.outputs, work.tuning)
    rate = work.passes.head_learning_rate
    top = Top(work.bottom, head, learning_rate=rate, directory=work.job.path)
    noise = _gradient_noise(work)
    retries = work.access.retries()
    if work.job.record.state == "begun":
        transport, applied = _open_or_resume(work), 0
    else:
        transport, applied = patiently(
            lambda: go_on(work.connect, top, work.job.token, retries=retries), retries
        )
    try:
        check_batches(transport.welcome, work.private, work.passes)
        with work.job.loss_log(applied) as log:
            watch.begin(log, applied=applied, answered=applied)
            train_u_shape(
                transport,
                top,
                work.private,
                work.passes,
                language_model=work.task == "language-model",
                applied=applied,
                noise=noise,
                true_targets=work.true_targets,
                on_loss=watch.loss,
            )
    finally:
        transport.close()


def _gradient_noise(work: Work) -> GradientNoise | None:
    """The noise of the job's gradients, with those that were sent already."""
    if work.gradients is None:
        return None
    if work.job.record.state == "begun":
        return GradientNoise.begin(work.gradients, work.job.gradients_path)
    return GradientNoise(work.gradients, work.job.gradients_path)


def _open_or_resume(work: Work) -> ResumingTransport:
    """The job's transport. A job that the vendor is known to have is never opened anew."""
    job, retries = work.job, work.access.retries()
    if job.record.state != "begun":
        transport = resume_job(work.connect, job.token, retries)
        if transport.welcome.bottom != work.bottom.id:
            transport.close()
            raise VerificationError("the vendor serves another model or cut now: ask it")
        return transport
    headless = job.record.partition == "u-shape"
    task = "hidden" if headless or work.task == "language-model" else work.task
    transport = patiently(
        lambda: open_job(
            work.connect,
            work.bottom,
            job.token,
            work.tuning,
            task=task,
            outputs=0 if headless else work.outputs,
            precision=work.passes.precision,
            retries=retries,
        ),
        retries,
    )
    job.mark("opened")
    return transport


@final
class Watch:
    """Follows the losses of a run: notes each, and shows how far it is."""

    def __init__(self, work: Work) -> None:
        self.show: OnProgress = lambda report: None
        self.reached: int | None = None
        self.tokens = 0
        self._work = work
        self._log: LossLog | None = None
        self._applied = 0
        self._batches: Iterator[PlannedBatch] = iter(())
        self._steps = len(work.passes.steps(len(work.private)))
        self._begin = time.perf_counter()

    def begin(self, log: LossLog, *, applied: int, answered: int) -> None:
        """Start at the batch after request `answered`; those up to `applied` are trained."""
        self._log, self._applied = log, applied
        work = self._work
        plan = list(work.passes.numbered(len(work.private), work.job.record.partition))
        self._batches = iter([batch for batch in plan if batch.number > answered])
        if applied:
            self.reached = max((batch.step for batch in plan if batch.number <= applied), default=0)
        self._begin = time.perf_counter()

    def loss(self, loss: float) -> None:
        """The next batch's loss."""
        assert self._log is not None
        batch = next(self._batches)
        self._log.add(batch.number, loss)
        if batch.number > self._applied:
            self.tokens += sum(len(self._work.private.states[i]) for i in batch.texts)
        seconds = time.perf_counter() - self._begin
        self.show(
            StepReport(
                step=batch.step,
                max_steps=self._steps,
                tokens=self.tokens,
                tokens_per_second=self.tokens / seconds,
                train_loss=loss,
                validation_loss=None,
                bytes_sent=self._work.traffic.sent or None,
            )
        )
