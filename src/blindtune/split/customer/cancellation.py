"""The customer's last act: end a job at the vendor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blindtune.errors import PolicyError, VerificationError
from blindtune.exchange.wire.messages import Cancel, JobState, ResumeJob
from blindtune.exchange.wire.resuming import ResumingTransport
from blindtune.split.customer.access import (
    AccessConfig,
    Connect,
    Traffic,
    connector,
    patiently,
    saying_what_next,
)
from blindtune.split.customer.job import CustomerJob
from blindtune.version import PROGRAM


@dataclass(frozen=True, kw_only=True)
class Cancellation:
    """A job that has ended."""

    job: str | None
    """The vendor's name for it; None: the vendor never had it."""
    steps: int
    """Optimizer steps whose result the vendor removed."""
    tokens: int
    """Tokens that it had been sent."""
    kept: Path
    """What stays here until it is deleted: the private texts and their states."""


def cancel(
    vendor: str | Connect, job: str | Path, *, access: AccessConfig | None = None
) -> Cancellation:
    """End a job: the vendor removes its adapter, head, optimizer and checkpoints.

    That it does is the vendor's word; what it has copied before stays copied. Cancelling again
    changes nothing.

    Args:
        vendor: its address, or a function that makes a transport.
        job: directory that `split_tune` made.
        access: as for `split_tune`.

    Raises:
        DataError: no job is there. NetworkError: the vendor cannot be reached.
        PolicyError: it has no such job.
    """
    access = access or AccessConfig()
    connect = connector(vendor, access, Traffic())
    found = CustomerJob(job)
    with found.working(), saying_what_next():
        opening, retries = ResumeJob(token=found.token), access.retries()
        try:
            transport = patiently(
                lambda: ResumingTransport(connect, opening, program=PROGRAM, retries=retries),
                retries,
            )
        except PolicyError as error:
            unopened = found.record.state in ("begun", "cancelled")
            if not unopened or "(unknown-job)" not in str(error):
                raise
            found.mark("cancelled")
            return Cancellation(job=None, steps=0, tokens=0, kept=found.path)
        try:
            state = transport.call(Cancel())
        finally:
            transport.close()
        if not isinstance(state, JobState) or state.state != "cancelled":
            raise VerificationError(f"expected a cancelled job, got {state!r}: ask the vendor")
        found.mark("cancelled")
    return Cancellation(job=state.job, steps=state.steps, tokens=state.tokens, kept=found.path)
