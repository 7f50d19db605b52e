"""A logger in a thread: what it is told, and what a run loses when it raises, hangs or is slow."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

from fundamentallm.config.training import TrainingConfig
from fundamentallm.testing import SpoiltGradient, tiny_loaders, tiny_model
from fundamentallm.training.handlers import (
    BackgroundWriter,
    Checkpointing,
    Evaluation,
    MetricsLog,
    NaNRollback,
    Record,
)
from fundamentallm.training.handlers.background import MAX_WAITING
from fundamentallm.training.trainer import Trainer


class Kept(BackgroundWriter):
    """Keeps its calls and the thread of each; a method can be made to wait or to raise."""

    target = "the test's service"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[threading.Thread] = set()
        self.errors: list[Exception] = []
        self.gate = threading.Event()
        self.gate.set()

    def _note(self, *call: Any) -> None:
        self.threads.add(threading.current_thread())
        self.calls.append(call)
        if call[0] == "write":
            self.gate.wait(60)
            if self.errors:
                raise self.errors.pop(0)

    def write(self, record: Record) -> None:
        self._note("write", record)

    def cut_back(self, step: int, evaluation_pending: bool) -> None:
        self._note("cut_back", step, evaluation_pending)

    def close(self) -> None:
        self._note("close")

    def written(self) -> list[tuple[str, int]]:
        return [(call[1].kind, call[1].step) for call in self.calls if call[0] == "write"]


def make_trainer(*handlers: Any, **options: Any) -> Trainer:
    torch.manual_seed(0)
    train, val = tiny_loaders()
    fields = {"total_steps": 8, "eval_steps": 4, "log_steps": 1, "learning_rate": 1e-2}
    return Trainer(
        tiny_model(dropout=0.1),
        train,
        val,
        device="cpu",
        config=TrainingConfig(**{**fields, **options}),
        handlers=[*handlers, Evaluation()],
    )


def outcome(run_dir: Path, *handlers: Any) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Return weights and metric lines of a run, without what depends on time."""
    trainer = make_trainer(*handlers, MetricsLog(run_dir))
    trainer.run()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["elapsed_seconds"]
    return [p.detach().clone() for p in trainer.model.parameters()], lines


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return outcome(tmp_path_factory.mktemp("without"))


def assert_same(first: Any, second: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert first[1] == second[1]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_it_is_told_the_run_in_order_in_a_thread_of_its_own(tmp_path, without, caplog):
    kept = Kept()
    assert_same(outcome(tmp_path, kept), without)
    assert kept.calls[0] == ("cut_back", 0, False)
    assert kept.calls[-1] == ("close",)
    steps = [("train", step) for step in range(1, 9)]
    assert kept.written() == [*steps[:4], ("val", 4), *steps[4:], ("val", 8)]
    (thread,) = kept.threads
    assert thread.daemon
    assert thread is not threading.main_thread()
    assert not thread.is_alive()
    assert not warnings(caplog)


def test_a_rollback_is_told_as_any_logger_is_told(tmp_path):
    kept = Kept()
    checkpoints = Checkpointing(tmp_path)
    make_trainer(kept, NaNRollback(), checkpoints, SpoiltGradient(6)).run()
    back = kept.calls.index(("cut_back", 4, True))
    again = [(call[1].kind, call[1].step) for call in kept.calls[back + 1 : back + 4]]
    assert again == [("incidents", 6), ("incidents", 6), ("rollbacks", 5)]


def test_records_that_wait_are_handed_over_together():
    class Batches(BackgroundWriter):
        def __init__(self) -> None:
            super().__init__()
            self.batches: list[list[int]] = []

        def write_all(self, records: Any) -> None:
            self.batches.append([record.step for record in records])

    batches = Batches()
    make_trainer(batches).run()
    assert [step for batch in batches.batches for step in batch] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert len(batches.batches) <= 2


def test_one_that_raises_costs_its_records_only(tmp_path, without, caplog):
    kept = Kept()
    kept.errors = [KeyError("x") for _ in range(100)]
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        assert_same(outcome(tmp_path, kept), without)
    assert warnings(caplog) == [
        "the test's service cannot be written, training goes on: KeyError('x')",
        "the test's service lacks 10 records of this run",
    ]


def test_a_login_in_an_error_is_not_told(caplog):
    kept = Kept()
    kept.errors = [ValueError("no answer from https://me:secret@host/x?token=hidden")]
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        make_trainer(kept).run()
    assert "https://***@host/x?token=***" in warnings(caplog)[0]


def test_one_that_hangs_is_left_behind(tmp_path, without, caplog):
    kept = Kept(flush_seconds=0.2, call_seconds=0.1)
    kept.gate.clear()
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        assert_same(outcome(tmp_path, kept), without)
    assert time.monotonic() - began < 10  # it hangs for 60
    told = warnings(caplog)[-2:]
    assert told == [
        "the test's service did not end in time and is left behind",
        "the test's service lacks 10 records of this run",
    ]
    kept.gate.set()  # it answers after all: what waited is gone, and it is closed
    (thread,) = kept.threads
    thread.join(10)
    assert kept.calls[-1] == ("close",)
    assert not thread.is_alive()


def test_a_call_that_hangs_is_told_while_the_run_goes_on(caplog):
    kept = Kept(call_seconds=0.05)
    kept.gate.clear()
    trainer = make_trainer(kept, total_steps=6)

    def wait_for_the_call() -> None:
        with kept._changed:
            kept._ending = True  # so that it gathers no longer
            kept._changed.notify()
        until = time.monotonic() + 20
        while not kept.written() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)

    def answer() -> None:
        kept.gate.set()
        while kept._hangs():
            time.sleep(0.01)

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), wait_for_the_call)
    trainer.add_event_handler(Events.COMPLETED, answer)
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        trainer.run()
    assert warnings(caplog) == [
        "the test's service has not answered for 0 s; training goes on, and its records wait"
    ]
    assert len(kept.written()) == 8


def test_a_full_queue_drops_records_but_not_what_goes_back(caplog):
    kept = Kept(flush_seconds=0.0, call_seconds=0.0)
    kept.gate.clear()
    trainer = make_trainer(kept, total_steps=2)

    def flood() -> None:
        for _ in range(MAX_WAITING + 100):
            kept._try(kept.write, Record("train", 2, 1, 1, 0.0))
        kept._try(kept.cut_back, 1, False)
        assert MAX_WAITING <= len(kept._waiting) <= MAX_WAITING + 2
        assert kept._waiting[-1] == (kept.cut_back, (1, False))

    trainer.add_event_handler(Events.COMPLETED, flood)
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        trainer.run()
    assert f"the test's service lacks {MAX_WAITING + 103} records of this run" in warnings(caplog)
    kept.gate.set()


def test_the_next_run_goes_on(caplog):
    kept = Kept()
    trainer = make_trainer(kept, total_steps=4)
    trainer.run()
    trainer.run(max_iters=6)
    assert kept.written()[-3:] == [("train", 5), ("train", 6), ("val", 6)]
    assert len(kept.threads) == 2


@pytest.mark.parametrize("name", ["flush_seconds", "call_seconds"])
def test_a_negative_time_is_refused(name):
    with pytest.raises(ValueError, match=name):
        Kept(**{name: -1.0})
