"""A transport that outlives its connections: nothing is trained twice and nothing is lost.

When the connection ends, or the vendor is busy, it waits (exponentially longer, with jitter),
connects again, resumes the job, and sends again what has no reply. Numbered requests are kept
until a checkpoint made them durable, so that also a vendor who crashed and went back to its last
checkpoint is brought to where it was.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from blindtune.errors import BlindtuneError, ConfigError, NetworkError, VerificationError
from blindtune.exchange.wire.messages import (
    PROTOCOL_VERSION,
    WINDOW,
    Checkpointed,
    Hello,
    JobState,
    Message,
    Numbered,
    OpenJob,
    ResumeJob,
    Welcome,
)
from blindtune.exchange.wire.transport import BusyError, LostError, OutOfOrderError, Transport


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """How long a customer tries to reach the vendor again."""

    first_delay_seconds: float = 0.5
    """Pause before the first try; it doubles with every further one."""
    longest_delay_seconds: float = 30.0
    """Pauses grow no longer than this."""
    give_up_after_seconds: float = 300.0
    """Time without a single reply after which the transport fails."""
    journal_bytes: int = 256 << 20
    """Memory for requests that have a reply and are not durable; the oldest are dropped."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 < self.first_delay_seconds <= self.longest_delay_seconds:
            raise ConfigError(
                f"first_delay_seconds ({self.first_delay_seconds}) must be above 0 and at most "
                f"longest_delay_seconds ({self.longest_delay_seconds})"
            )
        if self.give_up_after_seconds < 0 or self.journal_bytes < 0:
            raise ConfigError("give_up_after_seconds and journal_bytes must not be negative")


@final
class Backoff:
    """Pauses between tries, each twice as long as the one before, with jitter, until a reply."""

    def __init__(self, config: RetryConfig) -> None:
        self._config = config
        self.replied()

    def replied(self) -> None:
        """There was a reply: the next trouble begins anew."""
        self._since: float | None = None
        self._delay = self._config.first_delay_seconds

    def pause_seconds(self, error: NetworkError) -> float | None:
        """How long to wait after a failed try, with what a busy vendor asks for; None: give up."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        pause = self._delay * random.uniform(0.5, 1.0)  # noqa: S311 (jitter, not a secret)
        if isinstance(error, BusyError):
            pause += error.retry_after_seconds
        if now + pause > self._since + self._config.give_up_after_seconds:
            return None
        self._delay = min(2 * self._delay, self._config.longest_delay_seconds)
        return pause


@dataclass(eq=False)
class _Entry:
    """A request, from its submission until it is answered and durable."""

    message: Message
    future: Future[Message] = field(default_factory=Future)
    answered: bool = False
    number: int = 0
    """Its sequence number; 0 when it has none."""
    bytes: int = 0
    """Of its tensors."""

    def __post_init__(self) -> None:
        """Look at the message once."""
        values = [getattr(self.message, name) for name in self.message.__struct_fields__]
        self.bytes = sum(value.nbytes for value in values if isinstance(value, Tensor))
        if isinstance(self.message, Numbered):
            self.number = self.message.sequence


_Event = _Entry | tuple[_Entry, Transport, Future[Message]] | None
"""Submitted; answered on a connection; or closed."""


class ResumingTransport:
    """One job over as many connections as it takes; safe to use from several threads.

    Args:
        connect: makes a new connection; raises NetworkError while the vendor is not reachable.
        opening: the job to open or to resume. `at` is used for the first connection only.
        program: this program's name and release.
        retries: pauses and limits.

    Raises:
        NetworkError: the vendor cannot be reached at the first try.
        BlindtuneError: the vendor or its certificate is refused, or it refuses the job.

    Attributes:
        welcome: the vendor's terms.
        job: the job's state at the last connection.
    """

    welcome: Welcome
    job: JobState

    def __init__(
        self,
        connect: Callable[[], Transport],
        opening: OpenJob | ResumeJob,
        *,
        program: str,
        retries: RetryConfig | None = None,
    ) -> None:
        self._connect = connect
        self._opening = opening
        self._hello = Hello(program=program)
        self._retries = retries or RetryConfig()
        self._entries: list[_Entry] = []
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._room = threading.BoundedSemaphore(WINDOW)
        self._submitting = threading.Lock()
        self._closing = threading.Event()
        self._failure: BlindtuneError | None = None
        self._dropped = 0  # the highest number that was dropped before it was durable
        self._ghosts = 1  # openings that may arrive late; one of a process that was killed
        self._backoff = Backoff(self._retries)
        self._connection = self._greet()
        self._opening = ResumeJob(token=opening.token)
        self._thread = threading.Thread(target=self._run, name="blindtune-resume", daemon=True)
        self._thread.start()

    def submit(self, message: Message) -> Future[Message]:
        """Send a request; waits while eight are unanswered. Its tensors must not change."""
        while not self._room.acquire(timeout=1.0):
            if self._failure or self._closing.is_set():
                break
        with self._submitting:
            if self._failure or self._closing.is_set():
                raise self._failure or LostError("this transport was closed: open another one")
            entry = _Entry(message)
            self._events.put(entry)
        return entry.future

    def call(self, message: Message) -> Message:
        """Send a request and wait for its reply."""
        return self.submit(message).result()

    def close(self) -> None:
        """End the connection; the job stays at the vendor, and can be resumed."""
        self._closing.set()
        self._connection.close()
        self._events.put(None)
        self._thread.join()

    def _greet(self) -> Transport:
        connection = self._connect()
        try:
            welcome = connection.call(self._hello)
            if not isinstance(welcome, Welcome) or welcome.version != PROTOCOL_VERSION:
                raise VerificationError(
                    f"expected a welcome in version {PROTOCOL_VERSION}, got {welcome!r}: "
                    "install the release that the vendor has"
                )
            job = self._ask_for_job(connection)
            if not isinstance(job, JobState):
                raise VerificationError(f"expected the job's state, got {job!r}")
        except BaseException:
            connection.close()
            raise
        self.welcome, self.job = welcome, job
        return connection

    def _ask_for_job(self, connection: Transport) -> Message:
        try:
            return connection.call(self._opening)
        except LostError:
            self._ghosts += 1
            raise

    def _run(self) -> None:
        failure: BlindtuneError = LostError("the transport was closed before a reply came")
        try:
            while (event := self._events.get()) is not None:
                try:
                    if isinstance(event, _Entry):
                        self._entries.append(event)
                        self._send(event)
                    elif event[1] is self._connection:
                        self._settle(event[0], event[2])
                except (LostError, BusyError) as error:
                    self._recover(error)
        except BlindtuneError as error:
            failure = error
        except Exception as error:
            failure = NetworkError(f"the transport failed ({type(error).__name__}): resume the job")
        self._fail(failure)

    def _recover(self, error: NetworkError) -> None:
        """Get another connection, and send what is needed on it; again, if that is lost too."""
        while True:
            self._pause(error)
            try:
                return self._replay()
            except (LostError, BusyError) as another:
                error = another

    def _pause(self, error: NetworkError) -> None:
        self._connection.close()
        seconds = self._backoff.pause_seconds(error)
        if seconds is None:
            raise NetworkError(
                f"no reply for {self._retries.give_up_after_seconds:g} seconds ({error}): "
                "resume the job when the vendor is reachable"
            ) from error
        if self._closing.wait(seconds):
            raise LostError("the transport was closed before a reply came")

    def _replay(self) -> None:
        """Connect, and send in order what the vendor has not applied or has not answered."""
        self._connection = self._greet()
        applied = self.job.applied
        self._forget(self.job.durable)
        needed = [e for e in self._entries if not e.answered or e.number > applied]
        ahead = [e.number for e in needed if e.number > applied]
        if (ahead and ahead[0] != applied + 1) or applied < self._dropped:
            raise NetworkError(
                f"the vendor went back to request {applied}, and the requests after it are no "
                "longer in memory: resume the job from there"
            )
        for entry in needed:
            self._send(entry)

    def _send(self, entry: _Entry) -> None:
        connection = self._connection
        try:
            future = connection.submit(entry.message)
        except (LostError, BusyError):
            raise
        except BlindtuneError as error:  # it cannot be encoded: no other request is concerned
            self._finish(entry, error)
            return
        future.add_done_callback(lambda done: self._events.put((entry, connection, done)))

    def _settle(self, entry: _Entry, done: Future[Message]) -> None:
        error = done.exception()
        if isinstance(error, LostError | BusyError):
            raise error
        if isinstance(error, OutOfOrderError) and self._ghosts:
            # An opening that was sent on an earlier connection, and came after the one of this
            # connection, has the job now. There are no more of them than were left unanswered, so
            # that two customers with one job do not take it from each other for ever.
            self._ghosts -= 1
            raise LostError(str(error))
        self._backoff.replied()
        self._finish(entry, error, None if error else done.result())

    def _finish(
        self, entry: _Entry, error: BaseException | None, reply: Message | None = None
    ) -> None:
        """Answer an entry, if it was not answered before; keep it if it may be needed again."""
        if entry.answered:
            if error is not None:
                raise NetworkError(f"a request cannot be repeated ({error}): resume the job")
            return
        entry.answered = True
        self._room.release()
        if error is not None or not entry.number:
            self._entries.remove(entry)
        if isinstance(reply, Checkpointed):
            self._forget(reply.sequence)
        self._trim()
        if error is not None:
            entry.future.set_exception(error)
        elif reply is not None:
            entry.future.set_result(reply)

    def _trim(self) -> None:
        """Drop the oldest answered entries while they take more memory than allowed."""
        kept = [entry for entry in self._entries if entry.answered]
        excess = sum(entry.bytes for entry in kept) - self._retries.journal_bytes
        for entry in kept:
            if excess <= 0:
                break
            excess -= entry.bytes
            self._dropped = entry.number
            self._entries.remove(entry)

    def _forget(self, durable: int) -> None:
        self._entries = [e for e in self._entries if not (e.answered and e.number <= durable)]

    def _fail(self, failure: BlindtuneError) -> None:
        with self._submitting:
            self._failure = failure
        self._connection.close()
        waiting = [e for e in self._entries if not e.answered]
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, _Entry):
                waiting.append(event)
        for entry in waiting:
            entry.future.set_exception(failure)
