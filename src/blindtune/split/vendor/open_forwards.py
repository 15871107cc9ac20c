"""Forwards of the U-shape that wait for their gradient, and the memory that they take meanwhile.

What a backward pass needs of a forward (autograd's graph) is hundreds of times larger than the
forward's inputs. So the inputs are kept until the gradient comes, and are bounded a job and a
customer (`VendorLimits`); graphs are kept for a number of tokens, of all jobs together, and no
longer than the customer's stream. A forward whose graph is gone is computed again: its dropout is
drawn from its number, and no step changes the weights before its gradient has come, so the
gradients are the same.

Shapes: T real tokens, D hidden.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import final

from torch import Tensor

Graph = tuple[Tensor, Tensor]
"""A forward's inputs and outputs [T, D], with all that lies between them."""


@dataclass(eq=False)
class OpenForward:
    """A forward whose gradient has not come."""

    hidden_TD: Tensor
    """As it was sent."""
    lengths: tuple[int, ...]

    @property
    def padded_tokens(self) -> int:
        """What the size of its graph goes by."""
        return len(self.lengths) * max(self.lengths)


@final
class Graphs:
    """The graphs of open forwards, of all jobs of a vendor; safe to use from several threads.

    Args:
        max_tokens: of forwards, with padding, whose graphs are kept; the latest one's always is.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._kept: dict[OpenForward, Graph] = {}  # the oldest first
        self._lock = threading.RLock()  # a stream may be ended by the collector, amid anything

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, opened: OpenForward, graph: Graph) -> None:
        """Keep a forward's graph; the oldest ones make room."""
        with self._lock:
            self._kept[opened] = graph
            kept = list(self._kept)
            tokens = sum(other.padded_tokens for other in kept)
            for other in kept[:-1]:
                if tokens <= self._max_tokens:
                    break
                tokens -= other.padded_tokens
                self._kept.pop(other, None)

    def take(self, opened: OpenForward) -> Graph | None:
        """A forward's graph, which is kept no longer; None: it is gone."""
        with self._lock:
            return self._kept.pop(opened, None)
