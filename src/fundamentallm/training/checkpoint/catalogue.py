"""What a run knows of its checkpoints, so that no question about them reads one.

When a run starts, a `Survey` reads and hashes each checkpoint once. From then on the rank that
writes keeps a `Catalogue` in memory and tells it to the others whenever a save has ended, so every
rank gives the same answer at every moment.

A checkpoint is written before the evaluation of its step and never changed afterwards. What the
evaluation measured, and whether it ended the run, stands in a line of scores.jsonl (`Scores`)
beside the checkpoints: `step`, `manifest` (the hash of the checkpoint's manifest), `measured`,
`val_loss` and `perplexity` (null where not finite), and `finished`. A line counts for the very
checkpoint that has this hash, so one that is left over from another course of the run says nothing.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import (
    Filesystem,
    read_chunks,
    reading_from,
    replace_file,
    saving_to,
)
from fundamentallm.files.run_layout import SCORES
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.checkpoint.store import Check, CheckpointStore, no_check, step_name

AWAITS_EVALUATION = "awaits_evaluation"  # in the metadata of a checkpoint
MAX_SCORES_BYTES = 64 << 20
FOR_A_STOP = "for_a_stop"  # in the metadata of a checkpoint that no schedule asked for


@dataclass(frozen=True)
class Entry:
    """A checkpoint that training can go on from.

    Attributes:
        step: the optimizer step of its state.
        hash: its manifest's; empty while it is being written.
        run_id: of the run that saved it.
        for_a_stop: whether only a stop asked for it, and no schedule.
        awaits_evaluation: whether its state is that before the evaluation of its step.
        ended: why the run was complete with it; empty if it was not.
    """

    step: int
    hash: str
    run_id: str | None
    for_a_stop: bool
    awaits_evaluation: bool = False
    ended: str = ""

    @classmethod
    def of(cls, manifest: Manifest, ended: str) -> Entry:
        """Return the entry of a checkpoint that was read."""
        metadata = manifest.metadata
        return cls(
            manifest.step,
            manifest.hash,
            metadata.get("run_id"),
            bool(metadata.get(FOR_A_STOP)),
            bool(metadata.get(AWAITS_EVALUATION)),
            ended,
        )

    @property
    def name(self) -> str:
        """The name of its directory."""
        return step_name(self.step)


@dataclass(frozen=True)
class Catalogue:
    """The checkpoints that training can go on from, newest first."""

    entries: tuple[Entry, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Catalogue:
        """Sort entries into a catalogue."""
        return cls(tuple(sorted(entries, key=lambda entry: entry.step, reverse=True)))

    @classmethod
    def from_json(cls, text: str) -> Catalogue:
        """Return what another rank has told with `to_json`."""
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
        """Return the names of those that only a stop asked for, or of the others."""
        return {entry.name for entry in self.entries if entry.for_a_stop is for_a_stop}

    def including(self, entry: Entry) -> Catalogue:
        """Return the catalogue with one more entry, in place of that of the same step."""
        return Catalogue.of((entry, *self.without([entry.name]).entries))

    def without(self, names: Collection[str]) -> Catalogue:
        """Return the catalogue without some checkpoints."""
        return replace(self, entries=tuple(e for e in self.entries if e.name not in names))

    def until(self, step: int) -> Catalogue:
        """Return the catalogue without the checkpoints of later steps."""
        return replace(self, entries=tuple(e for e in self.entries if e.step <= step))

    def to_restore(self, before: int | None, n_saved: int, best_step: int | None) -> Entry | None:
        """Return the newest checkpoint that is at most `before`, else the oldest.

        A run that was stopped on its way must go back to where one that never was would go. So a
        checkpoint that only a stop asked for counts only where there is no other, and one that a
        kill has kept from being pruned does not count.

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
    """Reads each checkpoint of a store once: some of them when they are asked for, then the rest.

    The state that was asked for last is held until it is taken, so that whoever chooses what to go
    on from has read it for whoever loads it.

    Args:
        store: where the checkpoints lie; nothing there is changed.
        check: raises CheckpointError for a whole state that is of no use.

    Attributes:
        usable: the manifests of those that training can go on from, by name.
        faults: what is wrong with the others, by name.
    """

    def __init__(self, store: CheckpointStore, check: Check = no_check) -> None:
        self.store = store
        self.usable: dict[str, Manifest] = {}
        self.faults: dict[str, CheckpointError] = {}
        self._check = check
        self._held: tuple[str, dict[str, Any]] | None = None

    def newest(self, pointer: str = "") -> Manifest | None:
        """Return the manifest of the newest usable checkpoint; hold its state.

        It reads from the newest on until one is usable.

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
            CheckpointError: it is damaged or of no use.
        """
        if not self._is_usable(name, hold=True):
            raise self.faults[name]
        return self.usable[name]

    def take(self, name: str) -> dict[str, Any]:
        """Return the state of a checkpoint, and hold it no longer.

        Raises:
            CheckpointError: it is damaged or of no use.
        """
        self.open(name)
        held, self._held = self._held, None
        if held is not None and held[0] == name:
            return held[1]
        return self.store.read(self.store.directory / name)

    def manifests(self) -> Iterator[Manifest]:
        """Read the checkpoints that nobody asked for; yield the manifests of all usable ones."""
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


@dataclass(frozen=True)
class Score:
    """What was found out about a checkpoint after it was committed.

    Attributes:
        step: of the checkpoint.
        manifest: the hash of its manifest.
        measured: whether its evaluation is complete.
        val_loss: in nats per token; None where it is not finite or was not measured.
        perplexity: the same of exp(val_loss).
        finished: why the run ended at this step; empty if it did not.
    """

    step: int
    manifest: str
    measured: bool
    val_loss: float | None = None
    perplexity: float | None = None
    finished: str = ""


class Scores:
    """The scores of the checkpoints in one directory.

    Args:
        directory: of the checkpoints.
        filesystem: the disk operations.
    """

    def __init__(self, directory: Path, filesystem: Filesystem | None = None) -> None:
        self.path = directory / SCORES
        self.filesystem = filesystem or Filesystem()

    def all(self) -> list[Score]:
        """Return every score, in the order of the file.

        Raises:
            CheckpointError: it is no regular file, is too large, or cannot be read.
        """
        with reading_from(self.path):
            status = self.filesystem.status(self.path)
            if status is None:
                return []
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_SCORES_BYTES:
                raise CheckpointError(
                    "this is no file of scores",
                    where=str(self.path),
                    got=f"{status.st_size:,} bytes",
                    expected=f"a regular file of at most {MAX_SCORES_BYTES:,} bytes",
                    fix="move it away; evaluations that it told of run again",
                )
            text = b"".join(read_chunks(self.filesystem, self.path))
        lines = (_parsed(line) for line in text.splitlines())
        return [score for score in lines if score is not None]

    def of(self, manifest: Manifest) -> Score | None:
        """Return the score of a checkpoint, None if there is none."""
        return next((score for score in self.all() if score.manifest == manifest.hash), None)

    def val_loss(self, manifest: Manifest) -> float | None:
        """Return the validation loss of a checkpoint in nats per token, None without one."""
        if not manifest.metadata.get(AWAITS_EVALUATION):
            return manifest.metadata.get("val_loss")
        score = self.of(manifest)
        return score.val_loss if score is not None else None

    def end_of(self, manifest: Manifest) -> str:
        """Return why the run is complete with a checkpoint; empty if it is not.

        It is not where the last evaluation is still to be made.
        """
        score = self.of(manifest)
        if score is not None and score.finished:
            return score.finished
        if manifest.metadata.get(AWAITS_EVALUATION):
            return ""
        return str(manifest.metadata.get("finished", ""))

    def end_due_at(self, manifest: Manifest) -> str:
        """Return why the run was to end with a checkpoint whose evaluation is still to be made."""
        if not manifest.metadata.get(AWAITS_EVALUATION) or self.of(manifest) is not None:
            return ""
        return str(manifest.metadata.get("finished", ""))

    def put(self, score: Score) -> None:
        """Write a score durably, in place of that of the same step.

        Raises:
            CheckpointError: the disk refuses; the file is as it was.
        """
        self._write([*(known for known in self.all() if known.step != score.step), score])

    def cut_back(self, step: int) -> None:
        """Forget the scores of later steps.

        Raises:
            CheckpointError: as `put`.
        """
        known = self.all()
        if any(score.step > step for score in known):
            self._write(score for score in known if score.step <= step)

    def _write(self, scores: Iterable[Score]) -> None:
        lines = [json.dumps(asdict(score), allow_nan=False) + "\n" for score in scores]
        with saving_to(self.path):
            replace_file(self.filesystem, self.path, ["".join(lines).encode()])


def finite(value: float) -> float | None:
    """Return the number, None if it is not finite."""
    return value if math.isfinite(value) else None


def _parsed(line: bytes) -> Score | None:
    """Return the score in a line; a line that holds none says nothing."""
    try:
        fields: Any = json.loads(line)
        score = Score(**fields)
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = (int, str, bool, float | None, float | None, str)
    values = (getattr(score, name) for name in Score.__dataclass_fields__)
    fits = all(isinstance(value, kind) for value, kind in zip(values, kinds, strict=True))
    return score if fits else None
