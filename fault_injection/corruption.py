"""Corruption: damaged checkpoints are refused before anything live changes; sound ones load whole.

    python -m fault_injection.corruption [--injections 5000] [--clean 500] [--seed 0]

The checkpoints are those of a small trainer with optimizer, weight EMA and random generators. Each
injection damages one of them on the disk. `store.read` and `Trainer.resume` must both refuse it
with a CheckpointError; weights, moments, averages, counters and random generators must stay as
they were, to the bit, and so must the disk; the newest usable checkpoint must be another.

Sound checkpoints of random states must load, after every live tensor was filled with NaN and every
generator moved on: what then equals the saved state to the bit was read from it. Checkpoints with
right hashes are refused all the same if a number is not finite, or if a part of the trainer cannot
take its share; then, too, nothing live has changed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fault_injection.faults import Crash, FaultyFilesystem, scratch_directory
from fundamentallm.config import TrainingConfig
from fundamentallm.errors import CheckpointError
from fundamentallm.files.run_layout import MANIFEST
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.directory import ALL_FILES
from fundamentallm.training.checkpoint.finite import LEARNED
from fundamentallm.training.checkpoint.store import CheckpointStore, step_name
from fundamentallm.training.checkpoint.tree import copied, flatten
from fundamentallm.training.handlers import Checkpointing, WeightEMA
from fundamentallm.training.trainer import Trainer

PAGE = 4096
STEPS = (2, 4, 6)
SHOWN_FAILURES = 5
Files = dict[str, bytes]


# The injections: each damages the directory of a checkpoint. They are given what it holds and what
# the checkpoints of other steps hold, and return False where the choice happened to change nothing.


@dataclass(frozen=True)
class Target:
    """A checkpoint to damage.

    Args:
        path: its directory.
        files: its contents.
        others: the contents of the other steps' checkpoints.
        outside: a directory outside the run, for links to lead to.
    """

    path: Path
    files: Files
    others: Sequence[Files]
    outside: Path

    def replace(self, name: str, contents: bytes) -> bool:
        """Put other contents in a file; tell whether they are other."""
        (self.path / name).write_bytes(contents)
        return contents != self.files[name]


def _some_file(target: Target, rng: random.Random) -> str:
    return rng.choice(sorted(target.files))


def flip_bit(target: Target, rng: random.Random) -> bool:
    """Flip one bit."""
    name = _some_file(target, rng)
    contents = bytearray(target.files[name])
    contents[rng.randrange(len(contents))] ^= 1 << rng.randrange(8)
    return target.replace(name, bytes(contents))


def change_byte(target: Target, rng: random.Random) -> bool:
    """Set one byte to another value."""
    name = _some_file(target, rng)
    contents = bytearray(target.files[name])
    contents[rng.randrange(len(contents))] = rng.randrange(256)
    return target.replace(name, bytes(contents))


def overwrite_range(target: Target, rng: random.Random) -> bool:
    """Overwrite a few hundred bytes with noise."""
    name = _some_file(target, rng)
    contents = bytearray(target.files[name])
    start = rng.randrange(len(contents))
    stop = min(len(contents), start + rng.randint(1, 600))
    contents[start:stop] = rng.randbytes(stop - start)
    return target.replace(name, bytes(contents))


def truncate(target: Target, rng: random.Random) -> bool:
    """Cut a file short, often to nothing or by one byte."""
    name = _some_file(target, rng)
    size = len(target.files[name])
    return target.replace(
        name, target.files[name][: rng.choice((0, size - 1, rng.randrange(size)))]
    )


def append(target: Target, rng: random.Random) -> bool:
    """Append bytes, often ones that a parser would pass over."""
    name = _some_file(target, rng)
    tail = rng.choice((b"\n", b" ", b"\0", rng.randbytes(rng.randint(1, 100)), bytes(PAGE)))
    return target.replace(name, target.files[name] + tail)


def zero_page(target: Target, rng: random.Random) -> bool:
    """Lose one 4 KiB page to zeros."""
    name = _some_file(target, rng)
    contents = bytearray(target.files[name])
    start = rng.randrange(0, len(contents), PAGE)
    stop = min(len(contents), start + PAGE)
    contents[start:stop] = bytes(stop - start)
    return target.replace(name, bytes(contents))


def exchange_pages(target: Target, rng: random.Random) -> bool:
    """Exchange two pages of a file."""
    name = _some_file(target, rng)
    contents = target.files[name]
    pages = [contents[start : start + PAGE] for start in range(0, len(contents), PAGE)]
    first, second = (rng.randrange(len(pages)) for _ in range(2))
    pages[first], pages[second] = pages[second], pages[first]
    return target.replace(name, b"".join(pages))


def swap_file(target: Target, rng: random.Random) -> bool:
    """Take a file, or two or three, from the checkpoint of another step."""
    other = rng.choice(target.others)
    names = rng.sample(sorted(target.files), rng.choice((1, 1, 2, 3)))
    changes = [target.replace(name, other[name]) for name in names]
    return any(changes)


def swap_within(target: Target, rng: random.Random) -> bool:
    """Exchange two files of one checkpoint."""
    first, second = rng.sample(sorted(target.files), 2)
    changes = [
        target.replace(first, target.files[second]),
        target.replace(second, target.files[first]),
    ]
    return all(changes)


def stale_manifest(target: Target, rng: random.Random) -> bool:
    """Put another step's manifest there."""
    return target.replace(MANIFEST, rng.choice(target.others)[MANIFEST])


def another_step(target: Target, rng: random.Random) -> bool:
    """Put another step's whole checkpoint under this step's name."""
    changes = [target.replace(name, data) for name, data in rng.choice(target.others).items()]
    return any(changes)


def edit_manifest(target: Target, rng: random.Random) -> bool:
    """Change a field of the manifest, or only how it is written, and leave its hash."""
    fields = json.loads(target.files[MANIFEST])
    match rng.randrange(6):
        case 0:
            fields["step"] += rng.choice((-1, 1))
        case 1:
            fields["metadata"]["val_loss"] = rng.random()
        case 2:
            del fields[rng.choice(sorted(fields))]
        case 3:
            fields["files"].pop(rng.choice(sorted(fields["files"])))
        case 4:
            rng.choice(list(fields["files"].values()))["size"] += 1
        case _:
            return target.replace(MANIFEST, json.dumps(fields, indent=3).encode())
    return target.replace(MANIFEST, (json.dumps(fields, sort_keys=True, indent=2) + "\n").encode())


def remove_files(target: Target, rng: random.Random) -> bool:
    """Lose one file or more."""
    for name in rng.sample(sorted(target.files), rng.randint(1, len(target.files))):
        (target.path / name).unlink()
    return True


def add_file(target: Target, rng: random.Random) -> bool:
    """Add a file or a directory."""
    names = ("notes.txt", "model.safetensors.bak", ".hidden", "model-2.safetensors", "optim.pt")
    path = target.path / rng.choice(names)
    if rng.random() < 0.2:
        path.mkdir()
    else:
        path.write_bytes(rng.choice((b"", rng.choice(sorted(target.files.values())))))
    return True


def collide_in_case(target: Target, rng: random.Random) -> bool:
    """Add a file, or rename one, so that its name differs in case alone."""
    name = _some_file(target, rng)
    other = rng.choice((name.swapcase(), name.capitalize().replace("Manifest", "manifest")))
    if other == name:
        return False
    if rng.random() < 0.5:
        (target.path / name).rename(target.path / other)
    else:
        (target.path / other).write_bytes(target.files[name])
    return True


def link_file(target: Target, rng: random.Random) -> bool:
    """Put a symbolic link to the very same contents in place of a file; or a dangling one."""
    name = _some_file(target, rng)
    (target.path / name).unlink()
    if rng.random() < 0.8:
        (target.outside / name).write_bytes(target.files[name])
    (target.path / name).symlink_to(target.outside / name)
    return True


def link_directory(target: Target, rng: random.Random) -> bool:
    """Put a symbolic link to the very same checkpoint in place of its directory."""
    target.path.rename(target.outside / target.path.name)
    target.path.symlink_to(target.outside / target.path.name)
    return True


def no_regular_file(target: Target, rng: random.Random) -> bool:
    """Put a pipe or a directory in place of a file."""
    path = target.path / _some_file(target, rng)
    path.unlink()
    if rng.random() < 0.5:
        os.mkfifo(path)
    else:
        path.mkdir()
    return True


INJECTIONS: Mapping[str, Callable[[Target, random.Random], bool]] = {
    function.__name__: function
    for function in (
        *(flip_bit, change_byte, overwrite_range, truncate, append, zero_page, exchange_pages),
        *(swap_file, swap_within, stale_manifest, another_step, edit_manifest, remove_files),
        *(add_file, collide_in_case, link_file, link_directory, no_regular_file),
    )
}
# Some of these have few distinct outcomes; what strikes a random place is drawn more often.
WEIGHTS = {"flip_bit": 6, "change_byte": 4, "truncate": 3, "append": 2, "zero_page": 2}

# Items of a state that a load cannot do without, from the first that is loaded to the last.
UNFIT_WITHOUT: Sequence[tuple[str | int, ...]] = (
    ("trainer",),
    ("trainer", "ledger"),
    ("trainer", "run_id"),
    ("model", "head.weight"),
    ("optimizer",),
    ("optimizer", "param_groups"),
    ("optimizer", "state", 0, "step"),
    ("precision",),
    ("handlers",),
    ("handlers", "weight_ema", "averages"),
    ("handlers", "checkpointing", "best_step"),
    ("random",),
    ("random", "rank 0", "python"),
)


# The live objects


def make_trainer(checkpoint_dir: Path) -> Trainer:
    """Return a trainer with weight EMA whose clock stands still."""
    torch.manual_seed(3)
    train, val = tiny_loaders()
    config = TrainingConfig(
        learning_rate=1e-2,
        total_steps=STEPS[-1],
        eval_steps=STEPS[0],
        checkpoint_dir=str(checkpoint_dir),
    )
    handlers = (WeightEMA(0.9), Checkpointing(checkpoint_dir, n_saved=len(STEPS) + 1))
    trainer = Trainer(
        tiny_model(dropout=0.1), train, val, device="cpu", config=config, handlers=handlers
    )
    trainer.budget.clock = lambda: 0.0
    return trainer


def fingerprint(state: Mapping[str, Any]) -> str:
    """Return a hash over every value and every bit of a state."""
    skeleton, tensors = flatten(dict(state))
    digest = hashlib.sha256(json.dumps(skeleton, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def live_tensors(trainer: Trainer) -> Iterator[Tensor]:
    """Yield every floating-point tensor that a load must write: weights, moments, averages."""
    state = snapshot.capture(trainer)
    for tensor in flatten({part: state[part] for part in LEARNED})[1].values():
        if tensor.is_floating_point():
            yield tensor


def set_live(trainer: Trainer, fill: Callable[[Tensor], Any], seed: int) -> None:
    """Fill every live tensor, seed every generator, and move the counters."""
    with torch.no_grad():
        for tensor in live_tensors(trainer):
            fill(tensor)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    trainer.state.tokens_seen = seed
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1.0 / (seed + 1)


def contents_of(path: Path) -> Files:
    """Read the files of a checkpoint."""
    return {name: (path / name).read_bytes() for name in sorted(ALL_FILES)}


def shape_of(directory: Path) -> list[tuple[str, int, int]]:
    """Return name, kind and size of everything below a directory, links not followed."""
    paths = sorted(directory.rglob("*"))
    return [
        (str(path), status.st_mode, status.st_size)
        for path, status in ((path, path.lstat()) for path in paths)
    ]


# The trials


@dataclass
class Result:
    """Counts of the trials, and the first failures."""

    injections: Counter[str] = field(default_factory=Counter)
    detected: int = 0
    clean: int = 0
    accepted: int = 0
    nonfinite: int = 0
    nonfinite_refused: int = 0
    unfit: int = 0
    unfit_refused: int = 0
    tensors_a_load: int = 0
    failures: list[str] = field(default_factory=list)


class Trials:
    """A trained trainer, its checkpoints, and everything that is done to them.

    Args:
        scratch: an empty directory to work in.
        seed: of the choices.
    """

    def __init__(self, scratch: Path, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.result = Result()
        self.directory = scratch / "run" / "checkpoints"
        self.outside = scratch / "outside"
        self.clean_directory = scratch / "clean"
        self.outside.mkdir()
        self.trainer = make_trainer(self.directory)
        self.trainer.train()
        self.pristine = {step: contents_of(self.directory / step_name(step)) for step in STEPS}

    def inject(self, count: int) -> None:
        """Damage checkpoints, one at a time, each in another way."""
        kinds = [kind for kind in INJECTIONS for _ in range(WEIGHTS.get(kind, 1))]
        before = fingerprint(snapshot.capture(self.trainer))
        done = 0
        while done < count:
            kind = kinds[done % len(kinds)]
            step = self.rng.choice(STEPS)
            path = self.directory / step_name(step)
            others = [files for other, files in self.pristine.items() if other != step]
            target = Target(path, self.pristine[step], others, self.outside)
            if INJECTIONS[kind](target, self.rng):
                done += 1
                self.result.injections[kind] += 1
                try:
                    fault = self._undetected(path, step, before)
                except Exception as error:  # no CheckpointError: the damage got further than it may
                    fault = f"it raised {type(error).__name__}: {error}"
                self.result.detected += not fault
                if fault:
                    self.result.failures.append(f"{kind} of {path.name}: {fault}")
                    self._begin_anew()
                    before = fingerprint(snapshot.capture(self.trainer))
            self._mend(path, step)

    def _undetected(self, path: Path, step: int, before: str) -> str:
        """Return what went wrong with a damaged checkpoint, or nothing."""
        shape = shape_of(self.directory)
        store = CheckpointStore(self.directory)
        if not refuses(lambda: store.read(path)):
            return "store.read returned it"
        if not refuses(lambda: self.trainer.resume(path)):
            return "Trainer.resume loaded it"
        if fingerprint(snapshot.capture(self.trainer)) != before:
            return "the refused load changed something live"
        newest = store.newest(snapshot.check_usable)
        if newest is None or newest.step != max(set(STEPS) - {step}, key=lambda s: (s != step, s)):
            return f"the newest usable one is {newest and newest.step}"
        if shape_of(self.directory) != shape:
            return "the refused load changed the disk"
        return ""

    def _begin_anew(self) -> None:
        """After a damaged one was loaded, put the whole directory back."""
        shutil.rmtree(self.directory)
        self.directory.mkdir()
        for step in STEPS:
            self._mend(self.directory / step_name(step), step)

    def _mend(self, path: Path, step: int) -> None:
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
        for left in self.outside.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        path.mkdir()
        for name, contents in self.pristine[step].items():
            (path / name).write_bytes(contents)

    def accept(self, count: int) -> None:
        """Save random states, forget them, and load them."""
        store = CheckpointStore(self.clean_directory, FaultyFilesystem(None, Crash))
        self.result.tensors_a_load = sum(1 for _ in live_tensors(self.trainer))
        # The best checkpoint lies elsewhere: who loads from this directory has none.
        checkpointing = self.trainer.attached["checkpointing"]
        checkpointing.best_score, checkpointing.best_step = -math.inf, None
        for number in range(count):
            set_live(self.trainer, lambda tensor: tensor.normal_(), number)
            state = snapshot.capture(self.trainer)
            state["objects"] = {}
            saved = fingerprint({**state, "objects": {}})
            path = store.write(step_name(number), state, {"run_id": "x"}, step=number)
            set_live(self.trainer, lambda tensor: tensor.fill_(math.nan), number + 1)
            self.result.clean += 1
            fault = self._unread(path, saved)
            self.result.accepted += not fault
            if fault:
                self.result.failures.append(f"clean {number}: {fault}")
            shutil.rmtree(path)

    def _unread(self, path: Path, saved: str) -> str:
        """Return what is wrong with the load of a sound checkpoint, or nothing."""
        try:
            self.trainer.resume(path)
        except CheckpointError as error:
            return f"it was refused: {error}"
        if any(not bool(torch.isfinite(tensor).all()) for tensor in live_tensors(self.trainer)):
            return "a tensor was not read: it still holds NaN"
        if fingerprint({**snapshot.capture(self.trainer), "objects": {}}) != saved:
            return "the loaded state is not the saved one"
        return ""

    def refuse_nonfinite(self, every: int = 1) -> None:
        """Save states with one number that is none, in every n-th tensor, under right hashes."""
        store = CheckpointStore(self.clean_directory, FaultyFilesystem(None, Crash))
        set_live(self.trainer, lambda tensor: tensor.normal_(), 0)
        before = fingerprint(snapshot.capture(self.trainer))
        sound = {**snapshot.capture(self.trainer), "objects": {}}
        store.write(step_name(1), sound, {}, step=1)
        names = [
            name
            for name, tensor in flatten(sound)[1].items()
            if tensor.is_floating_point() and name.split(".", 1)[0] in LEARNED
        ]
        for name in names[::every]:
            for value in (math.nan, math.inf, -math.inf):
                state = copied(sound)
                tensor = flatten(state)[1][name].reshape(-1)
                tensor[self.rng.randrange(tensor.numel())] = value
                path = store.write(step_name(2), state, {}, step=2)
                self.result.nonfinite += 1
                fault = ""
                if store.verify(path).step != 2:
                    fault = "it does not verify"
                elif not refuses(functools.partial(self.trainer.resume, path)):
                    fault = "it was loaded"
                elif fingerprint(snapshot.capture(self.trainer)) != before:
                    fault = "the refused load changed something live"
                newest = store.newest(snapshot.check_usable)
                if newest is None or newest.step != 1:
                    fault = fault or "the newest usable one is not the one before"
                self.result.nonfinite_refused += not fault
                if fault:
                    self.result.failures.append(f"{value} in {name}: {fault}")

    def refuse_unfit(self) -> None:
        """Save states that a part of the trainer cannot take, each under right hashes."""
        store = CheckpointStore(self.clean_directory, FaultyFilesystem(None, Crash))
        set_live(self.trainer, lambda tensor: tensor.normal_(), 0)
        sound = copied({**snapshot.capture(self.trainer), "objects": {}})
        set_live(self.trainer, lambda tensor: tensor.normal_(), 1)
        before = fingerprint(snapshot.capture(self.trainer))
        for path in UNFIT_WITHOUT:
            state = copied(sound)
            place = state
            for key in path[:-1]:
                place = place[key]
            del place[path[-1]]
            saved = store.write(step_name(3), state, {}, step=3)
            self.result.unfit += 1
            fault = ""
            if not refuses(functools.partial(self.trainer.resume, saved)):
                fault = "it was loaded"
            elif fingerprint(snapshot.capture(self.trainer)) != before:
                fault = "the refused load changed something live"
            self.result.unfit_refused += not fault
            if fault:
                self.result.failures.append(f"without {path}: {fault}")


def refuses(act: Callable[[], Any]) -> bool:
    """Tell whether a call ends in a CheckpointError; any other error is passed on."""
    try:
        act()
    except CheckpointError:
        return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials, print its counts as JSON, and return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description="Damaged checkpoints, and sound ones.")
    parser.add_argument("--injections", type=int, default=5000)
    parser.add_argument("--clean", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    with scratch_directory() as scratch:
        trials = Trials(scratch, options.seed)
        trials.inject(options.injections)
        trials.refuse_nonfinite()
        trials.refuse_unfit()
        trials.accept(options.clean)
    result = trials.result
    report = {
        "series": "corruption",
        "seed": options.seed,
        "injections": sum(result.injections.values()),
        "detected": result.detected,
        "kinds": dict(sorted(result.injections.items())),
        "nonfinite": result.nonfinite,
        "nonfinite_refused": result.nonfinite_refused,
        "unfit": result.unfit,
        "unfit_refused": result.unfit_refused,
        "clean": result.clean,
        "accepted": result.accepted,
        "tensors_read_a_load": result.tensors_a_load,
        "failures": result.failures[:SHOWN_FAILURES],
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps(report, indent=2))
    return 1 if result.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
