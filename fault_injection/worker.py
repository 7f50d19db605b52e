"""A small real run to be killed or stopped: it goes on from what it finds, and tells where it is.

    python -m fault_injection.worker RUN_DIR [PLAN as JSON]

It is forked rather than started: a fork of a process that has imported torch, and has run nothing
with it, costs milliseconds. The command is for trials with processes of their own.

What it tells, a line each, is a word and the step: `ready`, `waiting` for data, `step`,
`evaluating`, `generating`, `saving`, `writing` to `written` around what a save does to the disk,
and `saved`. `signal N WORD STEP` says where a signal was received.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the first optimizer imports it, which takes most of a second a fork
from ignite.engine import Events

from fault_injection.faults import Crash, FaultyFilesystem
from fundamentallm.config import TrainingConfig
from fundamentallm.data.batch import Window
from fundamentallm.data.loaders import Batching, TokenWindowLoader, ValidationLoader
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.events import TrainingEvents
from fundamentallm.files.filesystem import Filesystem
from fundamentallm.testing import tiny_model, tiny_tokens
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint import store as store_module
from fundamentallm.training.checkpoint import tree as state_tree
from fundamentallm.training.checkpoint.catalogue import Survey
from fundamentallm.training.checkpoint.store import CheckpointStore, step_of
from fundamentallm.training.decision import Save
from fundamentallm.training.handlers import (
    Checkpointing,
    LossEMA,
    MetricsLog,
    Perplexity,
    Samples,
    Signals,
    WeightEMA,
)
from fundamentallm.training.handlers.criterion import Criterion
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.schedulers import CosineAnnealingScheduler
from fundamentallm.training.trainer import Trainer

STEPS = 24
SAVED_EVERY = 4
N_SAVED = 2
BEST_LOSS = 2.15  # the score is best near it: in the middle of the run, not always at its end
UNREPEATABLE = ("elapsed_seconds", "train/tokens_per_second", "train/samples_per_second")
RESULT = "result.json"
LONGEST_SECONDS = 120  # of a process; one that hangs is a failed trial, not a series that hangs
ROOT = Path(__file__).resolve().parents[1]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How the worker runs.

    Args:
        asynchronous: save in a thread.
        kill_in: "save" or "resume" for SIGKILL to itself at an operation on the disk inside, or
            outside of, what a save does to the disk.
        kill_at: the number of that operation, from 0.
        slow_in: the word at which everything takes longer.
        slow: by so many seconds a batch, a forward pass or a sync.
        rng_is_saved: False forgets the random numbers at a resume, which must be noticed.
        position_is_saved: False begins the data anew at a resume, which must be noticed.
        is_staged: False writes a checkpoint under its final name, which must be noticed.
        is_saved_at_stop: False leaves a stop to the checkpoints of the schedule, likewise.
    """

    asynchronous: bool = False
    kill_in: str = ""
    kill_at: int = 0
    slow_in: str = ""
    slow: float = 0.0
    rng_is_saved: bool = True
    position_is_saved: bool = True
    is_staged: bool = True
    is_saved_at_stop: bool = True


class Watch:
    """Knows where the run is, and tells.

    Args:
        plan: how the run goes.
        tell: called with every line.
    """

    def __init__(self, plan: Plan, tell: Tell) -> None:
        self.plan = plan
        self.tell = tell
        self.word = ""
        self.writing = False
        self.trainer: Trainer | None = None

    @property
    def step(self) -> int:
        """The run's step."""
        assert self.trainer is not None
        return self.trainer.state.iteration

    def at(self, word: str) -> None:
        """Tell that the run has come to `word`."""
        self.word = word
        self.tell(f"{word} {self.step}")

    def linger(self, word: str) -> None:
        """Take the time that the plan adds to `word`."""
        if self.plan.slow_in == word:
            time.sleep(self.plan.slow)

    def received(self, number: int) -> None:
        """Tell of a signal."""
        self.tell(f"signal {number} {self.word} {self.step}")


class Announce:
    """A handler that tells when an event comes to its place in the order of handlers."""

    def __init__(self, watch: Watch, event: Any, word: str) -> None:
        self.watch = watch
        self.event = event
        self.word = word

    def attach(self, trainer: Trainer) -> None:
        """Listen."""
        trainer.add_event_handler(self.event, self._announce)

    def _announce(self) -> None:
        self.watch.at(self.word)


class Saved:
    """A handler that tells which step was saved: a thread's report comes some steps later."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def attach(self, trainer: Trainer) -> None:
        """Listen."""
        trainer.add_event_handler(TrainingEvents.FLLM_CHECKPOINT_SAVED, self._tell)

    def _tell(self, trainer: Trainer) -> None:
        assert trainer.state.last_checkpoint is not None
        self.watch.word = "saved"
        self.watch.tell(f"saved {step_of(trainer.state.last_checkpoint.name)}")


class DeadlyFilesystem(FaultyFilesystem):
    """Kills the process at the operation of the plan, a write halfway; syncs are made."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(None, Crash)
        self.watch = watch
        self.count = 0

    def _step(
        self, operation: str, act: Callable[[], Any], torn: Callable[[], Any] = lambda: None
    ) -> Any:
        plan = self.watch.plan
        if plan.kill_in == ("save" if self.watch.writing else "resume"):
            if self.count == plan.kill_at:
                torn()
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
        return act()

    def sync(self, file: FileIO) -> None:
        self.watch.linger("saving")
        self._step("sync", lambda: Filesystem.sync(self, file))

    def sync_directory(self, path: Path) -> None:
        self._step("sync_directory", lambda: Filesystem.sync_directory(self, path))


class SlowWindows(TokenWindowLoader):
    """Windows that one may have to wait for."""

    watch: Watch

    def window_at(self, epoch: int, step: int) -> Window:
        self.watch.linger("waiting")
        return super().window_at(epoch, step)


def build(run_dir: Path, watch: Watch) -> Trainer:
    """Return the trainer of a run with dropout, accumulation, averages and a schedule."""
    torch.manual_seed(7)
    random.seed(7)  # Python seeds it by chance in every fork
    np.random.seed(7)
    tokens = tiny_tokens(1_000)
    train = SlowWindows(tokens[:800], Batching(8, 2, accumulation_steps=3, seed=5))
    train.watch = watch
    model = tiny_model(dropout=0.2)
    model.register_forward_pre_hook(lambda *_: watch.linger(watch.word))
    optimizer = OptimizerBuilder.build("adamw", model, 1e-2)
    checkpointing = Checkpointing(
        run_dir / "checkpoints",
        n_saved=N_SAVED,
        score_function=_score,
        asynchronous=watch.plan.asynchronous,
    )
    _watch_the_disk(checkpointing.store, watch)
    trainer = Trainer(
        model,
        train,
        ValidationLoader(tokens[800:], Batching(8, 4)),
        optimizer,
        CosineAnnealingScheduler(optimizer, STEPS, warmup_steps=4, min_lr=1e-4),
        device="cpu",
        config=TrainingConfig(total_steps=STEPS, eval_steps=SAVED_EVERY, log_steps=1),
        handlers=(
            LossEMA(),
            Perplexity(),
            WeightEMA(0.9),
            Signals(),
            MetricsLog(run_dir),
            # Each stands in front of what it announces, and what reports an end behind it.
            Announce(watch, TrainingEvents.FLLM_RUN_STARTED, "ready"),
            Announce(watch, Events.GET_BATCH_STARTED, "waiting"),
            Announce(watch, Events.ITERATION_STARTED, "step"),
            Announce(watch, TrainingEvents.FLLM_EVALUATION_STARTED, "evaluating"),
            Announce(watch, TrainingEvents.FLLM_EVALUATION_COMPLETED, "generating"),
            Samples(CharacterTokenizer("abcdefghijk"), run_dir, num_tokens=12),
            Announce(watch, TrainingEvents.FLLM_CHECKPOINT_DUE, "saving"),
            checkpointing,
            Saved(watch),
        ),
    )
    watch.trainer = trainer
    return trainer


def _score(trainer: Trainer) -> float | None:
    negative = Criterion().score(trainer)
    return None if negative is None else score_of(-negative)


def score_of(val_loss: float) -> float:
    """Return the score of a validation loss."""
    return -abs(val_loss - BEST_LOSS)


def _watch_the_disk(store: CheckpointStore, watch: Watch) -> None:
    """Give a store the filesystem of the plan, and tell what it does."""
    store.filesystem = DeadlyFilesystem(watch)
    write, prune = store.write, store.prune
    if not watch.plan.is_staged:

        def write(name: str, tree: Any, metadata: Any = None, *, step: int) -> Path:
            target = store.directory / name
            store.directory.mkdir(parents=True, exist_ok=True)
            state = store_module.pack(tree)
            store_module.write_checkpoint(store.filesystem, target, state, metadata or {}, step)
            return target

    def watched_write(name: str, tree: Any, metadata: Any = None, *, step: int) -> Path:
        watch.writing = True  # in this order: a count begins inside what was told
        watch.tell(f"writing {step}")
        return write(name, tree, metadata, step=step)

    def watched_prune(*arguments: Any) -> Any:
        retired = prune(*arguments)
        watch.tell("written")
        watch.writing = False
        return retired

    store.write, store.prune = watched_write, watched_prune  # type: ignore[method-assign]


def live(run_dir: Path, plan: Plan, tell: Tell) -> int:
    """Run to the end, or to a signal; return the exit code.

    Args:
        run_dir: where the run lives, and goes on if it has begun.
        plan: how.
        tell: called with a line at every moment that an observer may act on.
    """
    signal.alarm(LONGEST_SECONDS)
    logging.disable(logging.CRITICAL)  # a hundred lives warn of what each has found
    torch.set_num_threads(1)
    watch = Watch(plan, tell)
    trainer = build(run_dir, watch)
    interrupt_run, save = trainer.interrupt_run, trainer._save

    def heard(number: int) -> None:
        interrupt_run(number)
        watch.received(number)

    trainer.interrupt_run = heard  # type: ignore[method-assign]
    if not plan.is_saved_at_stop:
        trainer._save = (  # type: ignore[method-assign]
            lambda why: save(why) if why is Save.ON_SCHEDULE else None
        )
    survey = Survey(CheckpointStore(run_dir / "checkpoints"), snapshot.check_usable)
    newest = survey.newest()
    if newest is not None:
        trainer.resume(run_dir / "checkpoints" / newest.name, survey)
        if not plan.rng_is_saved:
            torch.manual_seed(99)
        if not plan.position_is_saved:
            place = trainer.train_loader.set_position
            trainer.train_loader.set_position = lambda *_: place(0, 0)
    else:
        trainer.attach_defaults()
    trainer.run()
    if trainer.interrupted_by is not None and not trainer.finished:
        return 128 + trainer.interrupted_by
    (run_dir / RESULT).write_text(json.dumps(outcome(run_dir, trainer)))
    return 0


def outcome(run_dir: Path, trainer: Trainer) -> dict[str, Any]:
    """Return what must be the same however often the run was stopped."""
    state = snapshot.capture(trainer)
    for name in ("elapsed_before", "run_id"):
        del state["trainer"][name]
    lines = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        for line in (run_dir / name).read_text().splitlines():
            record = json.loads(line)
            lines.append({k: v for k, v in record.items() if k not in UNREPEATABLE})
    return {"weights": digest(state["model"]), "state": digest(state), "lines": lines}


def digest(tree: Mapping[str, Any]) -> str:
    """Return a hash of every value and every tensor's bits in a state."""
    plain, tensors = state_tree.flatten(tree)
    result = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


class Child:
    """A forked worker and what it tells.

    Args:
        run_dir: of the run.
        plan: how it runs.
    """

    def __init__(self, run_dir: Path, plan: Plan) -> None:
        self.told: list[str] = []
        self._begin(run_dir, plan)

    def _begin(self, run_dir: Path, plan: Plan) -> None:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # Python warns of forks beside threads; the child uses none of its parent's.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.close(reader)
                code = told_life(run_dir, plan, writer)
            finally:  # a fork must never return into its parent's code
                os._exit(code)
        os.close(writer)
        self._pipe = os.fdopen(reader, "r", encoding="utf-8")

    def listen(self) -> Iterator[str]:
        """Yield what it tells until it ends."""
        for line in self._pipe:
            self.told.append(line.rstrip("\n"))
            yield self.told[-1]

    def kill(self, number: int) -> None:
        """Send a signal; nothing is sent to one that has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Hear it out and return its exit code, negative for the signal that ended it."""
        for _ in self.listen():
            pass
        self._pipe.close()
        return self._reap()

    def _reap(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class ColdChild(Child):
    """A worker in a process that was started, as a user's run is."""

    def _begin(self, run_dir: Path, plan: Plan) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "fault_injection.worker",
                str(run_dir),
                json.dumps(asdict(plan)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self._pipe = self._process.stdout  # type: ignore[assignment]

    def _reap(self) -> int:
        return self._process.wait()


def told_life(run_dir: Path, plan: Plan, writer: int) -> int:
    """Live, telling into a file descriptor; an exception is told as well."""
    # One system call a line: those of threads and signal handlers never mix.
    try:
        return live(run_dir, plan, lambda line: os.write(writer, f"{line}\n".encode()) and None)
    except BaseException as error:  # whatever it is, the observer shall hear of it
        os.write(writer, f"error {error!r}\n".encode())
        return 70


def undisturbed(run_dir: Path) -> dict[str, Any]:
    """Return the outcome of a run that nobody stops."""
    run_dir.mkdir(parents=True)
    child = Child(run_dir, Plan())
    code = child.wait()
    if code != 0:
        raise RuntimeError(f"the undisturbed run ended with {code}: {child.told[-3:]}")
    return result_of(run_dir)


def result_of(run_dir: Path) -> dict[str, Any]:
    """Return the outcome that a finished run has written."""
    result: dict[str, Any] = json.loads((run_dir / RESULT).read_text())
    return result


def steps_told(told: list[str], word: str) -> list[int]:
    """Return the steps at which a word was told."""
    return [int(line.split()[1]) for line in told if line.split()[0] == word]


if __name__ == "__main__":
    sys.exit(
        told_life(
            Path(sys.argv[1]),
            Plan(**json.loads(sys.argv[2])) if len(sys.argv) > 2 else Plan(),
            sys.stdout.fileno(),
        )
    )
