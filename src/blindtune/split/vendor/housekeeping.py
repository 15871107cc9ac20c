"""Work that a service does every now and then: ending jobs that nobody asks for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import final

logger = logging.getLogger(__name__)

HOUR_SECONDS = 3600.0


@final
class Housekeeping:
    """Calls a function at once and again after every pause, in a thread, until it is closed.

    Args:
        work: what is done; what it raises is logged by its kind, and it is called again later.
        pause_seconds: between two calls.
    """

    def __init__(self, work: Callable[[], object], pause_seconds: float = HOUR_SECONDS) -> None:
        self._work, self._pause = work, pause_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="blindtune-keep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it; what is being done is done to its end."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                self._work()
            except Exception as error:  # of one job; the others are looked at next time
                logger.error("housekeeping failed with %s", type(error).__name__)
            if self._ended.wait(self._pause):
                return
