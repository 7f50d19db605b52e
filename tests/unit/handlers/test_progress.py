"""What a terminal shows, and what stands in its place in a file."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import select
from typing import Any

import pytest
import torch

from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.events import TrainingEvents
from fundamentallm.files.terminal import room_in
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import (
    Checkpointing,
    Evaluation,
    LossEMA,
    Progress,
    Samples,
    Schedule,
    Throughput,
)
from fundamentallm.training.handlers.progress import format_seconds
from fundamentallm.training.trainer import Trainer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TickingClock:
    """Moves on by a fixed time whenever it is read."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.now = 0.0

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def make_trainer(*handlers: Any, **options: Any) -> Trainer:
    torch.manual_seed(0)
    train, _ = tiny_loaders()
    config = TrainingConfig(**{"total_steps": 6, "learning_rate": 2e-3, **options})
    trainer = Trainer(tiny_model(), train, device="cpu", config=config, handlers=handlers)
    Schedule(trainer.scheduler).attach(trainer)
    return trainer


def figures(trainer: Trainer, step: int) -> str:
    history = trainer.history
    return (
        f"loss {history.train_loss[step - 1]:.4f}, ema {history.loss_ema[step - 1]:.4f},"
        f" lr 2.00e-03, {history.throughput_tokens_per_sec[step - 1]:,.0f} tok/s"
    )


def frames(terminal: Terminal) -> list[str]:
    """What the bar showed, one state after the other."""
    return [frame.strip() for frame in re.split(r"[\r\n]", terminal.getvalue()) if frame.strip()]


def test_a_terminal_shows_a_bar_with_all_figures():
    terminal = Terminal()
    trainer = make_trainer(
        Progress(stream=terminal, clock=TickingClock(1.0)), LossEMA(), Throughput()
    )
    # Two seconds a step, so that what is left of the six steps is known.
    trainer.budget.clock = lambda: 2.0 * trainer.state.iteration
    trainer.run()
    shown = frames(terminal)
    for step in range(1, 7):
        (frame,) = {f for f in shown if f"| {step}/6" in f and figures(trainer, step) in f}
        assert frame.startswith(f"{100 * step / 6:3.0f}%".strip())
        assert frame.endswith(f"ETA 0:{2 * (6 - step):02d}")


def test_the_bar_is_drawn_no_more_than_ten_times_a_second_but_at_the_end():
    terminal = Terminal()
    trainer = make_trainer(
        Progress(stream=terminal, clock=TickingClock(0.001)), LossEMA(), Throughput()
    )
    trainer.run()
    text = terminal.getvalue()
    shown = [step for step in range(1, 7) if figures(trainer, step) in text]
    assert shown == [1, 6]


def test_nothing_is_logged_beside_a_bar(caplog):
    with caplog.at_level(logging.INFO, "fundamentallm"):
        make_trainer(Progress(0.0, Terminal(), TickingClock(10.0))).run()
    assert not caplog.records


def lines(caplog: Any) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "fundamentallm.training.handlers.progress"
    ]


def test_elsewhere_there_are_lines(caplog):
    stream = io.StringIO()
    trainer = make_trainer(Progress(5.0, stream, TickingClock(2.0)), LossEMA(), Throughput())
    trainer.budget.clock = lambda: 2.0 * trainer.state.iteration
    with caplog.at_level(logging.INFO, "fundamentallm"):
        trainer.run()
    assert stream.getvalue() == ""
    # At 2 s, then at the first time that is 5 s later (8 s), and at the last step.
    assert lines(caplog) == [
        f"step 1/6: {figures(trainer, 1)}, ETA 0:10",
        f"step 4/6: {figures(trainer, 4)}, ETA 0:04",
        f"step 6/6: {figures(trainer, 6)}, ETA 0:00",
    ]


def test_figures_that_nobody_measures_are_left_out(caplog):
    trainer = make_trainer(Progress(5.0, io.StringIO(), TickingClock(0.0)))
    with caplog.at_level(logging.INFO, "fundamentallm"):
        trainer.run()
    first, last = lines(caplog)
    for text in (first, last):
        assert "ema" not in text
        assert "tok/s" not in text
    assert first.startswith(f"step 1/6: loss {trainer.history.train_loss[0]:.4f}, lr 2.00e-03")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_by_the_clock_shows_no_last_step(caplog, terminal):
    stream = Terminal() if terminal else io.StringIO()
    trainer = make_trainer(
        Progress(0.0, stream, TickingClock(1.0)), total_steps=None, max_seconds=4.0
    )
    trainer.budget.clock = lambda: float(trainer.state.iteration)
    with caplog.at_level(logging.INFO, "fundamentallm"):
        trainer.run()
    assert trainer.state.iteration == 4
    if terminal:
        shown = frames(stream)
        assert any(f.startswith("3 steps") and f.endswith("ETA 0:01") for f in shown)
        assert "/" not in "".join(shown)
    else:
        assert lines(caplog)[2].startswith("step 3: loss ")
        assert lines(caplog)[2].endswith("ETA 0:01")


def test_the_bar_begins_where_a_resumed_run_stands():
    terminal = Terminal()
    trainer = make_trainer(Progress(stream=terminal, clock=TickingClock(1.0)))
    trainer.state.iteration = 4
    trainer.run()
    numbers = [int(n) for n in re.findall(r"\| (\d+)/6", terminal.getvalue())]
    # tqdm draws a bar once as it is made, before it is told where the run stands.
    assert [n for n in numbers if n][:1] == [4]
    assert numbers[-1] == 6


def evaluating_trainer(*handlers: Any, **options: Any) -> Trainer:
    torch.manual_seed(0)
    train, val = tiny_loaders()
    config = TrainingConfig(**{"total_steps": 4, "eval_steps": 2, **options})
    return Trainer(
        tiny_model(), train, val, device="cpu", config=config, handlers=[*handlers, Evaluation()]
    )


def test_a_terminal_shows_what_is_done_between_two_steps(tmp_path):
    terminal = Terminal()
    samples = Samples(CharacterTokenizer("\nabcdefghij"), tmp_path, num_tokens=5)
    checkpoints = Checkpointing(tmp_path / "checkpoints")
    progress = Progress(stream=terminal, clock=TickingClock(1.0))
    trainer = evaluating_trainer(progress, samples, checkpoints)
    trainer.run()
    number = len(trainer.val_loader)
    shown = [f for f in frames(terminal) if "| 2/4" in f]
    order = ["saving", *(f"evaluating {k + 1}/{number}" for k in range(number)), "sampling"]
    activities = [f.split("| 2/4, ")[1].split(", ")[0] for f in shown if ", " in f]
    assert [one for one in activities if not one.startswith("loss")] == order
    assert all("loss " in f for f in shown if "evaluating" in f)


def test_without_samples_nothing_is_shown_of_them():
    terminal = Terminal()
    evaluating_trainer(Progress(stream=terminal, clock=TickingClock(1.0))).run()
    assert "evaluating" in terminal.getvalue()
    assert "sampling" not in terminal.getvalue()


def test_elsewhere_a_long_evaluation_writes_lines(caplog):
    trainer = evaluating_trainer(Progress(2.0, io.StringIO(), TickingClock(1.0)))
    with caplog.at_level(logging.INFO, "fundamentallm"):
        trainer.run()
    number = len(trainer.val_loader)
    said = [r.message for r in caplog.records if "evaluating" in r.message]
    assert said[0] == f"step 2: evaluating 3/{number}"


def test_a_terminal_that_does_not_know_its_width_shows_a_bar(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    shown = b""
    master, slave = pty.openpty()  # of width 0, as under `script` or in a container
    try:
        with os.fdopen(slave, "w") as stream:
            assert os.get_terminal_size(slave).columns == 0
            make_trainer(Progress(stream=stream, clock=TickingClock(1.0))).run()
            while select.select([master], [], [], 0)[0]:
                shown += os.read(master, 4096)
            assert room_in(stream) == 77
            monkeypatch.setenv("COLUMNS", "60")
            assert room_in(stream) == 57
    finally:
        os.close(master)
    assert re.search(r"100%\|.*\| 6/6, loss", shown.decode())


@pytest.mark.parametrize("fails", [False, True])
def test_the_bar_is_taken_down_however_the_run_ends(fails):
    terminal = Terminal()
    trainer = make_trainer(Progress(stream=terminal, clock=TickingClock(1.0)))

    def fail() -> None:
        raise RuntimeError("by the test")

    if fails:
        trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY(once=3), fail)
        with pytest.raises(RuntimeError, match="by the test"):
            trainer.run()
    else:
        trainer.run()
    assert terminal.getvalue().endswith("\n")
    assert frames(terminal)[-1].count("3/6" if fails else "6/6") == 1


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0:00"),
        (0.6, "0:01"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (90061, "25:01:01"),
    ],
)
def test_seconds_are_formatted(seconds, expected):
    assert format_seconds(seconds) == expected
