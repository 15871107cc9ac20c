"""Clients that mean harm, made of bytes: TCP, TLS and HTTP/2 by hand, as no library sends them.

Each kind is a function that opens one connection to a `Target`, does its harm, and holds on until
the server ends it or `stop` is set. It returns how the connection ended: "closed" by the server,
"refused" by a gRPC status, or "open" when it was told to stop.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
STREAM, HEALTH = b"/blindtune.Exchange/Stream", b"/blindtune.Exchange/Health"
DATA, HEADERS, RESET, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)
STEP_SECONDS = 0.05
"""Between two bytes of a slow sender, and between two bursts of a fast one."""
BURST = 50


@dataclass(frozen=True)
class Target:
    """A server at this machine."""

    port: int
    certificate: Path
    """In PEM: its own only root."""
    token: str = ""
    """Of a customer who means harm; other kinds have none."""

    def plain(self) -> socket.socket:
        """A TCP connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def secured(self) -> ssl.SSLSocket:
        """A TLS connection on which nothing was said yet."""
        context = ssl.create_default_context(cafile=self.certificate)
        context.set_alpn_protocols(["h2"])
        return context.wrap_socket(self.plain(), server_hostname="127.0.0.1")

    def greeted(self, settings: bytes = b"") -> ssl.SSLSocket:
        """A connection on which HTTP/2 has begun."""
        side = self.secured()
        side.sendall(PREFACE + frame(SETTINGS, 0, 0, settings))
        return side


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """One frame of HTTP/2 (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def field(name: bytes, value: bytes) -> bytes:
    """A header field: literal, not indexed, not compressed (RFC 7541, section 6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def call(path: bytes, stream: int, token: str = "", flags: int = END_HEADERS) -> bytes:
    """The headers that begin a gRPC call."""
    fields = {
        b":method": b"POST", b":scheme": b"https", b":path": path, b":authority": b"127.0.0.1",
        b"te": b"trailers", b"content-type": b"application/grpc",
    }  # fmt: skip
    if token:
        fields[b"authorization"] = b"Bearer " + token.encode()
    body = b"".join(field(name, value) for name, value in fields.items())
    return frame(HEADERS, flags, stream, body)


def message(stream: int, content: bytes) -> bytes:
    """One gRPC message in one frame."""
    return frame(DATA, 0, stream, b"\x00" + struct.pack(">I", len(content)) + content)


def hold(side: socket.socket, stop: threading.Event, sending=(), *, answers: bool = False) -> str:
    """Send piece by piece, and read until the server ends it.

    Args:
        side: the connection.
        stop: when to give up.
        sending: bytes, one after the other every STEP_SECONDS.
        answers: acknowledge settings and pings, as an honest client does.
    """
    pieces, got = iter(sending), b""
    try:
        side.settimeout(STEP_SECONDS)
        while not stop.is_set():
            began = time.monotonic()
            try:
                if not (more := side.recv(1 << 16)):
                    return "refused" if b"grpc-status" in got else "closed"
            except TimeoutError:
                more = b""
            got = (got + more)[-4096:]
            if answers and more:
                side.sendall(acknowledge(more))
            if (piece := next(pieces, None)) is not None:
                side.sendall(piece)
                stop.wait(max(0.0, STEP_SECONDS - (time.monotonic() - began)))
    except OSError:
        return "refused" if b"grpc-status" in got else "closed"
    finally:
        side.close()
    return "open"


def acknowledge(received: bytes) -> bytes:
    """Answers to the settings and pings of some bytes that hold whole frames of them."""
    answers = [frame(SETTINGS, ACK, 0, b"")] if b"\x04\x00\x00\x00\x00\x00" in received else []
    pings = re.findall(rb"\x00\x00\x08\x06\x00\x00\x00\x00\x00(.{8})", received, re.DOTALL)
    return b"".join([*answers, *(frame(PING, ACK, 0, ping) for ping in pings)])


def bytewise(whole: bytes) -> list[bytes]:
    """One byte at a time."""
    return [whole[i : i + 1] for i in range(len(whole))]


def bursts(make, stop: threading.Event):
    """What `make` makes of 0, 1, 2, ..., BURST at a time."""
    number = 0
    while not stop.is_set():
        yield b"".join(make(n) for n in range(number, number + BURST))
        number += BURST


def no_handshake(target, stop):
    """TCP, and nothing else."""
    return hold(target.plain(), stop)


def slow_handshake(target, stop):
    """TLS byte by byte."""
    return hold(target.plain(), stop, bytewise(CLIENT_HELLO))


def silent(target, stop):
    """TLS, and nothing else."""
    return hold(target.secured(), stop)


def idle(target, stop):
    """A connection without a call, as an honest client would keep it."""
    return hold(target.greeted(), stop, answers=True)


def slow_call(target, stop):
    """A call whose headers come byte by byte."""
    return hold(target.greeted(), stop, bytewise(call(STREAM, 1, "x" * 100)))


def endless_headers(target, stop):
    """Headers that never end."""
    body = field(b"x", b"v" * 100) * 100
    side = target.greeted()
    side.sendall(frame(HEADERS, 0, 1, body))
    return hold(side, stop, bursts(lambda _: frame(CONTINUATION, 0, 1, body), stop))


def no_message(target, stop):
    """Health checks, as many as a connection takes, whose message never comes."""
    side = target.greeted()
    side.sendall(b"".join(call(HEALTH, 2 * n + 1) for n in range(70)))
    return hold(side, stop, answers=True)


def no_window(target, stop):
    """Calls whose answers it never has room for."""
    side = target.greeted(struct.pack(">HI", 4, 0))  # SETTINGS_INITIAL_WINDOW_SIZE
    token = target.token or "x" * 43
    side.sendall(b"".join(call(STREAM, 2 * n + 1, token) for n in range(70)))
    return hold(side, stop, answers=True)


def wrong_tokens(target, stop):
    """Calls with tokens that are guessed."""
    guess = os.urandom(16).hex()
    make = lambda n: call(STREAM, 2 * n + 1, f"{guess}{n:08}", END_HEADERS | END_STREAM)  # noqa: E731
    return hold(target.greeted(), stop, bursts(make, stop), answers=True)


def rapid_reset(target, stop):
    """Calls that are taken back at once (CVE-2023-44487)."""

    def make(n):
        return call(STREAM, 2 * n + 1, "x" * 43) + frame(RESET, 0, 2 * n + 1, b"\0\0\0\x08")

    return hold(target.greeted(), stop, bursts(make, stop), answers=True)


def pings(target, stop):
    """A flood of pings."""
    return hold(target.greeted(), stop, bursts(lambda n: frame(PING, 0, 0, b"%8d" % n), stop))


def settings(target, stop):
    """A flood of settings."""
    return hold(target.greeted(), stop, bursts(lambda _: frame(SETTINGS, 0, 0, b""), stop))


def empty_data(target, stop):
    """A flood of frames that hold nothing."""
    side = target.greeted()
    side.sendall(call(HEALTH, 1))
    return hold(side, stop, bursts(lambda _: frame(DATA, 0, 1, b""), stop))


def large_message(target, stop):
    """A message that says it is 4 GB."""
    side = target.greeted()
    side.sendall(call(STREAM, 1, target.token) + frame(DATA, 0, 1, b"\x00\xff\xff\xff\xff" + b"x"))
    return hold(side, stop, answers=True)


def garbage(target, stop):
    """Random bytes in the place of HTTP/2."""
    side = target.secured()
    side.sendall(os.urandom(1000))
    return hold(side, stop)


def plain_http(target, stop):
    """HTTP/1.1 in the place of TLS."""
    side = target.plain()
    side.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return hold(side, stop)


def greedy(target, stop):
    """A customer who opens streams without end."""
    make = lambda n: call(STREAM, 2 * n + 1, target.token)  # noqa: E731
    return hold(target.greeted(), stop, bursts(make, stop), answers=True)


def slow_message(target, stop):
    """A customer whose message comes byte by byte."""
    side = target.greeted()
    side.sendall(call(STREAM, 1, target.token))
    pieces = (frame(DATA, 0, 1, byte) for byte in bytewise(bytes(5000)))
    return hold(side, stop, pieces, answers=True)


STRANGERS = {
    "no handshake": no_handshake, "slow handshake": slow_handshake, "silent": silent,
    "idle": idle, "slow call": slow_call, "endless headers": endless_headers,
    "no message": no_message, "no window": no_window, "wrong tokens": wrong_tokens,
    "rapid reset": rapid_reset, "pings": pings, "settings": settings, "empty data": empty_data,
    "large message": large_message, "garbage": garbage, "plain http": plain_http,
}  # fmt: skip
"""Kinds that need no token."""
CUSTOMERS = {
    "greedy": greedy, "slow message": slow_message, "no window, token": no_window,
    "large message, token": large_message,
}  # fmt: skip
"""Kinds that come with one."""
KINDS = STRANGERS | CUSTOMERS


def keep_on(target: Target, kind: str, stop: threading.Event, endings: Counter) -> None:
    """One client of a kind, again and again; counts how its connections ended."""
    while not stop.is_set():
        try:
            endings[KINDS[kind](target, stop)] += 1
        except OSError:  # not even a connection, or not until there was harm done
            endings["closed"] += 1
        stop.wait(4 * STEP_SECONDS)


def hold_many(target: Target, count: int, stop: threading.Event) -> Counter:
    """Idle connections at once, until `stop`; how many the server had closed by then."""
    sides, endings = [], Counter()
    try:
        for _ in range(count):
            sides.append(target.greeted())
        print("open", flush=True)
        stop.wait()
        for side in sides:
            side.settimeout(0.0)
            endings[still(side)] += 1
    finally:
        for side in sides:
            side.close()
    return endings


def still(side: ssl.SSLSocket) -> str:
    """Whether a connection from which nobody read is "open", or was "closed"."""
    try:
        while side.recv(1 << 16):
            pass
    except ssl.SSLWantReadError:
        return "open"
    except OSError:
        pass
    return "closed"


def main() -> None:
    """Clients as a line of JSON on stdin says, until stdin ends; prints how connections ended."""
    asked = json.loads(sys.stdin.readline())
    target = Target(asked["port"], Path(asked["certificate"]), asked.get("token", ""))
    stop, endings = threading.Event(), {kind: Counter() for kind in asked["clients"]}
    threads = [
        threading.Thread(target=keep_on, args=(target, kind, stop, endings[kind]))
        for kind, count in asked["clients"].items()
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    waiting = threading.Thread(target=lambda: (sys.stdin.read(), stop.set()))
    waiting.start()
    if asked.get("idle"):
        endings["idle at once"] = hold_many(target, asked["idle"], stop)
    for thread in [waiting, *threads]:
        thread.join()
    print(json.dumps(endings))


if __name__ == "__main__":
    main()
