"""One portable `.pt` file instead of a checkpoint directory: the only place that calls torch.load.

No command opens such a file; only Python code in which a person names one does. `weights_only=True`
keeps a file from running code when it is read. It is a mitigation and has been broken before
(CVE-2025-32434): read only files whose origin you trust.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import (
    Filesystem,
    make_directories,
    replace_file,
    saving_to,
)
from fundamentallm.training.checkpoint.tree import flatten, unflatten


def save_portable(
    path: Path, tree: Mapping[str, Any], *, filesystem: Filesystem | None = None
) -> None:
    """Write a state to one file with `torch.save`; the old file is there until the new one is.

    Args:
        path: the file; missing parent directories are made.
        tree: as `state_tree.flatten` takes; tensors are written as on the CPU.
        filesystem: the disk operations.

    Raises:
        CheckpointError: the state holds what cannot be saved, or the disk refuses.
    """
    filesystem = filesystem or Filesystem()
    skeleton, tensors = flatten(dict(tree))
    plain = unflatten(skeleton, {name: tensor.cpu() for name, tensor in tensors.items()})
    buffer = io.BytesIO()  # written by our own calls, so that a full disk is an OSError
    torch.save(plain, buffer)
    with saving_to(path):
        make_directories(filesystem, path.parent)
        replace_file(filesystem, path, [buffer.getbuffer()])


def load_portable(path: Path) -> dict[str, Any]:
    """Read a file of `save_portable`, with tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or holds other things than plain values and
            tensors.
    """
    if not path.is_file():
        raise CheckpointError("there is no such file", where=str(path))
    try:
        damaged = _damaged_record(path)
        tree = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and the unpickler raise many types for a damaged file
        raise CheckpointError(
            "this is not a whole file of plain values and tensors written by torch.save",
            where=str(path),
            got=(str(error).splitlines() or [type(error).__name__])[0],
        ) from error
    if damaged:
        raise CheckpointError(
            "the file is damaged", where=str(path), got=f"the record {damaged} was changed"
        )
    if not isinstance(tree, dict):
        raise CheckpointError(
            "the file does not hold a checkpoint", where=str(path), got=type(tree).__name__
        )
    flatten(tree)  # refuses what a checkpoint cannot hold
    return tree


def _damaged_record(path: Path) -> str | None:
    """Return the first record that differs from its CRC-32 or from the form of torch.save.

    torch.load compares no checksum (pytorch#28858), and returns arbitrary memory for a record
    that a flipped bit has marked as a directory.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.external_attr != 0 or record.compress_type != zipfile.ZIP_STORED:
                return record.filename
        return archive.testzip()
