"""What is advised at the end of a run goes on as it is typed, and trains."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from ignite.engine import Events

from fundamentallm.engine import run as run_module
from fundamentallm.engine.cli import main
from fundamentallm.engine.wiring import assemble as assembly

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2}
training: {learning_rate: 1e-2, eval_steps: 4, log_steps: 2, scheduler: SCHEDULER}
handlers: {tensorboard: false, samples: false, progress: false}
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(TEXT, "text.txt")
    write_config("linear_warmup")
    return tmp_path


def write_config(scheduler: str) -> None:
    Path("tiny.yaml").write_text(CONFIG.replace("SCHEDULER", scheduler))


def advised(said: str, ending: str = "") -> list[str]:
    """Return the words of the command that a run advises to train further."""
    lines = [line for line in said.splitlines() if " run tiny.yaml " in line and ending in line]
    command = [line for line in lines if "--resume never" not in line][-1]
    return shlex.split(command.partition("#")[0])[3:]  # behind `python -m fundamentallm`


def last_step(run: str = "runs/tiny") -> int:
    return int((Path(run) / "checkpoints/last").read_text().strip().removeprefix("step-"))


ENDS = {
    "steps": (["training.total_steps=8"], "training.total_steps: 8", "training.total_steps=16"),
    "tokens": (["training.max_tokens=512"], "training.max_tokens: 512", "training.max_tokens=1024"),
    "epochs": (["training.num_epochs=1"], "training.num_epochs: 1", "training.num_epochs=2"),
    "steps and tokens": (
        ["training.total_steps=8", "training.max_tokens=512"],
        "training.total_steps: 8, training.max_tokens: 512",
        "training.total_steps=16 training.max_tokens=1024",
    ),
    "tokens before steps": (
        ["training.total_steps=100", "training.max_tokens=512"],
        "training.max_tokens: 512",
        "training.total_steps=100 training.max_tokens=1024",
    ),
}


@pytest.mark.parametrize(
    ("end", "scheduler"),
    [
        ("steps and tokens", "cosine"),
        *(
            pytest.param(end, scheduler, marks=pytest.mark.long)
            for end in ENDS
            for scheduler in ("linear_warmup", "cosine")
            if (end, scheduler) != ("steps and tokens", "cosine")
        ),
    ],
)
def test_the_limit_that_ended_a_run_is_named_and_raised(end, scheduler, capsys):
    words, limit, raised = ENDS[end]
    write_config(scheduler)
    assert main(["run", "tiny.yaml", *words]) == 0
    at_the_end = advised(capsys.readouterr().out, "# train it further")
    step = last_step()

    assert main(["run", "tiny.yaml", *words]) == 0

    said = capsys.readouterr().out
    assert re.search(rf"is finished: .* \({re.escape(limit)}\)\.", said)
    command = advised(said)
    assert command == at_the_end
    flag = ["--change"] if scheduler == "cosine" else []
    assert command == ["run", "tiny.yaml", *raised.split(), "--resume", "runs/tiny", *flag]
    assert main(command) == 0
    assert last_step() == 2 * step


def test_a_clock_that_ended_a_run_is_named_and_raised(monkeypatch, capsys):
    seconds = iter(range(10**6))
    monkeypatch.setattr(assembly, "seconds_since_start", lambda: float(next(seconds)))
    assert main(["run", "tiny.yaml", "training.max_seconds=40"]) == 0
    step = last_step()
    seconds = iter(range(10**6))
    capsys.readouterr()

    assert main(["run", "tiny.yaml", "training.max_seconds=40"]) == 0

    said = capsys.readouterr().out
    assert "is finished: the budget is used up (training.max_seconds: 40)." in said
    seconds = iter(range(10**6))
    command = advised(said)
    assert int(command[2].removeprefix("training.max_seconds=")) >= 100
    assert command[3:] == ["--resume", "runs/tiny", "--change"]  # the warmup follows the clock
    assert main(command) == 0
    assert last_step() > step


@pytest.mark.long
def test_a_clock_beside_the_steps_is_raised_where_it_would_end_the_run_at_once(monkeypatch, capsys):
    seconds = iter(range(10**6))
    monkeypatch.setattr(assembly, "seconds_since_start", lambda: float(next(seconds)))
    limits = ["training.total_steps=8", "training.max_seconds=60"]
    assert main(["run", "tiny.yaml", *limits]) == 0
    said = capsys.readouterr().out
    assert "(the last step is done)" in said

    command = advised(said, "# train it further")
    seconds = iter(range(10**6))  # of a process of its own
    assert main(command) == 0
    assert last_step() == 16


@pytest.mark.long
def test_a_run_that_stopped_early_goes_on_without_the_handler_that_ended_it(capsys):
    text = CONFIG.replace("SCHEDULER", "constant").replace(
        "progress: false", "progress: false, early_stopping: {patience: 1, min_delta: 9}"
    )
    Path("tiny.yaml").write_text(text)
    words = ["training.total_steps=24"]
    assert main(["run", "tiny.yaml", *words]) == 0
    assert last_step() == 8
    capsys.readouterr()

    assert main(["run", "tiny.yaml", *words]) == 0

    said = capsys.readouterr().out
    assert "To train it further:" in said
    command = advised(said)
    assert command[2:] == [
        *words,
        "handlers.early_stopping=false",
        "--resume",
        "runs/tiny",
        "--change",
    ]
    assert main(command) == 0
    assert last_step() == 24


@pytest.mark.long
def test_the_advice_keeps_the_directory_and_the_plugins(capsys):
    Path("my_plugin.py").write_text("")
    words = ["--run-dir", "mine", "--plugins", "my_plugin", "training.total_steps=8"]
    assert main(["run", "tiny.yaml", *words]) == 0
    command = advised(capsys.readouterr().out, "# train it further")
    assert command[2:] == [
        "training.total_steps=16",
        "--resume",
        "mine",
        "--plugins",
        "my_plugin",
    ]
    assert main(command) == 0
    assert last_step("mine") == 16


def test_a_stopped_run_is_named_where_the_same_command_would_start_another(monkeypatch, capsys):
    assert main(["run", "tiny.yaml", "training.total_steps=8"]) == 0

    def assemble_and_stop(*arguments, **options) -> assembly.Run:
        run = assembly.assemble(*arguments, **options)
        run.trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=5), lambda: signal.raise_signal(signal.SIGINT)
        )
        return run

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "assemble", assemble_and_stop)
        assert main(["run", "tiny.yaml", "training.total_steps=8", "--resume", "never"]) == 130
    said = capsys.readouterr().err
    assert "stopped by Ctrl-C, saved at step 5; this command goes on: " in said

    assert main(shlex.split(said.split("this command goes on: ")[1].splitlines()[0])[3:]) == 0

    assert last_step("runs/tiny-2") == 8
    lines = Path("runs/tiny-2/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 8


@pytest.mark.long
def test_an_edited_file_does_not_spoil_the_end_of_its_run(monkeypatch, capsys):
    def assemble_and_spoil(*arguments, **options) -> assembly.Run:
        Path("tiny.yaml").write_text("training: {total_stepz: 4}")
        return assembly.assemble(*arguments, **options)

    monkeypatch.setattr(run_module, "assemble", assemble_and_spoil)

    assert main(["run", "tiny.yaml", "training.total_steps=8"]) == 0

    assert "Next:" in capsys.readouterr().out
