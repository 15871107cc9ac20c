"""Metrics and health over plain HTTP, for the vendor's own monitoring.

`GET /metrics` is Prometheus text, `GET /health` a JSON object; there is nothing else. Not
authenticated and not encrypted: it listens at this machine alone unless it is told otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, final

from blindtune.errors import ConfigError

Pages = Mapping[str, tuple[str, Callable[[], bytes]]]
"""Content type and content of every page, by its path."""


@final
class Endpoint:
    """Serves pages until it is closed.

    Args:
        host, port: where; port 0 takes any free one.
        pages: what.

    Raises:
        ConfigError: the address is taken, or not this machine's.

    Attributes:
        port: where it listens.
    """

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        handler = type("Handler", (_Handler,), {"pages": pages})
        try:
            self._server = ThreadingHTTPServer((host, port), handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"metrics cannot be served at {host}:{port} ({error}): choose another metrics_port"
            ) from error
        self._server.daemon_threads = True
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


class _Handler(BaseHTTPRequestHandler):
    pages: Pages
    timeout = 10  # seconds for a request to be made; nobody holds a thread for longer

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
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing: these pages are read every few seconds."""
