from __future__ import annotations

import gzip
import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundamentallm.data import corpus as corpus_module
from fundamentallm.data.corpus import SOURCES, read_source, split_tokens
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.errors import ConfigError, DataError

TEXT = "To be, or not to be.\nThat is the question: \N{GREEK SMALL LETTER ALPHA}\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# files and folders


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("one\r\ntwo\rthree\n\u00e9".encode())
    corpus = read_source(str(path))
    assert corpus.text == "one\r\ntwo\rthree\n\u00e9"
    assert corpus.sha256 == sha256(path.read_bytes())
    assert [tuple(piece) for piece in corpus.pieces] == [(str(path), 0, len(corpus.text))]
    assert not corpus.built_in
    assert corpus.tokens is None
    assert corpus.tokenizer is None


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert read_source(str(path)).text == TEXT
    assert read_source(str(path)).sha256 == sha256(TEXT.encode())


def test_files_are_joined_in_the_order_given(tmp_path: Path) -> None:
    for name, text in (("a.txt", "first\n"), ("b.txt", "second\n"), ("c.txt", "third\n")):
        (tmp_path / name).write_text(text)
    sources = [str(tmp_path / name) for name in ("c.txt", "a.txt", "b.txt")]
    corpus = read_source(sources)
    assert corpus.text == "third\nfirst\nsecond\n"
    assert [origin for origin, _, _ in corpus.pieces] == sources
    for origin, start, length in corpus.pieces:
        assert corpus.text[start : start + length] == Path(origin).read_text()


def test_a_folder_is_its_text_files_sorted_by_path(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("z.txt", "a.md", "deep/b.txt", "deep/er/c.txt"):
        (tmp_path / name).write_text(name + "\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    corpus = read_source(str(tmp_path))
    assert corpus.text == "a.md\ndeep/b.txt\ndeep/er/c.txt\nz.txt\n"


def test_the_home_directory_may_be_written_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert read_source("~/text.txt").text == TEXT


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        read_source(str(tmp_path / "nowhere.txt"))


def test_a_mistyped_built_in_name_gets_a_hint() -> None:
    with pytest.raises(DataError, match="did you mean 'python-docs'"):
        read_source("python-doc")


@pytest.mark.parametrize("content", ["", " \n\t\r\n"])
def test_a_file_without_text_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=r"empty\.txt.*text"):
        read_source(str(path))


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2\n")
    with pytest.raises(DataError, match=r"\.txt or \.md"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_that_is_not_utf8_says_at_which_byte(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(mark + b"caf\xe9 au lait")
    with pytest.raises(DataError) as caught:
        read_source(str(path))
    assert f"byte {len(mark) + 3}" in caught.value.where
    assert "0xe9" in caught.value.got


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_wide_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "wide.txt"
    path.write_bytes("plain words".encode(encoding))
    with pytest.raises(DataError, match="UTF"):
        read_source(str(path))


def test_a_nul_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "binary.txt"
    path.write_bytes("caf\u00e9".encode() + b"\0rest")
    with pytest.raises(DataError, match="byte 5"):
        read_source(str(path))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (gzip.compress(TEXT.encode()), "gzip"),
        (b"PK\x03\x04rest of an archive", "zip"),
        (b"PAR1rest of a table", "parquet"),
    ],
)
def test_packed_data_named_txt_is_told(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / "packed.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"(?i){kind}"):
        read_source(str(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    path = tmp_path / "pipe.txt"
    os.mkfifo(path)
    with pytest.raises(DataError, match="regular file"):
        read_source(str(path))


def test_a_device_is_refused() -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("needs device files")
    with pytest.raises(DataError, match="regular file"):
        read_source("/dev/zero")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything"
)
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text(TEXT, encoding="utf-8")
    path.chmod(0)
    with pytest.raises(DataError, match=r"secret\.txt"):
        read_source(str(path))


def test_a_failure_while_reading_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")

    def fail(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DataError) as caught:
        read_source(str(path))
    assert str(path) in caught.value.where
    assert "Permission denied" in str(caught.value)


# built-in sources


def test_the_python_documentation_is_every_topic_in_order() -> None:
    corpus = read_source("python-docs")
    assert corpus.built_in
    assert corpus.sha256 == sha256(corpus.text.encode())
    assert len(corpus.text) > 300_000
    place = -1
    for name in sorted(topics):
        place = corpus.text.find(topics[name].strip(), place + 1)
        assert place >= 0, name


def test_a_kept_copy_of_a_built_in_text_has_the_same_hash(tmp_path: Path) -> None:
    corpus = read_source("python-docs")
    copy = tmp_path / "corpus.txt"
    copy.write_text(corpus.text, encoding="utf-8", newline="")
    again = read_source(str(copy))
    assert again.sha256 == corpus.sha256
    assert again.text == corpus.text


def test_a_source_of_yours_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOURCES, "_factories", dict(SOURCES._factories))
    SOURCES.register("mine")(lambda: TEXT)
    corpus = read_source("mine")
    assert corpus.text == TEXT
    assert corpus.built_in


def test_a_configuration_cannot_choose_the_cache() -> None:
    with pytest.raises(ConfigError):
        SOURCES.check("tinyshakespeare", {"cache_dir": "/tmp/elsewhere"})


class Server:
    """A web server on loopback that answers every request with `body`."""

    def __init__(self) -> None:
        self.body = TEXT.encode()
        self.status = 200
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests += 1
                self.send_response(server.status)
                self.send_header("Content-Length", str(len(server.body)))
                self.end_headers()
                self.wfile.write(server.body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/input.txt"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("FUNDAMENTALLM_TINYSHAKESPEARE_URL", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(corpus_module, "TINYSHAKESPEARE_SHA256", sha256(TEXT.encode()))
    yield server
    server.close()


def test_a_download_happens_once_and_is_kept(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    for _ in range(2):
        corpus = read_source("tinyshakespeare", cache_dir=cache)
        assert corpus.text == TEXT
        assert corpus.built_in
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


def test_a_failing_server_says_what_to_do(server: Server, tmp_path: Path) -> None:
    server.status = 503
    with pytest.raises(DataError) as caught:
        read_source("tinyshakespeare", cache_dir=tmp_path)
    assert "503" in caught.value.got
    assert str(tmp_path) in caught.value.fix


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


def test_a_cache_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        read_source("tinyshakespeare", cache_dir=tmp_path / "file")


# token files


def save_tokens(folder: Path, tokens: np.ndarray) -> str:
    np.save(folder / "train.npy", tokens)
    CharacterTokenizer("abc").save(folder / "tokenizer.json")
    return str(folder / "train.npy")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", ">u2"])
def test_a_token_file_is_mapped_with_its_tokenizer(tmp_path: Path, dtype: str) -> None:
    path = save_tokens(tmp_path, np.array([0, 2, 1], dtype=dtype))
    corpus = read_source(path)
    assert isinstance(corpus.tokens, np.memmap)
    assert not corpus.tokens.flags.writeable
    assert corpus.tokens.tolist() == [0, 2, 1]
    assert corpus.tokenizer is not None
    assert corpus.tokenizer.decode(corpus.tokens) == "acb"


def test_token_files_of_other_contents_have_other_hashes(tmp_path: Path) -> None:
    first = read_source(save_tokens(tmp_path, np.array([0, 1, 2], dtype=np.uint8))).sha256
    second = read_source(save_tokens(tmp_path, np.array([0, 2, 1], dtype=np.uint8))).sha256
    assert first != second


@pytest.mark.parametrize("bad", [3, -1, 255])
def test_an_id_outside_the_vocabulary_is_found_with_its_place(tmp_path: Path, bad: int) -> None:
    tokens = np.zeros(10, dtype=np.int16)
    tokens[7] = bad
    with pytest.raises(DataError) as caught:
        read_source(save_tokens(tmp_path, tokens))
    assert "token 7" in caught.value.where
    assert caught.value.got == str(bad)
    assert "0 to 2" in caught.value.expected


def test_an_id_beyond_the_first_chunk_is_found(tmp_path: Path) -> None:
    tokens = np.zeros((1 << 22) + 10, dtype=np.uint8)
    tokens[-2] = 9
    with pytest.raises(DataError, match=f"token {len(tokens) - 2:,}"):
        read_source(save_tokens(tmp_path, tokens))


@pytest.mark.parametrize(
    "tokens", [np.zeros((2, 3), dtype=np.uint8), np.zeros(3), np.array(["a"]), np.array(1)]
)
def test_an_array_of_anything_else_is_refused(tmp_path: Path, tokens: np.ndarray) -> None:
    with pytest.raises(DataError):
        read_source(save_tokens(tmp_path, tokens))


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_source(save_tokens(tmp_path, np.array([{}, None], dtype=object)))


def test_a_token_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = Path(save_tokens(tmp_path, np.zeros(100, dtype=np.uint16)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train\.npy"):
        read_source(str(path))


def test_a_token_file_needs_its_tokenizer(tmp_path: Path) -> None:
    path = save_tokens(tmp_path, np.zeros(3, dtype=np.uint8))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        read_source(path)


# splits


@settings(deadline=None)
@given(
    num_tokens=st.integers(min_value=0, max_value=3000),
    parts=st.tuples(
        st.integers(min_value=1, max_value=100),
        st.integers(min_value=0, max_value=100),
        st.integers(min_value=0, max_value=100),
    ),
)
def test_splits_are_views_that_cover_the_tokens_in_order(
    num_tokens: int, parts: tuple[int, int, int]
) -> None:
    tokens = np.arange(num_tokens)
    fractions = [part / sum(parts) for part in parts]
    splits = split_tokens(tokens, fractions)
    assert list(splits) == ["train", "val", "test"]
    joined = np.concatenate(list(splits.values()))
    assert joined.tolist() == tokens.tolist()
    for fraction, split in zip(fractions, splits.values(), strict=True):
        assert abs(len(split) - fraction * num_tokens) <= 1
        assert len(split) == 0 if fraction == 0 else True
        assert len(split) == 0 or np.shares_memory(split, tokens)


def test_the_usual_split_of_tinyshakespeare() -> None:
    splits = split_tokens(np.zeros(1_115_394, dtype=np.uint8), (0.9, 0.1, 0.0))
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 1_003_854,
        "val": 111_540,
        "test": 0,
    }


def test_a_memory_map_is_split_without_reading_it(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(10, dtype=np.uint16))
    tokens = np.load(tmp_path / "ids.npy", mmap_mode="r")
    assert all(
        isinstance(split, np.memmap) for split in split_tokens(tokens, (0.5, 0.3, 0.2)).values()
    )


# what must not end in a traceback or wait


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
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUNDAMENTALLM_TINYSHAKESPEARE_URL", "http://[bad")
    with pytest.raises(DataError, match="download"):
        read_source("tinyshakespeare", cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_a_path_that_no_system_takes_is_refused(name: str) -> None:
    with pytest.raises(DataError):
        read_source(name)


def test_a_link_to_nowhere_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"b\.txt"):
        read_source(str(tmp_path))


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="locked"):
        read_source(str(tmp_path))


def test_a_built_in_text_may_stand_in_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    corpus = read_source([str(tmp_path / "a.txt"), "python-docs"])
    assert corpus.text == "text\n" + read_source("python-docs").text
    assert [tuple(piece)[:2] for piece in corpus.pieces][1] == ("python-docs", 5)
    assert corpus.built_in  # so that the run keeps a copy


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04rest of an archive"])
def test_a_file_that_is_no_array_is_refused(tmp_path: Path, content: bytes) -> None:
    path = Path(save_tokens(tmp_path, np.zeros(3, dtype=np.uint8)))
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.npy"):
        read_source(str(path))


def test_an_archive_of_arrays_is_no_token_file(tmp_path: Path) -> None:
    path = Path(save_tokens(tmp_path, np.zeros(3, dtype=np.uint8)))
    with path.open("wb") as file:
        np.savez(file, np.zeros(3))
    with pytest.raises(DataError, match=r"train\.npy"):
        read_source(str(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_named_as_a_token_file_is_refused_without_waiting(tmp_path: Path) -> None:
    path = Path(save_tokens(tmp_path, np.zeros(3, dtype=np.uint8)))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="regular file"):
        read_source(str(path))


def test_a_missing_token_file_is_named_itself(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npy"):
        read_source(str(tmp_path / "none.npy"))


def test_a_token_file_stands_alone(tmp_path: Path) -> None:
    path = save_tokens(tmp_path, np.zeros(3, dtype=np.uint8))
    assert read_source([path]).tokens is not None
    with pytest.raises(DataError, match="joined"):
        read_source([path, "python-docs"])


def test_a_split_loses_no_token_to_rounding() -> None:
    sizes = [len(split) for split in split_tokens(np.arange(100), (0.29, 0.71, 0.0)).values()]
    assert sizes == [29, 71, 0]
    tokens = np.zeros(10_000_000, dtype=np.uint8)
    splits = split_tokens(tokens, (0.5, 0.4999995, 0.0))  # within the tolerance of the config
    assert sum(len(split) for split in splits.values()) == len(tokens)
    assert len(splits["test"]) == 0
