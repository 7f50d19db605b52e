"""A secret in an address reaches its server and nothing that is written."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator

import pytest
from tests.servers import LocalServer, QuietHandler

from fundamentallm.config import RunConfig, load_config
from fundamentallm.config.data import SourceConfig
from fundamentallm.data.sources import read_source
from fundamentallm.engine.cli import main
from fundamentallm.errors import ConfigError, DataError
from fundamentallm.files.authorization import request_for, variable_of
from fundamentallm.files.download import download
from fundamentallm.redaction import redacted

SECRET = "s3cr3t"
BODY = b"To be, or not to be, that is the question.\n" * 40
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:s3cr3t@h.org/a", "https://***@h.org/a"),
        ("https://s3cr3t@h.org/a", "https://***@h.org/a"),
        ("https://u:s3@cr3t@h.org/a", "https://***@h.org/a"),
        ("see https://u:s3cr3t@h.org:8/a?b=1, or", "see https://***@h.org:8/a?b=1, or"),
        ("http://h/a?token=s3cr3t&b=1", "http://h/a?token=***&b=1"),
        ("http://h/a?b=1&X-Amz-Signature=s3cr3t#c", "http://h/a?b=1&X-Amz-Signature=***#c"),
        ("{url: 'http://h/a?api_key=s3cr3t'}", "{url: 'http://h/a?api_key=***'}"),
        ("HTTPS://u:s3cr3t@h/", "HTTPS://***@h/"),
        ("https://h.org/a@b?page=3", "https://h.org/a@b?page=3"),
        ("a plain text?token=x", "a plain text?token=x"),
    ],
)
def test_only_the_secret_is_left_out(text, shown):
    assert redacted(text) == shown
    assert redacted(shown) == shown


class Server(LocalServer):
    """Answers who knows the secret, and remembers what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.away = ""
        server = self

        class Handler(QuietHandler):
            def answer(self) -> None:
                said = self.headers.get("Authorization")
                server.asked.append((self.path, said))
                if server.away and self.path == "/moved":
                    self.send_response(302)
                    self.send_header("Location", server.away)
                    self.end_headers()
                    return
                knows = f"token={SECRET}" in self.path or said in (
                    f"Bearer {SECRET}",
                    "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode(),
                )
                self.send_response(200 if knows else 401)
                self.send_header("Content-Length", str(len(BODY)))
                self.end_headers()
                self.wfile.write(BODY)

        super().__init__(Handler)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("address", "variable"),
    [
        (f"http://user:{SECRET}@HOST/a.txt", ""),
        (f"http://HOST/a.txt?token={SECRET}", ""),
        ("http://HOST/a.txt", f"user:{SECRET}"),
        ("http://HOST/a.txt", SECRET),
        ("http://HOST/a.txt", f"Bearer {SECRET}"),
        ("http://HOST/a.txt?b=1", f"?token={SECRET}"),
        ("http://***@HOST/a.txt", f"user:{SECRET}"),
        ("http://HOST/a.txt?token=***&b=1", f"?token={SECRET}"),
    ],
)
def test_the_server_gets_the_secret(server, tmp_path, monkeypatch, address, variable):
    if variable:
        monkeypatch.setenv("FUNDAMENTALLM_AUTHORIZATION_127_0_0_1", variable)
    url = address.replace("HOST", server.host)
    assert download(url, SHA256, tmp_path / "a.txt").read_bytes() == BODY
    assert "***" not in server.asked[0][0]


def test_the_variable_is_that_of_the_host():
    assert variable_of("example.org") == "FUNDAMENTALLM_AUTHORIZATION_EXAMPLE_ORG"


def test_a_secret_of_the_environment_goes_to_no_plain_connection(monkeypatch):
    monkeypatch.setenv(variable_of("example.org"), SECRET)
    assert request_for("https://example.org/a").get_header("Authorization") == f"Bearer {SECRET}"
    assert request_for("http://example.org/a").get_header("Authorization") is None
    assert request_for("https://example.org.evil.net/a").get_header("Authorization") is None


def test_a_secret_does_not_follow_to_another_place(server, tmp_path, monkeypatch):
    other = Server()
    try:
        server.away = f"http://{other.host}/a.txt"
        monkeypatch.setenv("FUNDAMENTALLM_AUTHORIZATION_127_0_0_1", SECRET)
        with pytest.raises(DataError, match="401"):
            download(f"http://{server.host}/moved", SHA256, tmp_path / "a.txt")
        assert server.asked == [("/moved", f"Bearer {SECRET}")]
        assert other.asked == [("/a.txt", None)]
    finally:
        other.close()


@pytest.mark.parametrize("address", ["http://***@h.org/a", "https://h.org/a?token=***"])
def test_an_address_that_was_stored_says_how_to_pass_its_secret(tmp_path, address):
    with pytest.raises(DataError, match="stored without its secret") as caught:
        download(address, SHA256, tmp_path / "a.txt")
    assert "FUNDAMENTALLM_AUTHORIZATION_H_ORG" in caught.value.fix


def test_no_error_of_a_download_has_the_secret(server, tmp_path):
    for address in (
        f"http://user:wrong{SECRET}@{server.host}/a.txt",
        f"http://{server.host}/a.txt?apikey=x{SECRET}",
        f"http://user:{SECRET}@[broken/a.txt",
        f"ftp://user:{SECRET}@h/a",
    ):
        with pytest.raises(DataError) as caught:
            download(address, SHA256, tmp_path / "a.txt")
        assert SECRET not in str(caught.value)


def test_a_name_in_the_cache_has_no_secret(server, tmp_path):
    source = SourceConfig(url=f"http://{server.host}/?token={SECRET}", sha256=SHA256)
    read_source([source], cache_dir=tmp_path)
    login = SourceConfig(url=f"http://user:{SECRET}@{server.host}", sha256=SHA256)
    read_source([login], cache_dir=tmp_path / "other")
    assert [path.name for path in tmp_path.rglob("*") if SECRET in path.name] == []


def config_of(address: str) -> str:
    return f"""\
name: tiny
data:
  sources: [{{url: "{address}", sha256: {SHA256}}}]
  sequence_length: 16
  batch_size: 4
model: {{d_model: 16, num_layers: 1, num_heads: 2}}
training: {{total_steps: 2, eval_steps: 2}}
handlers: {{tensorboard: false, samples: false, progress: false}}
"""


@pytest.mark.parametrize("address", [f"http://user:{SECRET}@HOST/a.txt",
                                     f"http://HOST/a.txt?token={SECRET}"])  # fmt: skip
def test_nothing_that_a_run_writes_has_the_secret(server, tmp_path, monkeypatch, capfd, address):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = tmp_path / "tiny.yaml"
    config.write_text(config_of(address.replace("HOST", server.host)))
    assert main(["run", "tiny.yaml"]) == 0
    assert main(["export", "runs/tiny", "--format", "torch", "--out", "out.pt"]) == 0
    assert main(["run", "tiny.yaml", "training.total_steps=3", "--resume", "runs/tiny"]) == 0
    assert main(["run", "tiny.yaml", "data.sources.0.url=5"]) == 2
    assert main(["check", "tiny.yaml", f"data.sources=[{{urll: '{address}'}}]"]) == 2
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert "***" in (tmp_path / "runs/tiny/config.yaml").read_text()
    for path in tmp_path.rglob("*"):
        if path.is_file() and path != config:
            assert SECRET.encode() not in path.read_bytes(), path


def test_a_config_keeps_the_secret_only_in_memory():
    config = RunConfig.from_yaml(config_of(f"https://h.org/a?token={SECRET}"))
    assert config.data.sources is not None
    assert config.data.sources[0].url == f"https://h.org/a?token={SECRET}"
    for written in (
        config.to_yaml(),
        str(config.to_dict()),
        repr(config),
        config.model_dump_json(),
    ):
        assert SECRET not in written


def test_no_error_about_a_config_has_the_secret(tmp_path):
    path = tmp_path / "tiny.yaml"
    for address in (f"https://u:{SECRET}@{'h' * 90}.org/a", f"https://u:{'x' * 90}{SECRET}@h.org"):
        path.write_text(config_of(address).replace("sha256: ", "sha257: "))
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert SECRET not in str(caught.value)
        with pytest.raises(ConfigError) as caught:
            load_config(path, [f"data.sources.x={{url: '{address}'}}"])
        assert SECRET not in str(caught.value)
