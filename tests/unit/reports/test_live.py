"""The page that is served: to this machine alone, and always of the present."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator

import pytest

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
