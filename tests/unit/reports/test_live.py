"""The page that is served: to this machine alone, and always of the present."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from fundamentallm.errors import CheckpointError
from fundamentallm.reports.live import LivePage


class Pages:
    def __init__(self) -> None:
        self.version = 1
        self.made = 0

    def make(self) -> bytes:
        self.made += 1
        return f"version {self.version}".encode()


@pytest.fixture
def pages() -> Pages:
    return Pages()


@pytest.fixture
def server(pages: Pages) -> Iterator[LivePage]:
    with LivePage(pages.make, lambda: pages.version) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: LivePage, path: str = "/", host: str = "") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        host = host or f"127.0.0.1:{server.server_port}"
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_the_page_is_made_again_only_when_something_changed(server: LivePage, pages: Pages) -> None:
    assert [get(server) for _ in range(3)] == [(200, b"version 1")] * 3
    assert pages.made == 1
    pages.version = 2
    assert get(server) == (200, b"version 2")


def test_only_this_machine_is_served(server: LivePage) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, host="attacker.example")[0] == 403
    assert get(server, host=f"attacker.example:{server.server_port}")[0] == 403
    assert get(server, host=f"localhost:{server.server_port}")[0] == 200


def test_nothing_else_is_served(server: LivePage) -> None:
    assert get(server, "/config.yaml")[0] == 404
    assert get(server, "/../../etc/passwd")[0] == 404


def test_a_run_that_cannot_be_read_now_is_no_end(
    server: LivePage, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> int:
        raise CheckpointError("there is no run or checkpoint here")

    monkeypatch.setattr(server, "_stamp", gone)
    assert get(server)[0] == 503
    monkeypatch.setattr(server, "_stamp", lambda: pages.version)
    assert get(server) == (200, b"version 1")


def test_a_browser_that_hangs_up_is_not_told(
    server: LivePage, pages: Pages, capfd: pytest.CaptureFixture[str]
) -> None:
    entered, left = threading.Event(), threading.Event()

    def slow() -> int:
        entered.set()
        left.wait(10)
        return 1

    server._stamp = slow
    request = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.sendall(request.encode())
        assert entered.wait(10)
        at_once = struct.pack("ii", 1, 0)  # the connection is reset
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    left.set()
    assert get(server)[0] == 200
    for thread in threading.enumerate():
        if thread.name.endswith("(process_request_thread)"):
            thread.join(10)
    assert capfd.readouterr().err == ""
