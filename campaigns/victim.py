"""A small real run to be killed: it goes on from what it finds, and tells where it stands.

It is forked, not started: a fork of a process that has imported torch costs milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events

from fundamentallm.config import TrainingConfig
from fundamentallm.data.loader import TokenWindowLoader, ValidationLoader, Window
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_model, tiny_tokens
from fundamentallm.training import snapshot
from fundamentallm.training.filesystem import Filesystem
from fundamentallm.training.handlers import (
    Checkpointing,
    LossEMA,
    MetricsLog,
    Perplexity,
    Samples,
    Signals,
    WeightEMA,
)
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.schedulers import CosineAnnealingScheduler
from fundamentallm.training.store import CheckpointStore
from fundamentallm.training.trainer import Trainer

STEPS = 24
UNREPEATABLE = ("elapsed_seconds", "train/tokens_per_second", "train/samples_per_second")
RESULT = "result.json"


@dataclass(frozen=True)
class Plan:
    """How the victim runs.

    Args:
        asynchronous: save in a thread.
        kill_at: SIGKILL itself at this operation of a save that changes the disk, from 0.
        slow: seconds that a batch, a validation batch and a file's sync take besides.
        rng_is_saved: False forgets the random numbers at a resume, which must be noticed.
        in_place: write checkpoints without staging, which must be noticed.
    """

    asynchronous: bool = False
    kill_at: int | None = None
    slow: float = 0.0
    rng_is_saved: bool = True
    in_place: bool = False


class DeadlyFilesystem(Filesystem):
    """Ends the process at an operation, and can be slow."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.count = 0

    def _step(self) -> None:
        if self.count == self.plan.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def make_directory(self, path: Path) -> None:
        self._step()
        super().make_directory(path)

    def write(self, file: Any, data: memoryview) -> int:
        self._step()
        return super().write(file, data)

    def sync(self, file: Any) -> None:
        self._step()
        time.sleep(self.plan.slow)
        super().sync(file)

    def sync_directory(self, path: Path) -> None:
        self._step()
        super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def remove_file(self, path: Path) -> None:
        self._step()
        super().remove_file(path)

    def remove_directory(self, path: Path) -> None:
        self._step()
        super().remove_directory(path)


class SlowWindows(TokenWindowLoader):
    """Windows that one has to wait for."""

    seconds = 0.0

    def window_at(self, epoch: int, step: int) -> Window:
        time.sleep(self.seconds)
        return super().window_at(epoch, step)


class SlowValidation(ValidationLoader):
    """Validation batches that one has to wait for."""

    seconds = 0.0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in super().__iter__():
            time.sleep(self.seconds)
            yield batch


def build(run_dir: Path, plan: Plan) -> Trainer:
    """Return the trainer of a run with dropout, accumulation, averages and a schedule."""
    torch.manual_seed(7)
    tokens = tiny_tokens(1_000)
    train = SlowWindows(tokens[:800], 8, 2, accumulation_steps=3, seed=5)
    val = SlowValidation(tokens[800:], 8, 4)
    train.seconds = val.seconds = plan.slow
    model = tiny_model(dropout=0.2)
    optimizer = OptimizerBuilder.build("adamw", model, 1e-2)
    scheduler = CosineAnnealingScheduler(optimizer, STEPS, warmup_steps=4, min_lr=1e-4)
    checkpointing = Checkpointing(
        run_dir / "checkpoints", n_saved=2, asynchronous=plan.asynchronous
    )
    checkpointing.store.filesystem = DeadlyFilesystem(plan)
    tokenizer = CharacterTokenizer("abcdefghijk")
    return Trainer(
        model,
        train,
        val,
        optimizer,
        scheduler,
        device="cpu",
        config=TrainingConfig(total_steps=STEPS, eval_steps=4, log_steps=1),
        handlers=(
            LossEMA(),
            Perplexity(),
            WeightEMA(0.9),
            checkpointing,
            MetricsLog(run_dir),
            Samples(tokenizer, run_dir, num_tokens=12),
            Signals(),
        ),
    )


def live(run_dir: Path, plan: Plan, tell: Callable[[str], None]) -> int:
    """Run to the end, or to a signal; return the exit code.

    Args:
        run_dir: where the run lives, and goes on if it has begun.
        plan: how.
        tell: called with a line at every moment that an observer may act on.
    """
    torch.set_num_threads(1)
    if plan.in_place:
        _write_in_place()
    trainer = build(run_dir, plan)
    trainer.attach_defaults()
    trainer.add_event_handler(TrainingEvents.FLLM_RUN_STARTED, lambda: tell("ready"))
    trainer.add_event_handler(
        Events.ITERATION_STARTED, lambda: tell(f"step {trainer.state.iteration}")
    )
    for event, word in (
        (TrainingEvents.FLLM_EVALUATION_STARTED, "evaluating"),
        (TrainingEvents.FLLM_EVALUATION_COMPLETED, "sampling"),
        (TrainingEvents.FLLM_CHECKPOINT_SAVED, "saved"),
    ):
        trainer.add_event_handler(
            event, lambda word=word: tell(f"{word} {trainer.state.iteration}")
        )
    # First in line at this event: the save itself is a handler of it.
    due = trainer._event_handlers[TrainingEvents.FLLM_CHECKPOINT_DUE]
    trainer.add_event_handler(
        TrainingEvents.FLLM_CHECKPOINT_DUE, lambda: tell(f"saving {trainer.state.iteration}")
    )
    due.insert(0, due.pop())
    newest = CheckpointStore(run_dir / "checkpoints").newest(snapshot.check_usable)
    if newest is not None:
        trainer.resume(run_dir / "checkpoints" / newest.name)
        if not plan.rng_is_saved:
            torch.manual_seed(int(time.time_ns()) % 2**31)
    trainer.run()
    if trainer.interrupted_by is not None and not trainer.finished:
        return 128 + trainer.interrupted_by
    (run_dir / RESULT).write_text(json.dumps(outcome(run_dir, trainer)))
    return 0


def outcome(run_dir: Path, trainer: Trainer) -> dict[str, Any]:
    """Return what must be the same however often the run was stopped."""
    digest = hashlib.sha256()
    for tensor in trainer.model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    lines = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        for line in (run_dir / name).read_text().splitlines():
            record = json.loads(line)
            lines.append({k: v for k, v in record.items() if k not in UNREPEATABLE})
    return {"weights": digest.hexdigest(), "lines": lines}


def _write_in_place() -> None:
    """Break the store: files appear under their final name as they are written."""
    from fundamentallm.training import store as module

    def write(
        self: CheckpointStore, name: str, tree: Any, metadata: Any = None, *, step: int
    ) -> Path:
        target = self.directory / name
        self.directory.mkdir(parents=True, exist_ok=True)
        module.write_checkpoint(self.filesystem, target, module.pack(tree), metadata or {}, step)
        for other in self.step_names()[1:]:
            self.retire([other])  # before anybody knows whether the new one is whole
        return target

    CheckpointStore.write = write  # type: ignore[method-assign]


class Child:
    """A forked victim and what it tells.

    Args:
        run_dir: of the run.
        plan: how it runs.
    """

    def __init__(self, run_dir: Path, plan: Plan) -> None:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # Python warns of forks beside threads; the child uses none of its parent's.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            code = 70
            try:
                code = live(run_dir, plan, lambda line: os.write(writer, f"{line}\n".encode()))
            except BaseException as error:  # a fork must never return into its parent's code
                os.write(writer, f"error {error!r}\n".encode())
            finally:
                os._exit(code)
        os.close(writer)
        self._pipe = os.fdopen(reader, "r", encoding="utf-8")
        self.told: list[str] = []

    def listen(self) -> Iterator[str]:
        """Yield what it tells until it ends."""
        for line in self._pipe:
            self.told.append(line.rstrip("\n"))
            yield self.told[-1]

    def wait(self) -> int:
        """Hear it out and return its exit code, negative for the signal that ended it."""
        for _ in self.listen():
            pass
        self._pipe.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def undisturbed(run_dir: Path) -> dict[str, Any]:
    """Return the outcome of a run that nobody stops."""
    run_dir.mkdir(parents=True)
    child = Child(run_dir, Plan())
    code = child.wait()
    if code != 0:
        raise RuntimeError(f"the undisturbed run ended with {code}: {child.told[-3:]}")
    result: dict[str, Any] = json.loads((run_dir / RESULT).read_text())
    return result
