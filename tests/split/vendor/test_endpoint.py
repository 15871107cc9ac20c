"""The page of metrics and health, asked in ways that it must not answer."""

import http.client
import re
import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

from blindtune.split.vendor import endpoint
from blindtune.split.vendor.endpoint import Endpoint

PAGE = b"all is well"
GOOD = b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n"


@pytest.fixture
def port():
    made = Endpoint("127.0.0.1", 0, {"/health": ("text/plain", lambda: PAGE)}, deadline_seconds=1.0)
    yield made.port
    made.close()


@contextmanager
def connected(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as side:
        yield side


def received(side):
    """All that comes until the end."""
    found = b""
    try:
        while more := side.recv(1 << 16):
            found += more
    except ConnectionResetError:
        pass
    return found


def ask(port, request):
    with connected(port) as side:
        try:
            side.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            return b""
        return received(side)


def test_honest_requests(port):
    answer = ask(port, GOOD)
    assert answer.startswith(b"HTTP/1.0 200 ")
    assert answer.endswith(b"\r\n\r\n" + PAGE)
    assert b"Python" not in answer
    assert ask(port, b"GET /health HTTP/1.0\r\n\r\n").endswith(PAGE)
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    client.request("GET", "/health", headers={"Accept": "*/*", "X-Empty": ""})
    assert client.getresponse().read() == PAGE
    client.close()
    for first in (1, 30):  # in two pieces
        with connected(port) as side:
            side.sendall(GOOD[:first])
            time.sleep(0.05)
            side.sendall(GOOD[first:])
            assert received(side).endswith(PAGE)


def head(*fields, line=b"GET /health HTTP/1.1"):
    return b"\r\n".join([line, b"Host: here", *fields]) + b"\r\n\r\n"


REFUSED = {
    "both lengths": (
        head(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + GOOD, 400,
    ),
    "both lengths, nothing more": (head(b"Content-Length: 0", b"Transfer-Encoding: chunked"), 400),
    "a length": (head(b"Content-Length: 3") + b"abc", 400),
    "two lengths": (head(b"Content-Length: 0", b"Content-Length: 9"), 400),
    "a hidden length": (head(b"Content-Length : 0"), 400),
    "chunks": (head(b"Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    "hidden chunks": (head(b"Transfer-Encoding:\x0bchunked"), 400),
    "folded": (head(b"X: a", b" Transfer-Encoding: chunked"), 400),
    "folded with a tab": (head(b"X: a", b"\tb"), 400),
    "pipelined": (GOOD + GOOD, 400),
    "pipelined, in part": (GOOD + b"GET /health HT", 400),
    "two hosts": (head(b"Host: there"), 400),
    "no name": (head(b": x"), 400),
    "no colon": (head(b"x"), 400),
    "zero byte": (head(b"X: a\0b"), 400),
    "CR within": (head(b"X: a\rb"), 400),
    "LF within": (head(b"X: a\nTransfer-Encoding: chunked"), 400),
    "bad method": (head(line=b"POST /health HTTP/1.1"), 405),
    "unknown method": (head(line=b"SMUGGLE /health HTTP/1.1"), 405),
    "HEAD": (head(line=b"HEAD /health HTTP/1.1"), 405),
    "small get": (head(line=b"get /health HTTP/1.1"), 405),
    "HTTP/0.9": (head(line=b"GET /health"), 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "two spaces": (head(line=b"GET  /health HTTP/1.1"), 400),
    "a target with a blank": (head(line=b"GET /health HTTP/1.1 HTTP/1.1"), 400),
    "another page": (head(line=b"GET /jobs HTTP/1.1"), 404),
    "up the tree": (head(line=b"GET /../health HTTP/1.1"), 404),
    "absolute": (head(line=b"GET http://here/health HTTP/1.1"), 404),
    "a query": (head(line=b"GET /health?x HTTP/1.1"), 404),
    "long header": (head(b"X: " + b"a" * 9000), 431),
    "many headers": (head(*[b"X%d: a" % n for n in range(1000)]), 431),
    "long target": (head(line=b"GET /" + b"a" * 9000 + b" HTTP/1.1"), 431),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_be_read_in_two_ways_is_refused(port, name):
    request, code = REFUSED[name]
    answer = ask(port, request)
    # What was not read resets the connection, and the reason may be lost on its way.
    assert answer.startswith(b"HTTP/1.0 %d " % code) or (answer == b"" and code == 431)
    assert len(re.findall(rb"HTTP/1\.0 \d", answer)) <= 1
    assert PAGE not in answer
    assert ask(port, GOOD).endswith(PAGE)


def fails_at_last(side):
    """Whether the other end has closed: what is sent to it comes back as an error."""
    for _ in range(10):
        try:
            side.sendall(GOOD)
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_later_bytes_are_no_second_request(port):
    with connected(port) as side:
        side.sendall(GOOD)
        answer = received(side)
        assert answer.count(PAGE) == 1
        assert fails_at_last(side)


def test_requests_that_do_not_end_are_closed_while_others_are_answered(port):
    begun = time.monotonic()
    with ExitStack() as stack:
        slow = [stack.enter_context(connected(port)) for _ in range(4)]
        slow[1].sendall(b"GET /health HTTP/1.1\r\n")
        slow[2].sendall(b"GET /health HTTP/1.1\n\n")
        answers = {}

        def drip():
            try:
                while True:
                    slow[3].sendall(b"X: a\r\n")
                    time.sleep(0.05)
            except OSError:
                answers["drip"] = time.monotonic() - begun

        dripping = threading.Thread(target=drip)
        dripping.start()
        assert ask(port, GOOD).endswith(PAGE)
        assert [received(side) for side in slow[:3]] == [b""] * 3
        dripping.join(10)
    assert 0.9 < answers["drip"] < 5
    assert time.monotonic() - begun < 5


def test_connections_are_bounded_and_come_free(port):
    with ExitStack() as stack:
        held = [stack.enter_context(connected(port)) for _ in range(endpoint.CONNECTIONS)]
        time.sleep(0.1)
        count = threading.active_count()
        begun = time.monotonic()
        for _ in range(20):
            assert ask(port, GOOD) == b""  # closed at once
        assert time.monotonic() - begun < 0.9
        assert threading.active_count() == count
        assert [received(side) for side in held] == [b""] * len(held)
    assert ask(port, GOOD).endswith(PAGE)


def test_who_does_not_read_is_left(monkeypatch):
    large = b"x" * (64 << 20)
    made = Endpoint("127.0.0.1", 0, {"/m": ("text/plain", lambda: large)}, deadline_seconds=0.3)
    with connected(made.port) as side:
        side.sendall(b"GET /m HTTP/1.1\r\n\r\n")
        time.sleep(0.8)
        assert len(received(side)) < len(large)
    made.close()


def test_a_page_that_fails_ends_one_request_only(capfd):
    pages = {"/good": ("text/plain", lambda: PAGE), "/bad": ("text/plain", lambda: 1 / 0)}
    made = Endpoint("127.0.0.1", 0, pages)
    for _ in range(endpoint.CONNECTIONS + 1):
        assert ask(made.port, b"GET /bad HTTP/1.1\r\n\r\n") == b""
    assert ask(made.port, b"GET /good HTTP/1.1\r\n\r\n").endswith(PAGE)
    made.close()
    assert capfd.readouterr().err == ""
