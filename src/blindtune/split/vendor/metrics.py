"""A vendor's events as Prometheus metrics: counts, sizes and times, without a name or any content.

No label says whose a request was: who may read the metrics learns how busy the vendor is, and
nothing of a single customer. The log has the names (split.vendor.event_log).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from blindtune.errors import ConfigError
from blindtune.exchange.wire.events import (
    Answered,
    Crossed,
    Event,
    JobCancelled,
    JobClosed,
    JobOpened,
    JobSaved,
    StreamEnded,
    StreamOpened,
    TurnedAway,
    Worked,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@final
class Metrics:
    """An observer of events that can be read as Prometheus text.

    Args:
        open_jobs: gives the number of open jobs.

    Raises:
        ConfigError: prometheus-client is not installed.
    """

    def __init__(self, open_jobs: Callable[[], int]) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ConfigError(
                "metrics need `prometheus-client`: pip install 'blindtune[network]'"
            ) from error
        self._registry = registry = prometheus.CollectorRegistry()
        self._write = prometheus.generate_latest

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(f"blindtune_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Any:
            return prometheus.Gauge(f"blindtune_{name}", text, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Any:
            return prometheus.Histogram(
                f"blindtune_{name}_seconds", text, labels, registry=registry, buckets=_SECONDS
            )

        gauge("jobs_open", "Jobs that are open now.").set_function(open_jobs)
        self._jobs = counter("jobs", "Jobs opened, cancelled, closed.", "change")
        self._streams = gauge("streams", "Streams of customers that are open now.")
        self._ended = counter("streams_ended", "Streams that ended, and why.", "reason")
        self._away = counter("turned_away", "Calls that did not begin, and why.", "reason")
        self._busy = counter("busy", "Streams and calls that were told to come back later.")
        self._requests = counter("requests", "Requests by kind and answer.", "kind", "answer")
        self._bytes = counter("bytes", "Bytes of frames.", "direction")
        self._tokens = counter("tokens", "Tokens that went through the model.", "kind")
        self._steps = counter("steps", "Optimizer steps.")
        self._work = histogram("work", "The model's time for a request.", "kind")
        self._turn = histogram("turn_wait", "A request's wait for its turn at the model.")
        self._queue = histogram("queue_wait", "A request's wait in the queue of its stream.")
        self._saving = histogram("checkpoint", "Time to make a job durable.")

    def __call__(self, event: Event) -> None:
        """Count an event."""
        match event:
            case Crossed():
                self._bytes.labels(event.direction).inc(event.bytes)
            case Answered():
                self._requests.labels(event.kind, event.answer).inc()
                self._queue.observe(event.wait_seconds)
            case Worked():
                self._tokens.labels(event.kind).inc(event.tokens)
                self._steps.inc(event.kind == "step")
                self._work.labels(event.kind).observe(event.seconds)
                self._turn.observe(event.wait_seconds)
            case StreamOpened():
                self._streams.inc()
            case StreamEnded():
                self._streams.dec()
                self._ended.labels(event.reason).inc()
                self._busy.inc(event.reason == "busy")
            case TurnedAway():
                self._away.labels(event.reason).inc()
                self._busy.inc(event.reason != "token")
            case JobOpened():
                self._jobs.labels("opened").inc()
            case JobCancelled():
                self._jobs.labels("cancelled").inc()
            case JobClosed():
                self._jobs.labels("closed").inc()
            case JobSaved():
                self._saving.observe(event.seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        found: bytes = self._write(self._registry)
        return found
