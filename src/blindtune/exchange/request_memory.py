"""Memory for requests that wait or are worked on, bounded for all streams of a server together."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import final


@dataclass(eq=False)
class RequestMemory:
    """So many bytes, and how many of them are taken."""

    max_bytes: int
    used: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@final
class Share:
    """What one stream has taken of it, request by request, the oldest first.

    Args:
        memory: all streams'.
    """

    def __init__(self, memory: RequestMemory) -> None:
        self._memory = memory
        self._sizes: deque[int] = deque()
        self._closed = False

    def reserve(self, size: int) -> bool:
        """Take memory for the next request; False: there is not so much."""
        with self._memory.lock:
            if self._closed or self._memory.used + size > self._memory.max_bytes:
                return False
            self._memory.used += size
            self._sizes.append(size)
            return True

    def grow(self, size: int) -> None:
        """Count what the newest request takes beyond what was reserved, now that it is known.

        It has been taken already, so it is counted even where there is not so much.
        """
        with self._memory.lock:
            if self._sizes:
                self._memory.used += size
                self._sizes[-1] += size

    def release(self) -> None:
        """Give back what the oldest request took."""
        with self._memory.lock:
            self._memory.used -= self._sizes.popleft()

    def close(self) -> None:
        """Give everything back; nothing more can be taken."""
        with self._memory.lock:
            self._closed = True
            self._memory.used -= sum(self._sizes)
            self._sizes.clear()
