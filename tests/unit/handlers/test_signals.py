"""Real signals, to this process and to one of its own."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from tests import forked

from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import Checkpointing, Evaluation, Signals
from fundamentallm.training.trainer import Trainer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


def make_trainer(*handlers: Any, **options: Any) -> Trainer:
    train, val = tiny_loaders()
    config = TrainingConfig(**{"total_steps": 8, "eval_steps": 4, **options})
    return Trainer(tiny_model(), train, val, device="cpu", config=config, handlers=handlers)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def mine():
    """A handler of somebody else's for each signal, and the list that it fills."""
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        received.append(number)

    numbers = [getattr(signal, name) for name in NAMES]
    before = {number: signal.signal(number, handler) for number in numbers}
    yield handler, received
    for number, previous in before.items():
        signal.signal(number, previous)


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_ends_the_run_after_the_step_saved(tmp_path, mine, name):
    number = getattr(signal, name)
    handler, received = mine
    trainer = make_trainer(Signals(), Checkpointing(tmp_path))
    trainer.add_event_handler(
        TrainingEvents.FLLM_MICRO_BATCH_COMPLETED(once=3), lambda: send(number)
    )
    trainer.run()
    assert trainer.state.iteration == 3
    assert trainer.state.optimizer_steps == 3
    assert trainer.interrupted_by == number
    assert trainer.finished == ""
    assert (tmp_path / "step-00000003").is_dir()
    assert received == []
    assert all(signal.getsignal(getattr(signal, other)) is handler for other in NAMES)


def test_a_signal_during_an_evaluation_ends_it(mine):
    trainer = make_trainer(Signals(), Evaluation())
    completed: list[Any] = []
    number = signal.SIGTERM
    trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_STARTED(once=1), lambda: send(number))
    trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, completed.append)
    trainer.run()
    assert trainer.state.iteration == 4
    assert completed == []


def test_handlers_of_others_are_put_back_after_an_exception_too(mine):
    handler, received = mine
    trainer = make_trainer(Signals())

    def fail() -> None:
        assert signal.getsignal(signal.SIGTERM) is not handler
        raise RuntimeError("by the test")

    trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY(once=2), fail)
    with pytest.raises(RuntimeError, match="by the test"):
        trainer.run()
    assert all(signal.getsignal(getattr(signal, name)) is handler for name in NAMES)
    send(signal.SIGTERM)
    assert received == [signal.SIGTERM]


def test_a_second_run_listens_again(mine):
    trainer = make_trainer(Signals(), total_steps=2)
    trainer.run()
    again = make_trainer(Signals(), total_steps=5)
    again.add_event_handler(
        TrainingEvents.FLLM_OPTIMIZER_STEPPED(once=2), lambda: send(signal.SIGUSR1)
    )
    again.run()
    assert again.state.iteration == 2


def test_another_thread_leaves_the_signals_alone(mine):
    handler, _ = mine
    seen: list[Any] = []

    def train() -> None:
        trainer = make_trainer(Signals(), total_steps=3)
        trainer.add_event_handler(
            TrainingEvents.FLLM_METRICS_READY,
            lambda: seen.append(signal.getsignal(signal.SIGTERM)),
        )
        trainer.run()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [handler] * 3


CHILD = """
import os, signal, sys
from pathlib import Path
from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import Checkpointing, Signals
from fundamentallm.training.trainer import Trainer

train, val = tiny_loaders()
trainer = Trainer(tiny_model(), train, val, device="cpu",
                  config=TrainingConfig(total_steps=8),
                  handlers=[Signals(), Checkpointing(Path(sys.argv[1]))])

def twice():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)

trainer.add_event_handler(TrainingEvents.FLLM_MICRO_BATCH_COMPLETED(once=3), twice)
trainer.run()
print("not reached")
"""


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    program = tmp_path / "child.py"
    program.write_text(CHILD)
    result = forked.run([str(tmp_path)], tmp_path, program=str(program))
    assert result.returncode == 128 + signal.SIGINT, result.stderr
    assert result.stdout == ""
    assert sorted(path.name for path in Path(tmp_path).glob("step-*")) == ["step-00000000"]
