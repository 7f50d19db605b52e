"""Retention: a run that saves, dies, goes back and is damaged at random, against a simple model.

    python -m fault_injection.retention [--operations 10000] [--seed 0]

A Hypothesis state machine drives a `Checkpointing` handler over a real directory: saves with all
sorts of scores, pins, damage, a kill or a disk error at any operation of a save, restarts, going
back to an earlier step. After each operation a fresh reader must find what the model says: exactly
the newest few, the best and the pinned; every value right; nothing of a stranger touched.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fault_injection.faults import Crash, FaultyFilesystem, scratch_directory
from fundamentallm.config import TrainingConfig
from fundamentallm.data.loaders import TokenWindowLoader, ValidationLoader
from fundamentallm.errors import CheckpointError
from fundamentallm.files.run_layout import CORRUPT, MANIFEST, MODEL, SUPERSEDED
from fundamentallm.testing import UniformModel, tiny_loaders
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.store import CheckpointStore, step_name
from fundamentallm.training.handlers import Checkpointing
from fundamentallm.training.trainer import Trainer

STEPS_A_COURSE = 50
# Two of the finite ones are drawn often: ties. What is not finite, and None, must never be best.
SCORES = st.sampled_from([1.0, 2.0, 2.0, 3.0, -1.0, 4.0, math.nan, math.inf, -math.inf, None])
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)
MAX_OPERATIONS_OF_A_SAVE = 40


@dataclass(frozen=True)
class Saved:
    """What the model remembers of a checkpoint: its value, and the best as known when saved."""

    value: float
    best_score: float
    best_step: int | None


@cache
def loaders() -> tuple[TokenWindowLoader, ValidationLoader]:
    """Return the loaders, which nothing here draws from."""
    return tiny_loaders()


class Retention(RuleBasedStateMachine):
    """The handler beside its model.

    Attributes:
        counts: how often each operation was done, over all courses.
    """

    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self._scratch = scratch_directory()
        self.top = self._scratch.__enter__()
        self.directory = self.top / "run" / "checkpoints"
        self.step = 0
        self.next_value = 1.0
        self.score: float | None = None
        self.whole: dict[int, Saved] = {}
        self.damaged: set[int] = set()
        self.silent: set[int] = set()  # damaged, but this process has seen their right hashes
        self.best: tuple[float, int | None] = (-math.inf, None)
        self.pointers: dict[str, int] = {}
        self.moved: Counter[str] = Counter()
        self.num_saves = 0

    def teardown(self) -> None:
        """Remove the directory."""
        self._scratch.__exit__(None, None, None)

    def _start(self) -> None:
        """Begin a process: a fresh trainer and handler."""
        self.model = UniformModel(11)
        self.trainer = Trainer(
            self.model,
            *loaders(),
            device="cpu",
            config=TrainingConfig(total_steps=10**6, checkpoint_dir=str(self.directory)),
        )
        self.handler = Checkpointing(
            self.directory, self.n_saved, score_function=lambda trainer: self.score
        )
        self.handler.attach(self.trainer)
        self._repair_disk()
        self.silent = set()

    def _repair_disk(self) -> FaultyFilesystem:
        return self._use(FaultyFilesystem(None, Crash))

    def _use(self, filesystem: FaultyFilesystem) -> FaultyFilesystem:
        self.handler.store.filesystem = filesystem
        return filesystem

    @initialize(n_saved=st.integers(2, 4))
    def begin(self, n_saved: int) -> None:
        """Begin a run in a directory that holds a stranger's files already."""
        self.n_saved = n_saved
        self.directory.mkdir(parents=True)
        (self.top / "run" / "notes.txt").write_text("mine")
        (self.directory / "README").write_text("step-00000001 is dear to me")
        (self.directory / ".notes.old").write_text("mine")
        stranger = CheckpointStore(self.directory, FaultyFilesystem(None, Crash))
        stranger.write("release", {"model": {"bias": torch.zeros(3)}}, step=7)
        shutil.copytree(self.directory / "release", self.top / "run" / "other" / step_name(1))
        self.strangers = self._stranger_files()
        self._start()

    def _stranger_files(self) -> dict[str, bytes]:
        places = [self.top / "run" / "notes.txt", self.top / "run" / "other", self.directory]
        names = ("README", ".notes.old", "release")
        files = [places[0], *places[1].rglob("*")]
        files += [
            path for name in names for path in [places[2] / name, *(places[2] / name).glob("*")]
        ]
        return {str(path): path.read_bytes() for path in files if path.is_file()}

    # Saving

    def _attempt(self, score: float | None, ahead: int, filesystem: FaultyFilesystem) -> Any:
        """Save a new step; return the error."""
        self.step += ahead
        self.score = score
        self.value, self.next_value = self.next_value, self.next_value + 1.0
        with torch.no_grad():
            self.model.bias.fill_(self.value)
        self.trainer.state.iteration = self.step
        # A store reads the hashes of a content once, and goes by what it saw.
        self.silent = {s for s in self.silent if step_name(s) in self.handler.store._known_whole}
        self._use(filesystem)
        error: BaseException | None = None
        try:
            self.handler(self.trainer)
        except (CheckpointError, Crash) as caught:
            error = caught
        self._repair_disk()
        return error

    def _best_after(self, score: float | None) -> tuple[float, int | None]:
        if score is None or not math.isfinite(score) or score <= self.best[0]:
            return self.best
        return score, self.step

    def _saved(self, best: tuple[float, int | None]) -> None:
        """Note a save that went through, and what it deletes."""
        self.num_saves += 1
        self.best = best
        self.whole[self.step] = Saved(self.value, *best)
        self._point_at(self.step)
        for step in self._victims():
            self.whole.pop(step, None)
            self.silent.discard(step)
            self.damaged.discard(step)

    def _point_at(self, step: int) -> None:
        self.pointers["last"] = step
        self.pointers.pop("best", None)
        if self.best[1] is not None:
            self.pointers["best"] = self.best[1]

    def _victims(self) -> set[int]:
        """Return what is deleted once the current step is saved."""
        steps = {*self.whole, *self.damaged}
        if len(steps) <= self.n_saved:
            return set()
        counted = sorted({*self.whole, *self.silent}, reverse=True)
        kept = {*counted[: self.n_saved], *self.pointers.values(), self.best[1]}
        return set(counted) - kept

    @rule(score=SCORES, ahead=st.integers(1, 3))
    def save(self, score: float | None, ahead: int) -> None:
        """Save on a sound disk."""
        best_before = self.best
        error = self._attempt(score, ahead, FaultyFilesystem(None, Crash))
        assert error is None, error
        self._saved(self._best_after(score))
        assert (self.handler.best_score, self.handler.best_step) == self.best
        assert self.best == best_before or score is not None
        self.counts["save"] += 1

    @rule(score=SCORES, at=st.integers(0, MAX_OPERATIONS_OF_A_SAVE))
    def kill(self, score: float | None, at: int) -> None:
        """Kill the process at an operation of a save, then start it again."""
        error = self._attempt(score, 1, FaultyFilesystem(at, Crash))
        self._after_a_fault(error, score)
        self.counts["kill" if error else "save"] += 1
        if error is not None:
            self._start()
            self._resume_newest()

    @rule(
        score=SCORES,
        at=st.integers(0, MAX_OPERATIONS_OF_A_SAVE),
        code=st.sampled_from(ERRORS),
        goes_on=st.booleans(),
    )
    def disk_error(self, score: float | None, at: int, code: int, goes_on: bool) -> None:
        """Let an operation of a save fail; the run stops, or goes on without that checkpoint."""
        error = self._attempt(score, 1, FaultyFilesystem(at, lambda: OSError(code, "fault")))
        assert not isinstance(error, Crash)
        self._after_a_fault(error, score)
        self.counts["disk_error" if error else "save"] += 1
        if error is not None and not goes_on:
            self._start()
            self._resume_newest()

    def _after_a_fault(self, error: BaseException | None, score: float | None) -> None:
        """Hold what the disk may now hold against what it holds, and take note of it."""
        best = self._best_after(score)
        if error is None:
            self._saved(best)
            return
        before = dict(self.whole), set(self.damaged), dict(self.pointers), self.best
        silent = set(self.silent)
        num_saves = self.num_saves
        value = self.value
        self._saved(best)
        after, pointers_after = dict(self.whole), dict(self.pointers)
        victims = set(before[0]) - set(after) | (before[1] - self.damaged)
        self.whole, self.damaged, self.pointers, self.best = before
        self.silent, self.num_saves = silent, num_saves
        reader = CheckpointStore(self.directory)
        found = {int(name[5:]) for name in reader.step_names()}
        lost = ({*self.whole, *self.damaged} - found) - victims
        assert not lost, f"a failed save lost steps {lost}"
        for step in victims - found:
            assert self.step in found, "deleted before the new one was committed"
            self.whole.pop(step, None)
            self.damaged.discard(step)
            self.silent.discard(step)
        if self.step in found:
            self.num_saves += 1
            self.whole[self.step] = Saved(value, *best)
            self.best = best  # committed: what failed after that takes nothing back
            for pointer in ("last", "best"):
                now = reader.pointed(pointer)
                known = {self.pointers.get(pointer), pointers_after.get(pointer)}
                assert now in {None if step is None else step_name(step) for step in known}
                self.pointers.pop(pointer, None)
                if now is not None:
                    self.pointers[pointer] = int(now[5:])
        if isinstance(error, CheckpointError):
            assert (self.handler.best_score, self.handler.best_step) == self.best

    # The rest of a run's life

    def _resume_newest(self) -> None:
        newest = CheckpointStore(self.directory).newest(snapshot.check_usable)
        expected = max(self.whole, default=None)
        assert (newest.step if newest else None) == expected
        if expected is not None:
            self._restore(expected)
        else:
            self.step = 0
            self.best = (-math.inf, None)

    def _restore(self, step: int) -> None:
        self.handler.restore(self.trainer, self.directory / step_name(step))
        assert self.model.bias.tolist() == [self.whole[step].value] * 11
        assert self.trainer.state.iteration == step
        self.step = step
        self.moved[CORRUPT] += len(self.damaged)
        self.damaged, self.silent = set(), set()
        later = {other for other in self.whole if other > step}
        self.moved[SUPERSEDED] += len(later)
        self.whole = {other: saved for other, saved in self.whole.items() if other <= step}
        saved = self.whole[step]
        held = saved.best_step in self.whole
        self.best = (saved.best_score, saved.best_step) if held else (-math.inf, None)
        assert (self.handler.best_score, self.handler.best_step) == self.best
        self._point_at(step)

    @precondition(lambda self: self.whole)
    @rule()
    def restart(self) -> None:
        """Stop the process, and go on from the newest checkpoint in another."""
        self._start()
        self._resume_newest()
        self.counts["restart"] += 1

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), fresh=st.booleans())
    def go_back(self, data: st.DataObject, fresh: bool) -> None:
        """Go on from any checkpoint, in this process or in another; later ones are superseded."""
        step = data.draw(st.sampled_from(sorted(self.whole)))
        if fresh:
            self._start()
        self._restore(step)
        self.counts["go_back"] += 1

    @precondition(lambda self: len(self.whole) > 1)
    @rule(data=st.data(), loud=st.booleans())
    def damage(self, data: st.DataObject, loud: bool) -> None:
        """Damage a checkpoint: cut a file short, or flip one bit."""
        step = data.draw(st.sampled_from(sorted(self.whole)))
        path = self.directory / step_name(step) / (MANIFEST if loud else MODEL)
        if loud:
            os.truncate(path, path.stat().st_size // 2)
        else:
            contents = bytearray(path.read_bytes())
            contents[-1] ^= 1
            path.write_bytes(contents)
            self.silent.add(step)
        del self.whole[step]
        self.damaged.add(step)
        self.counts["damage"] += 1

    @precondition(lambda self: self.whole)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        """Let a pointer of the user name a checkpoint."""
        step = data.draw(st.sampled_from(sorted(self.whole)))
        self.handler.store.point("pinned", step_name(step))
        self.pointers["pinned"] = step
        self.counts["pin"] += 1

    @precondition(lambda self: "pinned" in self.pointers)
    @rule()
    def unpin(self) -> None:
        """Remove the user's pointer."""
        (self.directory / "pinned").unlink()
        del self.pointers["pinned"]
        self.counts["unpin"] += 1

    # What must hold after each

    @invariant()
    def disk_is_as_the_model_says(self) -> None:
        """Read everything anew."""
        if not hasattr(self, "strangers"):
            return
        store = CheckpointStore(self.directory)
        found = {int(name[5:]) for name in store.step_names()}
        expected = {*self.whole, *self.damaged}
        assert found == expected, f"steps {sorted(found)}, not {sorted(expected)}"
        for step, saved in self.whole.items():
            tree = store.read(self.directory / step_name(step))
            assert tree["model"]["bias"].tolist() == [saved.value] * 11
            assert tree["trainer"]["iteration"] == step
        for step in self.damaged:
            assert_damaged(store, self.directory / step_name(step))
        assert self._stranger_files() == self.strangers
        for pointer in ("best", "last", "pinned"):
            named = self.pointers.get(pointer)
            assert store.pointed(pointer) == (None if named is None else step_name(named))
        if self.best[1] is not None and self.best[1] not in self.damaged:
            assert self.best[1] in self.whole, "the best is lost"
        hurt = bool(self.damaged) or self.moved.total() > 0
        if not hurt:
            assert len(self.whole) >= min(2, self.num_saves)
        for place, number in self.moved.items():
            path = self.directory / place
            assert len(list(path.iterdir()) if path.exists() else []) == number


def assert_damaged(store: CheckpointStore, path: Path) -> None:
    """Check that a damaged checkpoint does not read."""
    try:
        store.read(path)
    except CheckpointError:
        return
    raise AssertionError(f"{path.name} is damaged, and was read")


def run(operations: int, first_seed: int = 0) -> Counter[str]:
    """Run courses until at least so many operations were done; return how many of each kind.

    Raises:
        AssertionError: a promise was broken; Hypothesis prints the shortest course that does it.
    """
    Retention.counts = Counter()
    number = first_seed
    while (left := operations - Retention.counts.total()) > 0:
        number += 1
        machine = seed(number)(type("Retention", (Retention,), {}))
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=min(50, -(-left // STEPS_A_COURSE)),
                stateful_step_count=STEPS_A_COURSE,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate,),
            ),
        )
    return Retention.counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials, print its counts as JSON, and return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description="Which checkpoints stay.")
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.getLogger("fundamentallm").setLevel(logging.ERROR)
    start = time.monotonic()
    failure = ""
    try:
        run(options.operations, options.seed)
    except Exception as error:  # an assertion, or whatever a broken store raises
        failure = f"{type(error).__name__}: {error}"
        notes = getattr(error, "__notes__", [])
        failure += "\n" + "\n".join(notes)
    report = {
        "series": "retention",
        "seed": options.seed,
        "operations": Retention.counts.total(),
        "kinds": dict(sorted(Retention.counts.items())),
        "failure": failure,
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps(report, indent=2))
    return 1 if failure else 0


if __name__ == "__main__":
    raise SystemExit(main())
