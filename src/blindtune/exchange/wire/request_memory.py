"""Memory for requests that wait or are worked on, bounded for all streams of a server together.

No customer may take more than half of what the others have left, so that there is always some for
whoever comes next; one largest message may be taken in any case, if there is so much.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import final


@dataclass(eq=False)
class RequestMemory:
    """So many bytes, and how many of them are taken, by customer."""

    max_bytes: int
    max_payload_bytes: int
    """Of one message."""
    taken: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def used(self) -> int:
        """What all customers have taken."""
        return self.taken.total()

    def has(self, customer: str, size: int) -> bool:
        """Whether a customer may take so much more; `lock` is held."""
        own, used = self.taken[customer], self.used
        most = max(self.max_payload_bytes, (self.max_bytes - (used - own)) // 2)
        return used + size <= self.max_bytes and own + size <= most


@final
class Share:
    """What one stream has taken of it, request by request, the oldest first.

    Args:
        memory: all streams'.
        customer: whose stream it is.
    """

    def __init__(self, memory: RequestMemory, customer: str) -> None:
        self._memory, self._customer = memory, customer
        self._sizes: deque[int] = deque()
        self._closed = False

    def reserve(self, size: int) -> bool:
        """Take memory for the next request; False: there is not so much for this customer."""
        with self._memory.lock:
            if self._closed or not self._memory.has(self._customer, size):
                return False
            self._memory.taken[self._customer] += size
            self._sizes.append(size)
            return True

    def grow(self, size: int) -> None:
        """Count what the newest request takes beyond what was reserved, now that it is known.

        It has been taken already, so it is counted even where there is not so much.
        """
        with self._memory.lock:
            if self._sizes:
                self._memory.taken[self._customer] += size
                self._sizes[-1] += size

    def release(self) -> None:
        """Give back what the oldest request took."""
        with self._memory.lock:
            self._memory.taken[self._customer] -= self._sizes.popleft()

    def close(self) -> None:
        """Give everything back; nothing more can be taken."""
        with self._memory.lock:
            self._closed = True
            self._memory.taken[self._customer] -= sum(self._sizes)
            self._sizes.clear()
