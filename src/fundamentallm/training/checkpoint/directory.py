"""One checkpoint directory: a state in exactly four files.

    model.safetensors     the weights under their state_dict names, tied ones once
    state.safetensors     all other tensors
    state.json            everything else, and the place of each tensor
    MANIFEST.json         size and SHA-256 of the other three, under a hash of its own

Reading opens only regular files whose names and sizes are in the manifest, and parses only files
whose hash is right.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import (
    FileRecord,
    Filesystem,
    read_chunks,
    reading_from,
    same_contents,
    write_file,
)
from fundamentallm.files.run_layout import MANIFEST, MODEL, STATE, STATE_TENSORS
from fundamentallm.training.checkpoint.manifest import (
    Manifest,
    parse_json,
    parse_manifest,
    render_manifest,
)
from fundamentallm.training.checkpoint.tensor_file import (
    num_bytes,
    parse_tensor_file,
    tensor_file_chunks,
)
from fundamentallm.training.checkpoint.tree import flatten, unflatten

CONTENT_FILES = frozenset({MODEL, STATE_TENSORS, STATE})
ALL_FILES = CONTENT_FILES | {MANIFEST}

MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class PackedState:
    """A state that is ready to be written.

    Args:
        contents: functions that return the bytes of each content file, chunk by chunk.
        num_bytes: the size of the contents, headers aside.
    """

    contents: Mapping[str, Callable[[], Iterable[bytes | memoryview]]]
    num_bytes: int


def pack(tree: Mapping[str, Any]) -> PackedState:
    """Divide a state over the content files.

    Args:
        tree: `tree["model"]` holds the weights; every value is one that `flatten` takes. It must
            not change until the result is written.

    Raises:
        CheckpointError: the state has a value that cannot be saved; the message has its path.
        ValueError: there is no `tree["model"]`.
    """
    if "model" not in tree:
        raise ValueError(f"the state has no 'model', only {sorted(tree)}")
    model, model_tensors = flatten(dict(tree["model"]))
    state, tensors = flatten({key: value for key, value in tree.items() if key != "model"})
    skeletons = json.dumps({"model": model, "state": state}, allow_nan=False).encode()
    return PackedState(
        {
            MODEL: partial(tensor_file_chunks, model_tensors),
            STATE_TENSORS: partial(tensor_file_chunks, tensors),
            STATE: lambda: [skeletons],
        },
        num_bytes(model_tensors) + num_bytes(tensors) + len(skeletons),
    )


def write_checkpoint(
    filesystem: Filesystem,
    path: Path,
    state: PackedState,
    metadata: Mapping[str, Any],
    step: int,
) -> Manifest:
    """Make a checkpoint directory: write and sync every file, read all back, sync the directory.

    Raises:
        CheckpointError: metadata that is not plain JSON, or the files differ from what was written.
        OSError: the disk refuses.
    """
    filesystem.make_directory(path)
    files = {
        name: write_file(filesystem, path / name, make()) for name, make in state.contents.items()
    }
    write_file(filesystem, path / MANIFEST, [render_manifest(step, files, metadata)])
    manifest = read_manifest(filesystem, path, path.name)
    for name, make in state.contents.items():
        # Compared with the memory: as good a proof as another hash, in a fraction of the time.
        if not same_contents(filesystem, path / name, make()):
            raise CheckpointError(
                "the file is damaged: it does not hold what was written", where=str(path / name)
            )
    filesystem.sync_directory(path)
    return manifest


def read_manifest(filesystem: Filesystem, path: Path, name: str) -> Manifest:
    """Return a checkpoint's manifest; of its files check names, kinds and sizes, not the hashes.

    Args:
        filesystem: the disk operations.
        path: the directory.
        name: the name of the checkpoint; a replaced one has another path.

    Raises:
        CheckpointError: a missing or damaged manifest, or files that do not fit it.
    """
    with reading_from(path):
        if filesystem.status(path / MANIFEST) is None:
            raise CheckpointError("the checkpoint has no manifest", where=str(path / MANIFEST))
        if _regular_size(filesystem, path / MANIFEST) > MAX_MANIFEST_BYTES:
            raise CheckpointError("the manifest is too large", where=str(path / MANIFEST))
        data = b"".join(read_chunks(filesystem, path / MANIFEST))
        manifest = parse_manifest(data, name, str(path / MANIFEST))
        if set(manifest.files) != CONTENT_FILES:
            raise CheckpointError(
                "the manifest is not of a checkpoint",
                where=str(path / MANIFEST),
                got=", ".join(sorted(manifest.files)) or "no files",
                expected=", ".join(sorted(CONTENT_FILES)),
            )
        for file in sorted(ALL_FILES ^ set(filesystem.names(path))):
            fault = "lacks a file" if file in ALL_FILES else "has an unknown file"
            raise CheckpointError(f"the checkpoint {fault}", where=str(path / file))
        for file, record in manifest.files.items():
            size = _regular_size(filesystem, path / file)
            if size != record.size:
                raise CheckpointError(
                    "the file is damaged: its size is wrong",
                    where=str(path / file),
                    got=f"{size:,} bytes",
                    expected=f"{record.size:,} bytes",
                    fix="use another checkpoint",
                )
    return manifest


def check_hashes(filesystem: Filesystem, path: Path, manifest: Manifest) -> None:
    """Check that every file of a checkpoint has the hash in its manifest.

    Raises:
        CheckpointError: one does not; the message names it.
    """

    def check(file: str) -> None:
        for _ in _checked_chunks(filesystem, path / file, manifest.files[file]):
            pass

    # The files at once, each on a core: hashing takes longer than reading.
    with ThreadPoolExecutor(max_workers=len(manifest.files)) as pool:
        for outcome in [pool.submit(check, file) for file in manifest.files]:
            outcome.result()


def read_checkpoint(filesystem: Filesystem, path: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the saved tree, with tensors on the CPU; nothing is parsed before its hash is checked.

    Raises:
        CheckpointError: a file whose hash is not that of the manifest; the message names it.
    """

    def contents(file: str) -> bytes:
        return b"".join(_checked_chunks(filesystem, path / file, manifest.files[file]))

    where = {file: str(path / file) for file in CONTENT_FILES}
    skeletons = parse_json(contents(STATE), where[STATE])
    if not isinstance(skeletons, dict) or set(skeletons) != {"model", "state"}:
        raise CheckpointError("the saved state is malformed", where=where[STATE])
    tensors = parse_tensor_file(contents(STATE_TENSORS), where[STATE_TENSORS])
    state = _restored(skeletons["state"], tensors, where[STATE])
    if "model" in state:
        raise CheckpointError("the saved state is malformed", where=where[STATE], got="two models")
    weights = parse_tensor_file(contents(MODEL), where[MODEL])
    return {"model": _restored(skeletons["model"], weights, where[STATE]), **state}


def _regular_size(filesystem: Filesystem, path: Path) -> int:
    """Return a file's size; refuse links, pipes and devices before they are opened."""
    status = filesystem.status(path)
    if status is None or not stat.S_ISREG(status.st_mode):
        raise CheckpointError("this is not a regular file", where=str(path))
    return status.st_size


def _checked_chunks(filesystem: Filesystem, path: Path, record: FileRecord) -> Iterator[bytes]:
    """Yield a file's contents; raise at the end if they do not fit the record."""
    digest = hashlib.sha256()
    with reading_from(path):
        for chunk in read_chunks(filesystem, path):
            digest.update(chunk)
            yield chunk
    if digest.hexdigest() != record.sha256:
        raise CheckpointError(
            "the file is damaged: its contents changed after it was saved",
            where=str(path),
            got=f"SHA-256 {digest.hexdigest()}",
            expected=f"SHA-256 {record.sha256}",
            fix="use another checkpoint",
        )


def _restored(skeleton: Any, tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    tree = unflatten(skeleton, tensors)
    if not isinstance(tree, dict):
        raise CheckpointError("the saved state is malformed", where=where)
    return tree
