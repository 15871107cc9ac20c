"""The vendor: one frozen model, many customers' jobs, a handler message -> message a stream.

It runs behind any transport; `exchange.wire.serving.Server` takes `Vendor.session` as it is. A
stream is a `session`, which finds its job in the `job_book` and has the `shared_model` work for it.
Requests of a job are applied once and in order (exchange.wire.delivery), checked before anything is
computed (`admission`), and refused without effect when something is wrong with them.

What the vendor sees: hidden states, lengths, times, and in the two-part split labels. No token
ids. It knows nothing of privatizers (tests/test_architecture.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

from blindtune.errors import ConfigError
from blindtune.exchange.wire.codec import MessageLimits
from blindtune.exchange.wire.events import Observer, ignore
from blindtune.exchange.wire.messages import PROTOCOL_VERSION, Welcome
from blindtune.exchange.wire.transport import Handler
from blindtune.split.partition import Cut, Stack
from blindtune.split.terms import VendorLimits
from blindtune.split.vendor.job_book import JobBook
from blindtune.split.vendor.session import Session
from blindtune.split.vendor.shared_model import SharedModel
from blindtune.version import PROGRAM


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
        self._bottom = bottom
        self._payload = payload or MessageLimits()
        self._model = SharedModel(stack, cut, self.limits, observer)
        self._jobs = JobBook(directory, bottom, self._model, self.limits, observer)
        self.expire()

    @contextmanager
    def session(self, customer: str) -> Iterator[Handler]:
        """A handler for one stream of an authenticated customer."""
        session = Session(customer, self.welcome(), self._jobs, self._model)
        try:
            yield session.handle
        finally:
            session.end()

    def open_jobs(self) -> int:
        """How many jobs are open, of all customers; those that rest on the disk too."""
        return sum(job.record.state == "open" for job in self._jobs)

    def expire(self) -> None:
        """End the open jobs that nobody has asked for in `max_idle_days`, for good."""
        self._jobs.expire()

    def welcome(self) -> Welcome:
        """The terms that every customer is told."""
        stack, cut = self._model.served.stack, self._model.served.cut
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
