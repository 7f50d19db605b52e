from __future__ import annotations

import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.servers import LocalServer, QuietHandler

from fundamentallm.config.data import SourceConfig
from fundamentallm.data import built_in
from fundamentallm.data.sources import TextSource, read_source
from fundamentallm.errors import DataError
from fundamentallm.files import download as download_module
from fundamentallm.files.download import download

TEXT = "To be, or not to be.\nThat is the question: \N{GREEK SMALL LETTER ALPHA}\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Server(LocalServer):
    """A web server on loopback that answers every request with `body`."""

    def __init__(self) -> None:
        self.body = TEXT.encode()
        self.status = 200
        self.requests = 0
        server = self

        class Handler(QuietHandler):
            def answer(self) -> None:
                server.requests += 1
                self.send_response(server.status)
                self.send_header("Content-Length", str(len(server.body)))
                self.end_headers()
                self.wfile.write(server.body)

        super().__init__(Handler)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("FUNDAMENTALLM_TINYSHAKESPEARE_URL", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(built_in, "TINYSHAKESPEARE_SHA256", sha256(TEXT.encode()))
    yield server
    server.close()


def test_a_download_happens_once_and_is_kept(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    for _ in range(2):
        source = read_source("tinyshakespeare", cache_dir=cache)
        assert isinstance(source, TextSource)
        assert source.text == TEXT
        assert source.built_in
    assert server.requests == 1
    assert [file.read_bytes() for file in cache.iterdir()] == [TEXT.encode()]


def test_the_users_cache_is_where_the_system_says(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read_source("tinyshakespeare")
    assert (tmp_path / "fundamentallm" / "tinyshakespeare.txt").is_file()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    read_source("tinyshakespeare")
    assert (tmp_path / "home/.cache/fundamentallm/tinyshakespeare.txt").is_file()


@pytest.mark.skipif(os.name == "nt", reason="needs modes")
def test_what_is_kept_is_its_owners_alone(server: Server, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        read_source("tinyshakespeare", cache_dir=tmp_path / "deep" / "cache")
    finally:
        os.umask(before)
    (path,) = (tmp_path / "deep" / "cache").iterdir()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert not path.parent.parent.stat().st_mode & 0o022


def test_another_text_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    server.body = TEXT.encode() + b"one line more\n"
    with pytest.raises(DataError) as caught:
        read_source("tinyshakespeare", cache_dir=tmp_path)
    assert sha256(server.body) in caught.value.got
    assert sha256(TEXT.encode()) in caught.value.expected
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_copy_is_downloaded_again(server: Server, tmp_path: Path) -> None:
    read_source("tinyshakespeare", cache_dir=tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(TEXT.encode()[:-1])
    assert read_source("tinyshakespeare", cache_dir=tmp_path).text == TEXT
    assert kept.read_bytes() == TEXT.encode()


@pytest.mark.parametrize("status", [404, 503])
def test_a_failing_server_says_what_to_do(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    with pytest.raises(DataError) as caught:
        read_source("tinyshakespeare", cache_dir=tmp_path)
    assert str(status) in caught.value.got
    assert str(tmp_path) in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_no_network_says_what_to_do(server: Server, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(DataError) as caught:
        read_source("tinyshakespeare", cache_dir=tmp_path)
    assert caught.value.fix


def test_only_the_web_is_asked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT.encode())
    monkeypatch.setenv("FUNDAMENTALLM_TINYSHAKESPEARE_URL", text.as_uri())
    with pytest.raises(DataError, match="http"):
        read_source("tinyshakespeare", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("in_the_way", ["tinyshakespeare.txt", ""])
def test_a_cache_that_cannot_be_written_is_named(
    server: Server, tmp_path: Path, in_the_way: str
) -> None:
    cache = tmp_path / "cache"
    if in_the_way:
        (cache / in_the_way).mkdir(parents=True)
    else:
        cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        read_source("tinyshakespeare", cache_dir=cache)
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")]
    assert sorted(left) == ["cache", *(f"cache/{name}" for name in [in_the_way] if name)]


def test_a_full_disk_leaves_nothing_behind(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(DataError, match="No space left"):
        read_source("tinyshakespeare", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_kept_copy_needs_no_network(server: Server, tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare.txt").write_bytes(TEXT.encode())
    assert read_source("tinyshakespeare", cache_dir=tmp_path).text == TEXT
    assert server.requests == 0


def test_a_copy_that_cannot_be_read_is_downloaded_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tinyshakespeare.txt").write_bytes(TEXT.encode())

    def fail(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(download_module, "sha256_of", fail)
    assert read_source("tinyshakespeare", cache_dir=tmp_path).text == TEXT
    assert server.requests == 1


def test_an_answer_without_an_end_is_cut(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "LARGEST_DOWNLOAD", 10)
    with pytest.raises(DataError) as caught:
        read_source("tinyshakespeare", cache_dir=tmp_path)
    assert sha256(TEXT.encode()[:10]) in caught.value.got


def test_a_user_without_a_home_is_told_what_to_set(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        read_source("tinyshakespeare")


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", b"SSH-2.0\r\n"]
)
def test_a_broken_answer_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def respond() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=respond)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        monkeypatch.setenv("FUNDAMENTALLM_TINYSHAKESPEARE_URL", url)
        with pytest.raises(DataError, match="download"):
            read_source("tinyshakespeare", cache_dir=tmp_path)
        thread.join()
    # What came is a beginning to go on with, and nothing that opens.
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == ({"tinyshakespeare.txt.part": b"abc"} if b"abc" in answer else {})


def test_an_address_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUNDAMENTALLM_TINYSHAKESPEARE_URL", "http://[bad")
    with pytest.raises(DataError, match="download"):
        read_source("tinyshakespeare", cache_dir=tmp_path)


class RangeServer(Server):
    """Knows ranges, and breaks off an answer after `until` bytes of the body."""

    def __init__(self) -> None:
        super().__init__()
        self.until: int | None = None
        self.ranges: list[str | None] = []
        self.knows_ranges = True
        server = self

        def answer(handler: QuietHandler) -> None:
            wanted = handler.headers.get("Range")
            server.ranges.append(wanted)
            begin = int(wanted[len("bytes=") : -1]) if wanted and server.knows_ranges else 0
            if begin >= len(server.body):
                handler.send_response(416)
                handler.end_headers()
                return
            handler.send_response(206 if begin else 200)
            handler.send_header("Content-Length", str(len(server.body) - begin))
            handler.end_headers()
            handler.wfile.write(server.body[begin : server.until])

        self._server.RequestHandlerClass.do_GET = answer  # type: ignore[attr-defined]


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    server = RangeServer()
    server.body = bytes(range(256)) * 40
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.close()


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_broken_download_is_gone_on_with(
    ranges: RangeServer, tmp_path: Path, knows_ranges: bool
) -> None:
    path = tmp_path / "deep" / "file"
    ranges.knows_ranges = knows_ranges
    ranges.until = 6000
    with pytest.raises(DataError, match="6,000 of 10,240"):
        download(ranges.url, sha256(ranges.body), path)
    assert not path.exists()
    ranges.until = None
    assert download(ranges.url, sha256(ranges.body), path).read_bytes() == ranges.body
    assert ranges.ranges == [None, "bytes=6000-"]
    assert [kept.name for kept in path.parent.iterdir()] == ["file"]
    download(ranges.url, sha256(ranges.body), path)
    assert len(ranges.ranges) == 2  # kept


def test_a_beginning_of_something_else_is_dropped(ranges: RangeServer, tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(b"x" * 100)
    assert download(ranges.url, sha256(ranges.body), path).read_bytes() == ranges.body
    assert ranges.ranges == ["bytes=100-", None]


def test_a_beginning_that_is_the_whole_needs_no_more(ranges: RangeServer, tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(ranges.body)
    assert download(ranges.url, sha256(ranges.body), path).read_bytes() == ranges.body
    assert ranges.ranges == ["bytes=10240-"]


def test_a_source_is_an_address_with_its_hash(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceConfig(url=server.url + "?x=1", sha256=sha256(TEXT.encode()))
    for _ in range(2):
        assert read_source([source], cache_dir=tmp_path).text == TEXT
    assert server.requests == 1
    (kept,) = tmp_path.iterdir()
    assert kept.name == sha256(TEXT.encode())[:16] + "-input.txt"
    other = SourceConfig(url=server.url, sha256="0" * 64)
    with pytest.raises(DataError, match="wrong contents"):
        read_source([other], cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_a_path_with_a_hash_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    good = SourceConfig(path=str(path), sha256=sha256(TEXT.encode()))
    assert read_source([good]).text == TEXT
    bad = SourceConfig(path=str(path), sha256="0" * 64)
    with pytest.raises(DataError, match="does not have the SHA-256 in the configuration"):
        read_source([bad])


STARTS = int(os.environ.get("FUNDAMENTALLM_TEST_STARTS", "6"))
DOWNLOADS = """
import sys, time
from pathlib import Path
from fundamentallm.files.download import download
from fundamentallm.errors import FundamentaLLMError
for line in sys.stdin:
    url, sha256, path, delay = line.split()
    time.sleep(float(delay))
    try:
        print("kept", download(url, sha256, Path(path)).read_bytes()[:9].hex(), flush=True)
    except FundamentaLLMError as error:
        print("refused", error.what, flush=True)
"""


class SlowServer(LocalServer):
    """Answers several at once, a piece at a time, and knows ranges."""

    def __init__(self) -> None:
        self.body = b""
        server = self

        class Handler(QuietHandler):
            def answer(self) -> None:
                wanted = self.headers.get("Range")
                body = server.body
                begin = int(wanted[len("bytes=") : -1]) if wanted else 0
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(body) - begin))
                self.end_headers()
                step = max(1, len(body) // 7)
                for place in range(begin, len(body), step):
                    self.wfile.write(body[place : place + step])
                    self.wfile.flush()
                    time.sleep(random.random() * 0.01)

        super().__init__(Handler, at_once=True)


def test_two_runs_that_start_at_once_with_one_address_get_the_right_file(tmp_path: Path) -> None:
    """Random delays and sizes; some find what an earlier one left, or something else."""
    server = SlowServer()
    drawn = random.Random(7)
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", DOWNLOADS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    try:
        for number in range(STARTS):
            server.body = drawn.randbytes(drawn.choice([1, 1_000, 100_000, 3_000_000]))
            path = tmp_path / str(number) / "file"
            path.parent.mkdir()
            begun = drawn.randrange(3)
            if begun:
                left = server.body[: len(server.body) // 2] if begun == 1 else b"other"
                path.with_name("file.part").write_bytes(left)
            for worker in workers:
                assert worker.stdin is not None
                delay = drawn.choice([0, drawn.random() * 0.05])
                worker.stdin.write(f"{server.url} {sha256(server.body)} {path} {delay}\n")
                worker.stdin.flush()
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline().split() == ["kept", server.body[:9].hex()]
            assert path.read_bytes() == server.body
            assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
        server.close()


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_what_lies_where_a_download_begins_is_not_followed(
    kind: str, ranges: RangeServer, tmp_path: Path
) -> None:
    part, victim = tmp_path / "file.part", tmp_path / "victim"
    if kind == "link":
        victim.write_bytes(b"precious")
    if "link" in kind:
        part.symlink_to(victim)
    elif kind == "folder":
        part.mkdir()
    else:
        os.mkfifo(part)
    path = download(ranges.url, sha256(ranges.body), tmp_path / "file")
    assert path.read_bytes() == ranges.body
    assert not path.is_symlink()
    assert victim.exists() == (kind == "link")
    assert kind != "link" or victim.read_bytes() == b"precious"
