"""Turns at the model: one at a time, and the same share of its time for every customer who waits.

Start-time fair queueing (Goyal, Vin, Cheng 1996). Every customer has a clock that runs while the
model works for it; the turn goes to the one whose clock is behind. Who was away gets no credit for
it, so nobody can save time up, and how many jobs, streams or requests a customer has changes
nothing for the others: it waits for at most one request of each of them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final


@final
class Turns:
    """A lock with a queue for each customer.

    Args:
        clock: seconds from any moment on; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mutex = threading.Lock()
        self._waiting: dict[str, deque[threading.Lock]] = {}
        self._used: dict[str, float] = {}
        """Where each customer's clock stands; customers that are not in it are at `_now`."""
        self._now = 0.0
        """Where the clock of the customer at the model stood when its turn began."""
        self._held = False

    @contextmanager
    def take(self, customer: str) -> Iterator[float]:
        """A turn; gives the seconds that were waited for it. Not to be taken inside another."""
        asked = self._clock()
        gate = threading.Lock()
        with self._mutex:
            if self._held:
                gate.acquire()
                self._waiting.setdefault(customer, deque()).append(gate)
            else:
                self._begin(customer)
        gate.acquire()  # open at once, or when the turn has come
        begun = self._clock()
        try:
            yield begun - asked
        finally:
            with self._mutex:
                self._used[customer] = self._now + self._clock() - begun
                self._pass_on()

    def _begin(self, customer: str) -> None:
        self._held = True
        self._now = max(self._now, self._used.get(customer, 0.0))

    def _pass_on(self) -> None:
        if not self._waiting:
            self._held = False
            self._used.clear()  # nobody is behind anybody
            return
        # Of those that stand equal, the one whose wait began first.
        chosen = min(self._waiting, key=lambda name: max(self._now, self._used.get(name, 0.0)))
        queue = self._waiting.pop(chosen)
        gate = queue.popleft()
        if queue:
            self._waiting[chosen] = queue  # at the end
        self._begin(chosen)
        self._used = {name: at for name, at in self._used.items() if at > self._now}
        gate.release()
