"""Serve a page on this machine that follows its runs; nothing else is served."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fundamentallm.errors import FundamentaLLMError

LOOPBACK = "127.0.0.1"


class LivePage(ThreadingHTTPServer):
    """A server of one page, at / of a loopback address.

    Requests under another host name are refused, so that a page from elsewhere cannot read it by
    a name that it lets point to this machine.

    Args:
        make: makes the page.
        stamp: returns something that changes when the page would; the page is made again then.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(
        self, make: Callable[[], bytes], stamp: Callable[[], Hashable], port: int = 0
    ) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self._make, self._stamp = make, stamp
        self._lock = threading.Lock()
        self._made: tuple[Hashable, bytes] | None = None

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def content(self) -> bytes:
        """Return the page as it is now."""
        with self._lock:
            stamp = self._stamp()
            if self._made is None or self._made[0] != stamp:
                self._made = stamp, self._make()
            return self._made[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing if a browser hung up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: LivePage

    def do_GET(self) -> None:
        """Answer with the page."""
        if self.headers.get("Host") not in {
            f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")
        }:
            self.send_error(403)
            return
        if self.path != "/":
            self.send_error(404)
            return
        try:
            content = self.server.content()
        except (OSError, FundamentaLLMError):  # a run was moved away, or is being replaced
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing for a request."""
