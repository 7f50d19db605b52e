"""A run and a command need no terminal: closed streams, terminals that went, `nohup`."""

from __future__ import annotations

import itertools
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests import forked

from fundamentallm.engine.cli import main

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: c
data: {source: text.txt, tokenizer: byte, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2}
training: {total_steps: 4, eval_steps: 2, log_steps: 1}
handlers: {tensorboard: false, samples: {num_tokens: 5}}
"""
PLUGIN = """
import os
from ignite.engine import Events
from fundamentallm.training.handlers.base import HANDLERS

@HANDLERS.register("sender")
class Sender:
    def __init__(self, number: int) -> None:
        self.number = number

    def attach(self, trainer):
        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), self.send)

    def send(self):
        os.kill(os.getpid(), self.number)
"""
ENGINE = (sys.executable, "-m", "fundamentallm.engine")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a shell and signals")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    shutil.copy(TEXT, folder / "text.txt")
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "sender.py").write_text(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "c.yaml"]) == 0
    return folder


@pytest.fixture(autouse=True)
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def engine(words: Sequence[str], redirect: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *ENGINE, *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=forked.SECONDS,
    )


COMMANDS = {
    "run": ["run", "c.yaml", "--resume", "never"],
    "generate": ["generate", "runs/c", "--max-tokens", "5"],
    "evaluate": ["evaluate", "runs/c"],
    "verify": ["verify", "runs/c"],
    "prepare": ["prepare", "text.txt", "--out", "prepared"],
    "prepare -": ["prepare", "-", "--out", "prepared"],
}
CLOSED = ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"]
OFTEN = [("run", "<&- >&- 2>&-")]


@pytest.mark.parametrize(
    ("command", "redirect"),
    [
        pytest.param(*case, marks=() if case in OFTEN else pytest.mark.long)
        for case in itertools.product(COMMANDS, CLOSED)
    ],
)
def test_a_closed_stream_ends_nothing(command: str, redirect: str) -> None:
    result = engine(COMMANDS[command], redirect)
    expected = 3 if command == "prepare -" else 0  # standard input holds no text
    assert result.returncode == expected, result.stderr
    assert "Traceback" not in result.stderr
    if command == "run":
        assert main(["verify", "runs/c-2"]) == 0
        assert len(Path("runs/c-2/metrics.jsonl").read_text().splitlines()) == 6


def test_an_error_without_a_stream_for_it_keeps_its_code() -> None:
    assert engine(["run", "nowhere.yaml"], "2>&-").returncode == 2
    assert engine(["nonsense"], "2>&-").returncode == 2


@pytest.mark.parametrize("command", ["run", pytest.param("evaluate", marks=pytest.mark.long)])
def test_a_terminal_that_has_gone_ends_nothing(command: str) -> None:
    ours, theirs = pty.openpty()
    os.close(ours)
    try:
        process = subprocess.run(
            [*ENGINE, *COMMANDS[command]],
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "PYTHONUNBUFFERED": ""},  # buffered, as users have it
            timeout=forked.SECONDS,
        )
    finally:
        os.close(theirs)
    assert process.returncode == 0


LATER = [pytest.param(name, marks=pytest.mark.long) for name in ("SIGINT", "SIGTERM", "SIGUSR1")]


@pytest.mark.parametrize("name", ["SIGHUP", *LATER])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(name: str) -> None:
    number = int(getattr(signal, name))
    command = ["run", "c.yaml", "name=d"]
    command += ["plugins=[sender]", f"handlers.sender.number={number}"]
    heard = forked.run(command, Path.cwd())
    assert heard.returncode == 128 + number, heard.stderr

    shutil.rmtree("runs/d")
    ignored = forked.run(command, Path.cwd(), ignored=[number])
    assert ignored.returncode == 0, ignored.stderr
    assert "Done: 4 steps" in ignored.stdout


def test_generate_says_which_checkpoint_step_and_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "runs/c", "--max-tokens", "5"]) == 0
    said = capsys.readouterr()
    best = Path("runs/c/checkpoints/best").read_text().strip()
    assert f"from runs/c/checkpoints/{best} (step {int(best[5:])})" in said.err
    assert "from" not in said.out


@pytest.mark.long
def test_the_closing_sample_says_whose_it_is() -> None:
    result = engine(["run", "c.yaml", "--resume", "never", "training.total_steps=2"])
    assert "It writes:" in result.stdout
    assert "(by the weights of step 2" in result.stdout
