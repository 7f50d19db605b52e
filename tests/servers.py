"""A web server of this machine for a test, in a thread."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer


class QuietHandler(BaseHTTPRequestHandler):
    """Logs nothing; a subclass has `answer`, for GET."""

    def do_GET(self) -> None:
        """Answer."""
        self.answer()

    def answer(self) -> None:
        """Send what is asked for."""
        raise NotImplementedError

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on standard error."""


class LocalServer:
    """Answers on loopback until it is closed.

    Args:
        handler: answers a request.
        at_once: answer several requests at the same time.

    Attributes:
        host: its address and port.
        url: of a file there.
    """

    def __init__(self, handler: type[QuietHandler], at_once: bool = False) -> None:
        self._server = (ThreadingHTTPServer if at_once else HTTPServer)(("127.0.0.1", 0), handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}/input.txt"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        """Stop, and wait for the thread."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
