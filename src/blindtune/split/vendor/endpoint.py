"""Metrics and health over plain HTTP, for the vendor's own monitoring.

`GET /metrics` is Prometheus text, `GET /health` a JSON object; there is nothing else. Not
authenticated and not encrypted: it listens at this machine alone unless it is told otherwise.

One request a connection, of one form: a head of at most 8 KiB, whole within seconds, and nothing
after it. Whatever two readers could understand in two ways is refused, so that no proxy in front
of it can be made to see other requests than it does: a body, `Transfer-Encoding`, a second request
in the same bytes, folded lines, line ends without CR.
"""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, final

from blindtune.errors import ConfigError

Pages = Mapping[str, tuple[str, Callable[[], bytes]]]
"""Content type and content of every page, by its path."""
HEAD_BYTES = 8192
CONNECTIONS = 16
"""At once; further ones are closed."""
DEADLINE_SECONDS = 5.0
"""For a connection, from its first byte to its last."""
_END = b"\r\n\r\n"
_LINE = re.compile(rb"[!-~]+ [!-~]+ HTTP/1\.[01]")
_FIELD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*")  # RFC 9112, section 5


@final
class Endpoint:
    """Serves pages until it is closed.

    Args:
        host, port: where; port 0 takes any free one.
        pages: what.
        deadline_seconds: for a connection.

    Raises:
        ConfigError: the address is taken, or not this machine's.

    Attributes:
        port: where it listens.
    """

    def __init__(
        self, host: str, port: int, pages: Pages, *, deadline_seconds: float = DEADLINE_SECONDS
    ) -> None:
        facts = {"pages": pages, "deadline_seconds": deadline_seconds}
        handler = type("Handler", (_Handler,), facts)
        try:
            self._server = _Server((host, port), handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"metrics cannot be served at {host}:{port} ({error}): choose another metrics_port"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="blindtune-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """A thread a connection, and no more of them than CONNECTIONS."""

    daemon_threads = True
    request_queue_size = 2 * CONNECTIONS

    def __init__(self, *arguments: Any) -> None:
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, *_arguments: Any) -> None:
        """Say nothing: who asked is gone, and what was sent is not for the log."""


class _Handler(BaseHTTPRequestHandler):
    pages: Pages
    deadline_seconds: float
    server_version, sys_version = "blindtune", ""
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain"

    def handle(self) -> None:
        """One request, and the end."""
        self._end = time.monotonic() + self.deadline_seconds
        self.close_connection = True
        self.requestline, self.request_version, self.command = "", "HTTP/1.0", ""
        try:
            head = self._read_head()
            if refusal := _refusal(head):
                self.send_error(*refusal)
            else:
                self.rfile = io.BufferedReader(io.BytesIO(head))
                self.handle_one_request()
        except OSError:  # too slow, or gone
            return
        self.close_connection = True

    def _read_head(self) -> bytes:
        """Bytes up to the end of a head, or of what is allowed; TimeoutError after the deadline."""
        head = b""
        while _END not in head and len(head) <= HEAD_BYTES:
            self._allow_rest()
            if not (more := self.connection.recv(HEAD_BYTES + 1 - len(head))):
                break
            head += more
        self._allow_rest()
        return head

    def _allow_rest(self) -> None:
        """The rest of the connection's time, for the next reading or writing."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)

    def do_GET(self) -> None:
        found = self.pages.get(self.path)
        if found is None:
            self.send_error(404)
            return
        kind, content = found
        body = content()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing: these pages are read every few seconds."""


def _refusal(head: bytes) -> tuple[int, str] | None:
    """Code and reason, if this is anything but the head of a plain GET."""
    if len(head) > HEAD_BYTES:
        return 431, "a request has at most 8 KiB"
    if not head.endswith(_END) or head.count(_END) != 1:
        return 400, "expected one whole request, and nothing after it"
    line, *fields = head.removesuffix(_END).split(b"\r\n")
    if not _LINE.fullmatch(line) or not all(map(_FIELD.fullmatch, fields)):
        return 400, "expected a request of HTTP/1.0 or 1.1"
    if not line.startswith(b"GET "):
        return 405, "expected GET"
    names = [field.partition(b":")[0].lower() for field in fields]
    if b"content-length" in names or b"transfer-encoding" in names or names.count(b"host") > 1:
        return 400, "expected a request without a body, and one host"
    return None
