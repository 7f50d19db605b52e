"""What a run knows of its checkpoints; a question about them reads no file.

When a run starts, a `Survey` reads and hashes each checkpoint once. From then on the rank that
writes keeps a `Catalogue` in memory and sends it to the others when a save ends, so every rank
gives the same answer at every moment.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

from fundamentallm.errors import CheckpointError
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.checkpoint.scores import AWAITS_EVALUATION, FOR_A_STOP, Scores
from fundamentallm.training.checkpoint.store import Check, CheckpointStore, no_check, step_name


@dataclass(frozen=True)
class Entry:
    """A checkpoint that training can continue from.

    Attributes:
        step: the optimizer step of its state.
        hash: its manifest's; empty while it is being written.
        run_id: of the run that saved it.
        for_a_stop: whether it was saved only because the run stopped, not on schedule.
        awaits_evaluation: whether it has the state before the evaluation of its step.
        ended: why the run was complete with it; empty if not.
        uncounted: whether its state was saved for a stop and later became one that the schedule
            asks for, so that its own count of saves lacks it.
    """

    step: int
    hash: str
    run_id: str | None
    for_a_stop: bool
    awaits_evaluation: bool = False
    ended: str = ""
    uncounted: bool = False

    @classmethod
    def of(cls, manifest: Manifest, scores: Scores) -> Entry:
        """Return the entry of a checkpoint that was read.

        A run that ends with a state that was saved for a stop keeps that state on schedule.
        """
        metadata, score = manifest.metadata, scores.of(manifest)
        for_a_stop = bool(metadata.get(FOR_A_STOP))
        is_of_an_end = score is not None and score.is_of_an_end
        return cls(
            manifest.step,
            manifest.hash,
            metadata.get("run_id"),
            for_a_stop and not is_of_an_end,
            bool(metadata.get(AWAITS_EVALUATION)) or (score is not None and bool(score.due)),
            scores.end_of(manifest),
            for_a_stop and is_of_an_end,
        )

    @property
    def name(self) -> str:
        """The name of its directory."""
        return step_name(self.step)


@dataclass(frozen=True)
class Catalogue:
    """The checkpoints that training can continue from, newest first."""

    entries: tuple[Entry, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Catalogue:
        """Sort entries into a catalogue."""
        return cls(tuple(sorted(entries, key=lambda entry: entry.step, reverse=True)))

    @classmethod
    def from_json(cls, text: str) -> Catalogue:
        """Return the catalogue that another rank has sent as `to_json`."""
        return cls(tuple(Entry(*fields) for fields in json.loads(text)))

    def to_json(self) -> str:
        """Return the catalogue as text."""
        return json.dumps([astuple(entry) for entry in self.entries])

    @property
    def newest(self) -> Entry | None:
        """The entry of the highest step."""
        return self.entries[0] if self.entries else None

    def get(self, step: int | None) -> Entry | None:
        """Return the entry of a step, None if there is none."""
        return next((entry for entry in self.entries if entry.step == step), None)

    def names(self, *, for_a_stop: bool) -> set[str]:
        """Return the names of those that were saved for a stop, or of the others."""
        return {entry.name for entry in self.entries if entry.for_a_stop is for_a_stop}

    def including(self, entry: Entry) -> Catalogue:
        """Return the catalogue with this entry, in place of one of the same step."""
        return Catalogue.of((entry, *self.without([entry.name]).entries))

    def without(self, names: Collection[str]) -> Catalogue:
        """Return the catalogue without some checkpoints."""
        return replace(self, entries=tuple(e for e in self.entries if e.name not in names))

    def until(self, step: int) -> Catalogue:
        """Return the catalogue without the checkpoints of later steps."""
        return replace(self, entries=tuple(e for e in self.entries if e.step <= step))

    def to_restore(self, before: int | None, n_saved: int, best_step: int | None) -> Entry | None:
        """Return the newest checkpoint that is at most `before`, else the oldest.

        A run that was stopped and resumed must return to the same step as one that was not. So a
        checkpoint that was saved for a stop counts only where there is no other, and one that a
        killed process did not prune does not count.

        Args:
            before: a step; None for the newest of all.
            n_saved: how many of the newest are kept, besides the best.
            best_step: the step of the best, None if there is none.
        """
        scheduled = [entry for entry in self.entries if not entry.for_a_stop]
        kept = [e for n, e in enumerate(scheduled) if n < n_saved or e.step == best_step]
        early_enough = (entry for entry in kept if before is None or entry.step <= before)
        return next(early_enough, kept[-1] if kept else self.newest)


class Survey:
    """Reads each checkpoint of a store once: some on request, then the rest.

    The state that was requested last is held until it is taken, so a checkpoint that is chosen and
    then loaded is read once.

    Args:
        store: of the checkpoints; nothing there is changed.
        check: raises CheckpointError for a state that training cannot use.

    Attributes:
        usable: the manifests of those that training can continue from, by name.
        faults: the errors of the others, by name.
    """

    def __init__(self, store: CheckpointStore, check: Check = no_check) -> None:
        self.store = store
        self.usable: dict[str, Manifest] = {}
        self.faults: dict[str, CheckpointError] = {}
        self._check = check
        self._held: tuple[str, dict[str, Any]] | None = None

    def newest(self, pointer: str = "") -> Manifest | None:
        """Return the manifest of the newest usable checkpoint; hold its state.

        It reads from the newest to older ones until one is usable.

        Args:
            pointer: a pointer file; the checkpoint that it names comes first.
        """
        pointed = self.store.pointed(pointer) if pointer else None
        for name in [*filter(None, [pointed]), *self.store.step_names()]:
            if self._is_usable(name, hold=True):
                return self.usable[name]
        return None

    def open(self, name: str) -> Manifest:
        """Return the manifest of a checkpoint; hold its state.

        Raises:
            CheckpointError: it is damaged or unusable.
        """
        if not self._is_usable(name, hold=True):
            raise self.faults[name]
        return self.usable[name]

    def take(self, name: str) -> dict[str, Any]:
        """Return the state of a checkpoint and release it.

        Raises:
            CheckpointError: it is damaged or unusable.
        """
        self.open(name)
        held, self._held = self._held, None
        if held is not None and held[0] == name:
            return held[1]
        return self.store.read(self.store.directory / name)

    def look(self, name: str) -> dict[str, Any]:
        """Return the state of a checkpoint and hold it.

        Raises:
            CheckpointError: it is damaged or unusable.
        """
        self._held = name, self.take(name)
        return self._held[1]

    def manifests(self) -> Iterator[Manifest]:
        """Read the remaining checkpoints; yield the manifests of all usable ones."""
        for name in self.store.step_names():
            if self._is_usable(name, hold=False):
                yield self.usable[name]

    def _is_usable(self, name: str, hold: bool) -> bool:
        if name not in self.usable and name not in self.faults:
            path = self.store.directory / name
            try:
                manifest, state = self.store.load(path)
                self._check(state, str(path))
            except CheckpointError as error:
                self.faults[name] = error
            else:
                self.usable[name] = manifest
                if hold:
                    self._held = name, state
        return name in self.usable
