"""Checkpoints in one directory that survive a crash at any instant.

    checkpoints/
      step-00000200/        a committed checkpoint (its files: directory.py)
      best, last            pointers: a checkpoint's name as text; hints, maybe missing or stale
      superseded/           later than a state that the run continued from; never read
      corrupt/              damaged checkpoints, kept as evidence; never read
      .NAME.tmp-*           being written; never read
      .NAME.old-*           whole, replaced by a later save; read only while NAME is missing
      .NAME.gone-*          being deleted; never read

A save fills a hidden directory and renames it when all of it is on the disk, so a directory with a
checkpoint's name is complete. Reading never changes the disk, so a run may be read while another
process trains it. Writing assumes one writer for each directory.
"""

from __future__ import annotations

import contextlib
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import (
    Filesystem,
    make_directories,
    random_suffix,
    read_chunks,
    reading_from,
    replace_file,
    saving_to,
)
from fundamentallm.files.names import numbered
from fundamentallm.files.private import check_directory
from fundamentallm.files.run_layout import CORRUPT, MANIFEST, SUPERSEDED
from fundamentallm.training.checkpoint.directory import (
    ALL_FILES,
    check_hashes,
    pack,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
)
from fundamentallm.training.checkpoint.manifest import Manifest

FREE_SPACE_FACTOR = 1.2
MAX_POINTER_BYTES = 256
MAX_NAME_BYTES = 200  # file names have at most 255, and hidden names are longer
STEP_NAME = re.compile(r"step-(\d{8,})")
HIDDEN_NAME = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old|gone)-[0-9a-f]{12}")


Check = Callable[[Mapping[str, Any], str], None]
"""Raises CheckpointError for a state, given the place it was read from."""


def no_check(state: Mapping[str, Any], where: str) -> None:
    """Accept every complete state."""


def step_name(step: int) -> str:
    """Return the directory name of a step's checkpoint: 200 -> step-00000200."""
    return f"step-{step:08d}"


class CheckpointStore:
    """The checkpoints in one directory.

    Args:
        directory: where they lie; made by the first write.
        filesystem: the disk operations; tests pass one that fails or stops.
    """

    def __init__(self, directory: str | Path, filesystem: Filesystem | None = None) -> None:
        self.directory = Path(directory)
        self.filesystem = filesystem or Filesystem()
        self._known_whole: dict[str, str] = {}  # name -> manifest hash that this object verified

    # Writing

    def write(
        self,
        name: str,
        tree: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        *,
        step: int,
    ) -> Path:
        """Save a state durably: after the return no crash can lose it.

        A checkpoint of the same name stays complete until the new one is committed.

        Args:
            name: the directory's name, `step_name(step)` in a run.
            tree: the state; `tree["model"]` holds the weights, and every value is one that
                `state_tree.flatten` takes. Nothing may change it until this returns.
            metadata: plain JSON for the manifest (hashes of config and data, versions, scores).
            step: the optimizer step of the state.

        Returns:
            The path of the checkpoint directory.

        Raises:
            CheckpointError: the disk is full or refuses, something other than a checkpoint has the
                name, or the state has a value that cannot be saved. Nothing of the attempt
                stays; earlier checkpoints are unchanged.
            ValueError: the name is not a plain file name, or belongs to another step.
        """
        target = self.directory / checked_name(name)
        if not may_hold(name, step):
            raise ValueError(f"the name {name!r} belongs to another step than {step}")
        state = pack(tree)
        with saving_to(target):
            make_directories(self.filesystem, self.directory)
            self._settle(name)
            self._check_replaceable(target)
            self._check_space(state.num_bytes)
            staging = self._hidden(name, "tmp")
            try:
                manifest = write_checkpoint(self.filesystem, staging, state, metadata or {}, step)
                self._commit(staging, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._settle(name)
                raise
        self._known_whole[name] = manifest.hash
        with contextlib.suppress(OSError):  # committed; leftovers are removed next time
            self._settle(name)
        return target

    def _commit(self, staging: Path, target: Path) -> None:
        """Give the staged directory its name, durably."""
        if self.filesystem.status(target) is not None:
            self.filesystem.rename(target, self._hidden(target.name, "old"))
            # Renames may reach the disk in any order; the old one is needed until the new is there.
            self.filesystem.sync_directory(self.directory)
        self.filesystem.rename(staging, target)
        try:
            self.filesystem.sync_directory(self.directory)
        except BaseException:  # perhaps not on the disk: a failed save must not keep the name
            self.filesystem.rename(target, staging)
            raise

    def _check_replaceable(self, target: Path) -> None:
        status = self.filesystem.status(target)
        if status is None:
            return
        if not stat.S_ISDIR(status.st_mode) or set(self.filesystem.names(target)) - ALL_FILES:
            raise CheckpointError(
                "this is not a single checkpoint, so it is not replaced",
                where=str(target),
                fix="choose another path, or move it away",
            )

    def _check_space(self, estimate: int) -> None:
        needed = int(FREE_SPACE_FACTOR * estimate)
        free = self.filesystem.free_bytes(self.directory)
        if free < needed:
            raise CheckpointError(
                "the checkpoint could not be saved: the disk is full",
                where=str(self.directory),
                got=f"{free:,} bytes free",
                expected=f"at least {needed:,} bytes free",
                fix="free space or choose another place; earlier checkpoints are unchanged",
            )

    # Reading

    def verify(self, path: str | Path) -> Manifest:
        """Verify a checkpoint: every file, its size and its SHA-256.

        Raises:
            CheckpointError: it is damaged; the message names the file and the reason.
        """
        location, manifest = self._located(Path(path))
        check_hashes(self.filesystem, location, manifest)
        return manifest

    def load(self, path: str | Path) -> tuple[Manifest, dict[str, Any]]:
        """Return a checkpoint's manifest and its tree, read once and verified to the last byte.

        Raises:
            CheckpointError: as `verify`.
        """
        location, manifest = self._located(Path(path))
        return manifest, read_checkpoint(self.filesystem, location, manifest)

    def read(self, path: str | Path) -> dict[str, Any]:
        """Return the saved tree, with tensors on the CPU, after every byte of it is verified.

        Raises:
            CheckpointError: as `load`.
        """
        return self.load(path)[1]

    def trust(self, manifest: Manifest) -> None:
        """Treat a checkpoint as verified while it has this manifest; its hashes were checked."""
        self._known_whole[manifest.name] = manifest.hash

    def known_hash(self, name: str) -> str:
        """Return the manifest's hash of a checkpoint that this object verified, else ""."""
        return self._known_whole.get(name, "")

    def manifest(self, path: str | Path) -> Manifest:
        """Return a checkpoint's manifest, checking names and sizes of its files, not their hashes.

        Raises:
            CheckpointError: a missing or damaged manifest, or files that do not fit it.
        """
        return self._located(Path(path))[1]

    def holds(self, name: str) -> bool:
        """Return whether there is anything under a checkpoint's name, damaged or not."""
        path = self.directory / name
        status = self.filesystem.status(path)
        if status is not None and stat.S_ISDIR(status.st_mode):
            return bool(self.filesystem.names(path))
        return status is not None or self._set_aside(path) is not None

    def step_names(self) -> Sequence[str]:
        """Return the names of the step checkpoints, damaged ones included, newest first."""
        if self.filesystem.status(self.directory) is None:
            return []
        with reading_from(self.directory):
            names = set(self.filesystem.names(self.directory))
            names |= {name for _, name, kind in self._leftovers(self.directory) if kind == "old"}
        return sorted(filter(STEP_NAME.fullmatch, names), key=step_of, reverse=True)

    def scan(self) -> tuple[Sequence[Manifest], Sequence[CheckpointError]]:
        """Verify every step's checkpoint.

        Returns:
            The manifests of the undamaged ones, newest step first, and the error of each damaged
            one.
        """
        whole, damaged = [], []
        for name in self.step_names():
            try:
                whole.append(self.verify(self.directory / name))
            except CheckpointError as error:
                damaged.append(error)
        return whole, damaged

    def list(self) -> Sequence[Manifest]:
        """Return the manifests of the undamaged checkpoints, newest step first."""
        return self.scan()[0]

    def newest(self, check: Check = no_check) -> Manifest | None:
        """Return the manifest of the newest usable checkpoint, None without one.

        Args:
            check: raises CheckpointError for a state that training cannot use.
        """
        for name in self.step_names():
            with contextlib.suppress(CheckpointError):
                manifest, state = self.load(self.directory / name)
                check(state, str(self.directory / name))
                return manifest
        return None

    def _located(self, path: Path) -> tuple[Path, Manifest]:
        """Return where the checkpoint called `path` lies now, and its manifest.

        Raises:
            CheckpointError: it is missing, or its files do not fit its manifest.
        """
        with reading_from(path):
            status = self.filesystem.status(path)
            location = self._set_aside(path) if status is None else path
        if location is None:
            raise CheckpointError("there is no checkpoint here", where=str(path))
        if status is not None and not stat.S_ISDIR(status.st_mode):
            raise CheckpointError("this is not a checkpoint directory", where=str(path))
        manifest = read_manifest(self.filesystem, location, path.name)
        if not may_hold(path.name, manifest.step):
            raise CheckpointError(
                "the manifest belongs to another step",
                where=str(location / MANIFEST),
                got=f"step {manifest.step}",
            )
        return location, manifest

    def _set_aside(self, path: Path) -> Path | None:
        """Return where a killed save left the checkpoint that it was about to replace."""
        for hidden, name, kind in self._leftovers(path.parent):
            if (name, kind) == (path.name, "old"):
                return hidden
        return None

    # Pointers

    def point(self, pointer: str, name: str) -> None:
        """Make a pointer file (`best`, `last`) name a committed checkpoint.

        Raises:
            CheckpointError: there is no such checkpoint, or the disk refuses.
            ValueError: a pointer or name that is not a plain file name.
        """
        path = self.directory / checked_name(pointer)
        self.manifest(self.directory / checked_name(name))
        with saving_to(path):
            replace_file(self.filesystem, path, [f"{name}\n".encode()])

    def forget(self, pointer: str) -> None:
        """Remove a pointer, if it is there.

        Raises:
            CheckpointError: the disk refuses.
            ValueError: a pointer that is not a plain file name.
        """
        path = self.directory / checked_name(pointer)
        with saving_to(path):
            if self.filesystem.status(path) is not None:
                self.filesystem.remove_file(path)
                self.filesystem.sync_directory(self.directory)

    def resolve(self, pointer: str) -> Path | None:
        """Return the checkpoint that a pointer names; if it is damaged, the newest undamaged one.

        Returns:
            Its path; None without any checkpoint.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        name = self.pointed(pointer)
        if name is not None:
            with contextlib.suppress(CheckpointError):
                return self.directory / self.verify(self.directory / name).name
        whole, damaged = self.scan()
        if damaged and not whole:
            raise CheckpointError(
                "there is no usable checkpoint here",
                where=str(self.directory),
                got="; ".join(str(error).splitlines()[0] for error in damaged),
                fix="restore a copy, or start a new run in another directory",
            )
        return self.directory / whole[0].name if whole else None

    def pointed(self, pointer: str) -> str | None:
        """Return the name in a pointer file; None if it does not hold a plain name."""
        path = self.directory / pointer
        with contextlib.suppress(ValueError, OSError):
            status = self.filesystem.status(path)
            if status and stat.S_ISREG(status.st_mode) and status.st_size <= MAX_POINTER_BYTES:
                text = b"".join(read_chunks(self.filesystem, path)).decode()
                return checked_name(text.removesuffix("\n"))
        return None

    # Deleting and repairing

    def retire(self, names: Iterable[str]) -> None:
        """Delete checkpoints, each in one atomic step, and no other file.

        Raises:
            CheckpointError: something other than a checkpoint has the name, or the disk refuses.
        """
        for name in names:
            path = self.directory / checked_name(name)
            with saving_to(path):
                self._settle(name)
                self._check_replaceable(path)
                if self.filesystem.status(path) is not None:
                    self._known_whole.pop(name, None)
                    self._discard(path, name)

    def supersede(self, step: int) -> Sequence[str]:
        """Move the checkpoints of later steps to `superseded/`: the run continues from `step`.

        Otherwise they would count as its newest state.

        Returns:
            The names of the moved ones.

        Raises:
            CheckpointError: the disk refuses.
        """
        later = [name for name in self.step_names() if step_of(name) > step]
        if not later:
            return []
        self._move(later, self.directory / SUPERSEDED)
        return later

    def quarantine(self, names: Iterable[str]) -> None:
        """Move checkpoints that are damaged or unusable to `corrupt/`.

        Raises:
            CheckpointError: the disk refuses.
        """
        self._move(names, self.directory / CORRUPT)

    def _move(self, names: Iterable[str], place: Path) -> None:
        with saving_to(place):
            make_directories(self.filesystem, place)
            check_directory(place)
            for name in names:  # newest first: after a crash the remaining ones are older
                self._known_whole.pop(name, None)
                while self.holds(name):  # also a version that a killed save has renamed
                    self._settle(name)
                    self.filesystem.rename(self.directory / name, self._free_name(place / name))
            self.filesystem.sync_directory(place)
            self.filesystem.sync_directory(self.directory)

    def _free_name(self, path: Path) -> Path:
        return next(free for free in numbered(path) if self.filesystem.status(free) is None)

    def prune(
        self, keep_last: int, keep: Collection[str] = (), passing: Collection[str] = ()
    ) -> Sequence[str]:
        """Delete the checkpoints of old steps.

        Kept are the `keep_last` newest that are undamaged, those in `keep`, and those that a
        pointer names. Damaged ones do not count and stay in place, as evidence.

        Args:
            keep_last: at least 2, so that a run survives one damaged checkpoint.
            keep: names never to delete.
            passing: names that do not count towards `keep_last`. They are deleted, except the
                newest checkpoint of all, and as many as are needed to keep `keep_last` in total.

        Returns:
            The names of the deleted.

        Raises:
            ValueError: `keep_last` is less than 2.
            CheckpointError: the disk refuses.
        """
        if keep_last < 2:
            raise ValueError(f"keep_last must be at least 2, got {keep_last}")
        names = self.step_names()
        if len(names) <= keep_last:
            return []
        kept = set(keep) | {self.pointed(file) for file in self.filesystem.names(self.directory)}
        whole = [name for name in names if self._is_whole(name)]
        counted = [name for name in whole if name not in passing]
        # At least `keep_last` in total: the counted ones first, then the newest.
        kept |= {*whole[:1], *counted[:keep_last]}
        for name in whole:
            if len(kept.intersection(whole)) >= keep_last:
                break
            kept.add(name)
        victims = [name for name in whole if name not in kept]
        self.retire(victims)
        return victims

    def recover(self) -> Sequence[str]:
        """Complete or remove what a killed writer has left; call it before the first write.

        Returns:
            The names of the hidden files and directories that were restored or deleted.
        """
        found = tuple(self._leftovers(self.directory))
        with saving_to(self.directory):
            for name in sorted({name for _, name, _ in found}):
                self._settle(name)
        return [path.name for path, _, _ in found]

    def _settle(self, name: str) -> None:
        """Restore a checkpoint whose replacement was not committed; delete other leftovers."""
        for path, owner, kind in tuple(self._leftovers(self.directory)):
            if owner != name:
                continue
            if kind != "old":
                self._delete(path)
            elif self.filesystem.status(self.directory / name) is None:
                self.filesystem.rename(path, self.directory / name)
                self.filesystem.sync_directory(self.directory)
            elif self._is_whole(name):
                self._discard(path, name)

    def _discard(self, path: Path, name: str) -> None:
        """Delete a checkpoint; after a crash in between, nothing looks like a complete one."""
        gone = self._hidden(name, "gone")
        self.filesystem.rename(path, gone)
        self.filesystem.sync_directory(self.directory)
        self._delete(gone)

    def _delete(self, path: Path) -> None:
        """Delete a leftover: a file, or a directory with a checkpoint's files, manifest first."""
        status = self.filesystem.status(path)
        if status is not None and stat.S_ISDIR(status.st_mode):
            present = ALL_FILES & set(self.filesystem.names(path))
            for name in sorted(present, key=lambda name: (name != MANIFEST, name)):
                self.filesystem.remove_file(path / name)
            self.filesystem.remove_directory(path)
        else:
            self.filesystem.remove_file(path)
        self.filesystem.sync_directory(self.directory)

    def _is_whole(self, name: str) -> bool:
        """Return whether a checkpoint verifies; each object reads each content once."""
        path = self.directory / name
        try:
            if self._known_whole.get(name) != self.manifest(path).hash:
                self._known_whole[name] = self.verify(path).hash
        except CheckpointError:
            return False
        return True

    # Names

    def _hidden(self, name: str, kind: str) -> Path:
        return self.directory / f".{name}.{kind}-{random_suffix()}"

    def _leftovers(self, directory: Path) -> Iterator[tuple[Path, str, str]]:
        """Yield the path, owner's name and kind of every hidden leftover."""
        if self.filesystem.status(directory) is None:
            return
        for name in self.filesystem.names(directory):
            if match := HIDDEN_NAME.fullmatch(name):
                yield directory / name, match["name"], match["kind"]


def checked_name(name: str) -> str:
    """Return the name of a checkpoint or pointer if it is safe to join to a directory.

    Raises:
        ValueError: it is empty or hidden, has a separator or control character, or is too long.
    """
    plain = name.isprintable() and not name.startswith(".") and not set(name) & set("/\\:")
    if not name or not plain or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"not a plain file name: {name!r}")
    return name


def step_of(name: str) -> int:
    """Return the step in a step's name."""
    return int(name.removeprefix("step-"))


def may_hold(name: str, step: int) -> bool:
    """Return whether a checkpoint of this step may have this name: not that of another step."""
    return STEP_NAME.fullmatch(name) is None or name == step_name(step)
