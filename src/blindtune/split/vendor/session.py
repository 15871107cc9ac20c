"""One customer's stream at the vendor: hello, then a job, then requests for that job."""

from __future__ import annotations

import time
from functools import partial
from typing import final

from blindtune.errors import VerificationError
from blindtune.exchange.wire.delivery import Deliveries
from blindtune.exchange.wire.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Checkpoint,
    Hello,
    JobState,
    Message,
    Numbered,
    OpenJob,
    Predict,
    Refusal,
    ResumeJob,
    Status,
    Welcome,
    named,
)
from blindtune.split.vendor.admission import RefusedError
from blindtune.split.vendor.job import Job
from blindtune.split.vendor.job_book import JobBook
from blindtune.split.vendor.shared_model import SharedModel

ENDED = {
    "cancelled": "this job was cancelled",
    "closed": "this job has ended: long unasked for, or its checkpoints were lost",
}


@final
class Session:
    """What a stream has come to.

    Args:
        customer: whose stream it is; authenticated.
        welcome: the vendor's terms.
        jobs: of all customers.
        model: works for them.
    """

    def __init__(self, customer: str, welcome: Welcome, jobs: JobBook, model: SharedModel) -> None:
        self._customer, self._welcome, self._jobs, self._model = customer, welcome, jobs, model
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
        if isinstance(message, Hello):
            if PROTOCOL_VERSION not in message.versions:
                raise VerificationError(f"expected version {PROTOCOL_VERSION} of the protocol")
            self._greeted = True
            return self._welcome
        if not self._greeted:
            raise RefusedError("out-of-order", "expected hello first")
        if isinstance(message, OpenJob | ResumeJob):
            return self._take(message)
        if self._job is None:
            raise RefusedError("out-of-order", "expected a job to be opened or resumed first")
        if isinstance(message, Status):
            return self._job.state()
        if isinstance(message, Cancel):
            self._jobs.cancel(self._job)
            return self._job.state()
        return self._work(self._job, message)

    def _take(self, message: OpenJob | ResumeJob) -> JobState:
        """Open a job or find it again, and take it over from any other stream."""
        if self._job is not None:
            raise RefusedError("out-of-order", "a stream serves one job: open another stream")
        if isinstance(message, OpenJob):
            job = self._jobs.open(self._customer, message)
        else:
            job = self._jobs.find(self._customer, message.token)
            if message.at not in (None, job.deliveries.applied) and job.record.state == "open":
                self._jobs.rewind(job, message.at)
        self._job = job
        with job.lock:
            self._lease = (job.deliveries, job.deliveries.take_over())
            return job.state()

    def _work(self, job: Job, message: Message) -> Message:
        """Answer what needs the job open; what changes it needs this stream's lease too."""
        assert self._lease is not None
        deliveries, lease = self._lease
        job.asked = time.monotonic()
        with job.lock:
            if job.record.state != "open" or job.lora is None:
                raise RefusedError("policy", ENDED[job.record.state])
            if isinstance(message, Predict):
                return self._model.predict(job, message)
            if isinstance(message, Checkpoint):
                if deliveries is not job.deliveries or not deliveries.leased_to(lease):
                    raise RefusedError("out-of-order", "another stream has taken this job over")
                return self._jobs.checkpoint(job, message.sequence)
            if not isinstance(message, Numbered):
                raise VerificationError(f"{named(message)} is not a request")
            return deliveries.deliver(message, partial(self._model.apply, job), lease=lease)
