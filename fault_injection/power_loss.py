"""Power loss: the store on disks that kept only part of what was not yet synced.

    python -m fault_injection.power_loss [--states 2000] [--seed 0]

Every operation of a few courses of a run (first save, retention, best and last, replaced saves,
a course left behind) is recorded. From the record come the states that a disk may be in after a
power cut at any operation:

- contents of a file that are not synced: missing, cut short, or with 4 KiB pages of zeros;
- changes of a directory (create, rename, unlink, mkdir, rmdir) that no sync of it has followed:
  made or lost. Renames are atomic.

In the `ordered` model the changes of one directory reach the disk in their order, those of
different directories in any. In the harsher `reordered` model any subset of the changes reaches
it, in any order, and a rename between directories is safe only when both are synced.

Each state is laid out as a directory, and a fresh store must find in it, as a mere reader and
after its repair, every checkpoint whose save had returned and that was not being deleted, whole
and with its values; nothing else may read as whole; the pointers must lead to whole ones; a new
save must work. Some of the repairs are cut off by a second power loss.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fault_injection.faults import (
    Crash,
    FaultyFilesystem,
    Operation,
    RecordingFilesystem,
    scratch_directory,
)
from fundamentallm.errors import CheckpointError
from fundamentallm.files.run_layout import SUPERSEDED
from fundamentallm.training.checkpoint.store import HIDDEN_NAME, CheckpointStore, step_name

PAGE = 4096
MODELS = ("ordered", "reordered")
PLACE = Path("run/checkpoints")
NEW_STEP = 99
SHOWN_FAILURES = 5


# The disk


@dataclass(frozen=True)
class Change:
    """One change of one directory, or of two by a rename; made wholly or not at all.

    Args:
        node: the file or directory that gains or loses a name.
        removes: directory and name that it loses.
        adds: directory and name that it gains.
    """

    node: int
    removes: tuple[int, str] | None = None
    adds: tuple[int, str] | None = None

    @property
    def directories(self) -> frozenset[int]:
        """The directories that it changes."""
        return frozenset(place[0] for place in (self.removes, self.adds) if place is not None)


Tree = Mapping[str, Any]
"""A directory's contents: names -> bytes of a file, or the tree of a directory."""


class Disk:
    """What a log of operations put on the disk, and what of it is durable after each.

    Args:
        top: the paths in the log lie below it; it exists, durably.
        tree: what lay there before, durably.
    """

    ROOT = 0

    def __init__(self, top: Path, tree: Tree | None = None) -> None:
        self.top = top
        self.names: dict[int, dict[str, int]] = {self.ROOT: {}}
        self.contents: dict[int, bytes] = {}
        self.synced: dict[int, int] = {}  # file -> how many of its bytes are durable
        self.base: list[Change] = []
        self.changes: list[Change] = []
        self.waiting: dict[int, set[int]] = {}  # change -> directories whose sync it waits for
        self._num_nodes = 1
        self._plant(self.ROOT, tree or {})
        self.base, self.changes, self.waiting = self.changes, [], {}

    def _plant(self, directory: int, tree: Tree) -> None:
        for name, item in tree.items():
            node = self._add(directory, name, is_directory=not isinstance(item, bytes))
            if isinstance(item, bytes):
                self.contents[node], self.synced[node] = item, len(item)
            else:
                self._plant(node, item)

    def _add(self, directory: int, name: str, *, is_directory: bool) -> int:
        node = self._num_nodes
        self._num_nodes += 1
        if is_directory:
            self.names[node] = {}
        else:
            self.contents[node], self.synced[node] = b"", 0
        self.names[directory][name] = node
        self._change(Change(node, adds=(directory, name)))
        return node

    def _change(self, change: Change) -> None:
        self.waiting[len(self.changes)] = set(change.directories)
        self.changes.append(change)

    def _find(self, path: Path) -> int:
        node = self.ROOT
        for name in path.relative_to(self.top).parts:
            node = self.names[node][name]
        return node

    def apply(self, operation: Operation) -> None:
        """Make one recorded operation."""
        path, kind = operation.path, operation.kind
        if kind == "sync":
            node = self._find(path)
            self.synced[node] = len(self.contents[node])
        elif kind == "sync_directory":
            node = self._find(path)
            for waits in self.waiting.values():
                waits.discard(node)
        elif kind == "write":
            self.contents[self._find(path)] += operation.data
        elif kind in ("create", "make_directory"):
            self._add(self._find(path.parent), path.name, is_directory=kind != "create")
        else:
            source = (self._find(path.parent), path.name)
            node = self.names[source[0]].pop(source[1])
            target = None
            if operation.target is not None:
                target = (self._find(operation.target.parent), operation.target.name)
                self.names[target[0]][target[1]] = node
            self._change(Change(node, source, target))

    def is_durable(self, number: int, model: str) -> bool:
        """Tell whether a change is safe: by a sync of one of its directories, or of them all."""
        waits = self.waiting[number]
        if model == "reordered":
            return not waits
        return waits != self.changes[number].directories

    def survivors(self, model: str, rng: random.Random, chance: float) -> list[Change]:
        """Choose changes that reach the disk, those not yet durable with the given chance."""
        numbers = range(len(self.changes))
        made = {n for n in numbers if self.is_durable(n, model) or rng.random() < chance}
        if model == "ordered":  # whatever came before it in the same directory was made too
            directories: set[int] = set()
            for number in reversed(numbers):
                if number in made or self.changes[number].directories & directories:
                    made.add(number)
                    directories |= self.changes[number].directories
            return [self.changes[number] for number in sorted(made)]
        # A durable change stays behind the durable ones before it; the others go where they may.
        order = {n: n if self.is_durable(n, model) else n + rng.choice((0, 0, 2, 4)) for n in made}
        return [
            self.changes[number]
            for number in sorted(made, key=lambda number: (order[number], number))
        ]

    def tree(self, changes: Sequence[Change], rng: random.Random, chance: float) -> Tree:
        """Lay out the names that the changes leave, with what is left of every file."""
        names: dict[int, dict[str, int]] = {self.ROOT: {}}
        for change in (*self.base, *changes):
            if change.removes is not None:
                directory, name = change.removes
                if names.get(directory, {}).get(name) == change.node:
                    del names[directory][name]
            if change.adds is not None:
                directory, name = change.adds
                names.setdefault(directory, {})[name] = change.node

        def layout(directory: int) -> Tree:
            return {
                name: self._torn(node, rng, chance) if node in self.contents else layout(node)
                for name, node in sorted(names.get(directory, {}).items())
            }

        return layout(self.ROOT)

    def _torn(self, node: int, rng: random.Random, chance: float) -> bytes:
        contents, safe = self.contents[node], self.synced[node]
        if safe == len(contents) or rng.random() < chance:
            return contents
        fault = rng.choice(("missing", "cut", "zeros", "torn", "torn"))
        if fault == "missing":
            return contents[:safe]
        if fault == "cut":
            return contents[: rng.randint(safe, len(contents) - 1)]
        torn = bytearray(contents)
        for page in range(0, len(contents), PAGE):
            if fault == "zeros" or rng.random() < 0.5:
                start, stop = max(page, safe), min(page + PAGE, len(contents))
                torn[start:stop] = bytes(max(stop - start, 0))
        return bytes(torn)


def lay_out(tree: Tree, place: Path) -> None:
    """Make a directory with the contents of a tree."""
    place.mkdir()
    for name, item in tree.items():
        if isinstance(item, bytes):
            (place / name).write_bytes(item)
        else:
            lay_out(item, place / name)


def tree_at(place: Path) -> Tree:
    """Read a directory with all below it."""
    return {
        path.name: tree_at(path) if path.is_dir() else path.read_bytes()
        for path in sorted(place.iterdir())
    }


def digest(tree: Tree) -> bytes:
    """Return a hash of names and contents."""
    sha = hashlib.sha256()
    for name, item in tree.items():
        is_file = isinstance(item, bytes)
        sha.update(repr((name, is_file)).encode())
        sha.update(hashlib.sha256(item).digest() if is_file else digest(item))
    return sha.digest()


# The courses of a run, and what must be there after each action


@dataclass(frozen=True)
class Expected:
    """What a reader must find.

    Args:
        values: the value of every checkpoint by name.
        pointers: the name in each pointer file.
        superseded: the value of each checkpoint that was set aside.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    pointers: Mapping[str, str] = field(default_factory=dict)
    superseded: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Action:
    """One call of the store and its effect."""

    run: Callable[[CheckpointStore], object]
    effect: Callable[[Expected], Expected]


def tree_of(value: float) -> dict[str, Any]:
    """Return a state of several pages that depends on the value everywhere."""
    weight = torch.full((3 * PAGE // 4 + 5,), value)
    return {
        "model": {"embedding.weight": weight, "head.weight": weight, "bias": torch.arange(3.0)},
        "optimizer": {"state": {0: {"exp_avg": weight / 2}}, "betas": (0.9, 0.999)},
        "value": value,
    }


def value_of(tree: Mapping[str, Any]) -> float:
    """Return the value that a state was made of, after a look at every part of it."""
    value = float(tree["value"])
    true = tree_of(value)
    for name, tensor in true["model"].items():
        assert torch.equal(tree["model"][name], tensor), name
    assert torch.equal(
        tree["optimizer"]["state"][0]["exp_avg"], true["optimizer"]["state"][0]["exp_avg"]
    )
    return value


def save(step: int, value: float | None = None) -> Action:
    """Save a step; its value is the step's number unless given."""
    name, content = step_name(step), float(step) if value is None else value
    return Action(
        lambda store: store.write(name, tree_of(content), {"value": content}, step=step),
        lambda before: replace(before, values={**before.values, name: content}),
    )


def point(pointer: str, step: int) -> Action:
    """Let a pointer name a step."""
    return Action(
        lambda store: store.point(pointer, step_name(step)),
        lambda before: replace(before, pointers={**before.pointers, pointer: step_name(step)}),
    )


def prune(keep_last: int) -> Action:
    """Keep the newest, and what is pointed at."""

    def effect(before: Expected) -> Expected:
        names = sorted(before.values, reverse=True)
        kept = {*names[:keep_last], *before.pointers.values()}
        return replace(before, values={name: before.values[name] for name in names if name in kept})

    return Action(lambda store: store.prune(keep_last), effect)


def retire(step: int) -> Action:
    """Delete one step."""
    return Action(
        lambda store: store.retire([step_name(step)]),
        lambda before: replace(
            before,
            values={name: v for name, v in before.values.items() if name != step_name(step)},
        ),
    )


def supersede(step: int) -> Action:
    """Set later steps aside."""

    def effect(before: Expected) -> Expected:
        later = {name: v for name, v in before.values.items() if name > step_name(step)}
        values = {name: v for name, v in before.values.items() if name not in later}
        return replace(before, values=values, superseded={**before.superseded, **later})

    return Action(lambda store: store.supersede(step), effect)


COURSES: Mapping[str, Sequence[Action]] = {
    "first save": [save(1), point("last", 1), point("best", 1)],
    "smallest retention": [
        *(save(1), point("last", 1), save(2), point("last", 2), save(3), point("last", 3)),
        *(prune(2), save(4), point("last", 4), prune(2), save(5), save(6), prune(2)),
    ],
    "best and last": [
        *(save(1), point("last", 1), point("best", 1), save(2), point("last", 2), prune(2)),
        *(save(3), point("last", 3), prune(2), save(4), point("last", 4), point("best", 4)),
        *(prune(2), save(5), point("last", 5), prune(2)),
    ],
    "overwrite": [
        *(save(1), point("best", 1), save(2), point("last", 2)),
        *(save(2, 12.0), save(1, 11.0), save(2, 22.0), retire(1), save(1, 21.0)),
    ],
    "another course": [
        *(save(1), save(2), point("best", 2), save(3), save(4), point("last", 4)),
        *(supersede(2), point("last", 2), save(3, 13.0), save(4, 14.0), point("last", 4)),
        *(prune(2), save(2, 12.0)),
    ],
}


@dataclass(frozen=True)
class Recording:
    """The operations of a course, and what must be there while and after each action.

    Args:
        log: the operations.
        top: the directory that their paths lie below.
        ends: the number of operations after each action.
        states: what is expected before the first action and after each.
        tree: what lay below `top` before.
    """

    log: Sequence[Operation]
    top: Path
    ends: Sequence[int]
    states: Sequence[Expected]
    tree: Tree = field(default_factory=dict)

    def num_done(self, number: int) -> int:
        """Return how many actions had returned after `number` operations."""
        return sum(end <= number for end in self.ends)

    def expected_at(self, number: int) -> tuple[Expected, Expected]:
        """Return what is allowed when the power fails after `number` operations: old or new."""
        done = self.num_done(number)
        return self.states[done], self.states[min(done + 1, len(self.states) - 1)]


def record(actions: Sequence[Action], top: Path, forget: Collection[str] = ()) -> Recording:
    """Run a course below a directory and write down its operations."""
    top.mkdir()
    filesystem = RecordingFilesystem(forget)
    store = CheckpointStore(top / PLACE, filesystem)
    ends, states = [], [Expected()]
    for action in actions:
        action.run(store)
        ends.append(len(filesystem.log))
        states.append(action.effect(states[-1]))
    return Recording(filesystem.log, top, ends, states)


# The states after a power cut


@dataclass(frozen=True)
class State:
    """One state of the disk after a power cut, and what is allowed there."""

    tree: Tree
    number: int
    allowed: tuple[Expected, Expected]


CHANCES = (0.0, 1.0, 0.5, 0.5, 0.2, 0.8)


def states_of(
    recording: Recording, model: str, rng: random.Random, rounds: int, every: int = 1
) -> Iterator[State]:
    """Yield states for every power cut, many times over; the first two rounds are the extremes."""
    for turn in range(rounds):
        disk = Disk(recording.top, recording.tree)
        chance = CHANCES[turn % len(CHANCES)]
        for number in range(len(recording.log) + 1):
            if number:
                disk.apply(recording.log[number - 1])
            if (number + turn) % every:
                continue
            changes = disk.survivors(model, rng, chance)
            tree = disk.tree(changes, rng, chance if turn < 2 else rng.choice(CHANCES))
            yield State(tree, number, recording.expected_at(number))


def faults_in(state: State, top: Path) -> Iterator[str]:
    """Yield what breaks the promise when a fresh store meets the state, laid out at `top`."""
    place = top / PLACE
    yield from faults_of_reading(place, state.allowed, "to a reader")
    store = CheckpointStore(place, FaultyFilesystem(None, Crash))
    store.recover()
    yield from faults_of_reading(place, state.allowed, "after the repair")
    if place.exists():
        left = [path.name for path in place.iterdir() if HIDDEN_NAME.fullmatch(path.name)]
        if left:
            yield f"the repair leaves {left}"
    written = store.write(step_name(NEW_STEP), tree_of(0.5), step=NEW_STEP)
    newest = CheckpointStore(place).newest()
    if newest is None or newest.step != NEW_STEP or value_of(store.read(written)) != 0.5:
        yield "a new save is not the newest"


def faults_of_reading(place: Path, allowed: tuple[Expected, Expected], who: str) -> Iterator[str]:
    """Yield what a fresh reader finds that is not allowed."""
    before, after = allowed
    store = CheckpointStore(place)
    found: dict[str, float] = {}
    for name in store.step_names():
        try:
            found[name] = value_of(store.read(place / name))
        except CheckpointError as error:
            yield f"{who}, {name} is damaged: {str(error).splitlines()[0]}"
    for name in sorted({*before.values, *after.values, *found}):
        values = {before.values.get(name), after.values.get(name)}
        if found.get(name) not in values:
            yield f"{who}, {name} has the value {found.get(name)}, not one of {values}"
    newest = store.newest()
    if (newest.name if newest else None) != max(found, default=None):
        yield f"{who}, {newest} is the newest of {sorted(found)}"
    for name, value in after.superseded.items():
        try:
            is_there = value_of(store.read(place / SUPERSEDED / name)) == value
        except CheckpointError:
            is_there = name not in before.superseded and found.get(name) == value
        if not is_there:
            yield f"{who}, {name} was set aside and is gone"
    for pointer in ("best", "last"):
        names = {before.pointers.get(pointer), after.pointers.get(pointer)}
        if store.pointed(pointer) not in names:
            yield f"{who}, {pointer} names {store.pointed(pointer)}, not one of {names}"
        try:
            path = store.resolve(pointer)
        except CheckpointError as error:
            yield f"{who}, {pointer} leads nowhere: {str(error).splitlines()[0]}"
            continue
        if path.name not in found if path else found:
            yield f"{who}, {pointer} leads to {path}, which is not whole"


@dataclass
class Result:
    """Counts of the trials, and the first failures."""

    states: Counter[str] = field(default_factory=Counter)
    checks: int = 0
    second_cuts: int = 0
    violations: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    power_cuts: set[tuple[str, int]] = field(default_factory=set)
    operations: int = 0


class Trials:
    """Checks states of all courses until there are enough of each model.

    Args:
        scratch: an empty directory to work in.
        seed: of the choices.
        forget: kinds of operations that the record leaves out; for the mutants.
    """

    def __init__(self, scratch: Path, seed: int = 0, forget: Collection[str] = ()) -> None:
        self.scratch = scratch
        self.rng = random.Random(seed)
        self.result = Result()
        self.recordings = {
            course: record(actions, scratch / f"course-{number}", forget)
            for number, (course, actions) in enumerate(COURSES.items())
        }
        self.result.operations = sum(len(r.log) for r in self.recordings.values())
        self._checked: set[tuple[str, bytes, str, int]] = set()
        self._seen: set[tuple[str, bytes]] = set()

    def run(self, states: int, second_cut_every: int = 10) -> Result:
        """Check at least `states` distinct states of each model; every power cut is among them."""
        for model in MODELS:
            turns = 0
            while turns == 0 or self.result.states[model] < states:
                every = max(1, self.result.operations * 2 // states) if states else 1
                for course, recording in self.recordings.items():
                    for state in states_of(recording, model, self.rng, len(CHANCES), every):
                        self._meet(course, model, state, second_cut_every)
                        if turns and self.result.states[model] >= states:
                            break
                turns += 1
        return self.result

    def _meet(self, course: str, model: str, state: State, second_cut_every: int) -> None:
        if not self._is_new(course, model, state):
            return
        self.result.power_cuts.add((course, state.number))
        self._check(f"{course}, {model}, cut after {state.number} operations", model, state)
        if self.result.checks % second_cut_every == 0:
            self._cut_the_repair(course, model, state)

    def _is_new(self, course: str, model: str, state: State) -> bool:
        """Tell whether to check a state; the same one later in a course has to hold more."""
        tree = digest(state.tree)
        key = (model, tree, course, self.recordings[course].num_done(state.number))
        if key in self._checked:
            return False
        self._checked.add(key)
        if (model, tree) not in self._seen:
            self._seen.add((model, tree))
            self.result.states[model] += 1
        return True

    def _check(self, label: str, model: str, state: State) -> None:
        top = self.scratch / "state"
        lay_out(state.tree, top)
        self.result.checks += 1
        try:
            faults = list(faults_in(state, top))
        except (CheckpointError, OSError, AssertionError) as error:
            faults = [f"{type(error).__name__}: {error}"]
        shutil.rmtree(top)
        if faults:
            self.result.violations[model] += 1
            self.result.failures.append(f"{label}: {faults[0]}")

    def _cut_the_repair(self, course: str, model: str, state: State) -> None:
        """Repair the state, and cut the power once more at any operation of the repair."""
        top = self.scratch / "repair"
        lay_out(state.tree, top)
        filesystem = RecordingFilesystem()
        CheckpointStore(top / PLACE, filesystem).recover()
        shutil.rmtree(top)
        repair = Recording(filesystem.log, top, [], [*state.allowed], state.tree)
        for second in states_of(repair, model, self.rng, 2):
            second_number, second = second.number, replace(second, number=state.number)
            if second_number and self._is_new(course, model, second):
                self.result.second_cuts += 1
                label = f"{course}, {model}, cut after {state.number} operations"
                self._check(f"{label} and {second_number} of the repair", model, second)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials, print its counts as JSON, and return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description="The store after a loss of power.")
    parser.add_argument("--states", type=int, default=2000, help="distinct states of each model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    with scratch_directory() as scratch:
        result = Trials(scratch, options.seed).run(options.states)
    report = {
        "series": "power_loss",
        "seed": options.seed,
        "recorded_operations": result.operations,
        "power_cuts": len(result.power_cuts),
        "distinct_states": dict(result.states),
        "checks": result.checks,
        "second_power_cuts": result.second_cuts,
        "violations": {model: result.violations[model] for model in MODELS},
        "failures": result.failures[:SHOWN_FAILURES],
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps(report, indent=2))
    return 1 if result.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
