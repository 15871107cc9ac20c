"""A network that fails, between a customer and a vendor: a TCP proxy with faults.

`FaultProxy` forwards bytes between TCP connections and does to some chunks what its fault says.
TLS is inside: what alters bytes must cost the connection and nothing else. Every draw comes from
the seed, in the order in which chunks come by; how TCP cuts them is the machine's affair.
"""

from __future__ import annotations

import random
import socket
import struct
import threading

CHUNK_BYTES = 16_384
QUIET_SECONDS = 0.05
"""A chunk that is held back for the next one waits no longer than this."""
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once, with a reset


class FaultProxy:
    """Forwards connections of 127.0.0.1 to a port; one chunk in about `gap` suffers.

    Args:
        port: where the vendor listens.
        fault: one of FAULTS.
        seed: of all draws.
        gap: chunks between two faults, on average.
        limit: after so many faults the network is a good one.

    Attributes:
        port: where customers call.
        injected: faults so far.
        connections: customers' connections so far.
    """

    def __init__(self, port: int, fault: str, *, seed: int, gap: int, limit: int) -> None:
        self._target, self._fault, self._gap = port, FAULTS[fault], gap
        self._draw, self._limit = random.Random(f"{fault} {seed}"), limit
        self._lock = threading.Lock()
        self._links: list[Link] = []
        self._left = self._next()
        self.injected, self.connections = 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close everything and wait for the threads."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._links:
            link.closing.set()
            link.kept = None
            link.end(reset=True)
        for thread in self._threads:
            thread.join(10)

    def suffers(self) -> float | None:
        """Whether the chunk that comes by now has a fault: a number in [0, 1) for its kind."""
        with self._lock:
            self._left -= 1
            if self._left > 0 or self.injected >= self._limit:
                return None
            self._left = self._next()
            self.injected += 1
            return self._draw.random()

    def _next(self) -> int:
        return self._draw.randint(1, 2 * self._gap - 1)

    def _accept(self) -> None:
        while True:
            try:
                customer, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                vendor = socket.create_connection(("127.0.0.1", self._target), timeout=10)
            except OSError:  # the vendor is away
                customer.close()
                continue
            vendor.settimeout(None)
            link = Link(customer, vendor)
            self._links.append(link)
            for source, sink in ((customer, vendor), (vendor, customer)):
                work = threading.Thread(
                    target=self._forward, args=(link, source, sink), daemon=True
                )
                self._threads.append(work)
                work.start()

    def _forward(self, link: Link, source: socket.socket, sink: socket.socket) -> None:
        try:
            while chunk := source.recv(CHUNK_BYTES):
                if link.silent.is_set():
                    continue
                kind = self.suffers()
                if kind is None:
                    sink.sendall(chunk)
                elif not self._fault(link, source, sink, chunk, kind):
                    return
            link.end(reset=False)
        except OSError:
            link.end(reset=False)


class Link:
    """One customer's connection and the one to the vendor that belongs to it."""

    def __init__(self, customer: socket.socket, vendor: socket.socket) -> None:
        self.customer, self.vendor = customer, vendor
        self.silent = threading.Event()
        """Whatever comes from now on is swallowed, and nobody is told."""
        self.closing = threading.Event()
        self.kept: socket.socket | None = None
        """The side that is never told that the other one is gone."""

    def end(self, *, reset: bool) -> None:
        """Close both sides, in good order or not."""
        for side in (self.customer, self.vendor):
            if side is not self.kept:
                close(side, reset=reset)


def close(side: socket.socket, *, reset: bool) -> None:
    """End one side, and wake up who reads from it."""
    try:
        if reset:
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            side.shutdown(socket.SHUT_RD)
        else:
            side.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    if reset:
        side.close()


# What happens to a chunk, given a number in [0, 1); False: the connection is over.


def delay(link, _source, sink, chunk, kind):
    """Mostly shorter than a customer waits for a reply, now and then longer."""
    link.closing.wait(0.1 * kind if kind < 0.9 else 1.5)
    sink.sendall(chunk)
    return True


def loss(link, _source, _sink, _chunk, _kind):
    """Nothing arrives any more in either direction, until the customer gives the connection up."""
    link.silent.set()
    return True


def truncation(link, _source, sink, chunk, kind):
    """A part arrives, then an orderly end."""
    sink.sendall(chunk[: int(len(chunk) * kind)])
    link.end(reset=False)
    return False


def reset(link, _source, _sink, _chunk, _kind):
    """Both sides see `connection reset by peer`."""
    link.end(reset=True)
    return False


def half_open(link, _source, _sink, _chunk, kind):
    """One side is gone, and the other believes that it is still there."""
    link.silent.set()
    link.kept = link.customer if kind < 0.5 else link.vendor
    link.end(reset=True)
    return True


def duplication(_link, _source, sink, chunk, _kind):
    """The same bytes again."""
    sink.sendall(chunk + chunk)
    return True


def reordering(_link, source, sink, chunk, kind):
    """The next bytes first; its own halves the other way round where no more come."""
    source.settimeout(QUIET_SECONDS)
    try:
        later = source.recv(CHUNK_BYTES)
    except TimeoutError:
        middle = 1 + int((len(chunk) - 1) * kind)
        chunk, later = chunk[:middle], chunk[middle:]
    finally:
        source.settimeout(None)
    sink.sendall(later + chunk)
    return True


def alteration(_link, _source, sink, chunk, kind):
    """One bit is another one."""
    spoilt = bytearray(chunk)
    spoilt[int(len(chunk) * kind)] ^= 1 << int(kind * 64) % 8
    sink.sendall(bytes(spoilt))
    return True


FAULTS = {
    "delay": delay, "loss": loss, "truncation": truncation, "reset": reset,
    "half-open": half_open, "duplication": duplication, "reordering": reordering,
    "alteration": alteration,
}  # fmt: skip
