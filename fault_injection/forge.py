"""Checkpoints whose hashes are right and whose contents are not what any run wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from fundamentallm.files.filesystem import FileRecord
from fundamentallm.files.run_layout import MANIFEST, MODEL, STATE, STATE_TENSORS
from fundamentallm.training.checkpoint.manifest import render_manifest
from fundamentallm.training.checkpoint.tensor_file import tensor_file_chunks


@dataclass
class Contents:
    """What a checkpoint's files hold, to be changed in place.

    Attributes:
        step: of the manifest.
        metadata: of the manifest.
        skeletons: the object of state.json.
        weights: the tensors of model.safetensors by name.
        tensors: those of state.safetensors.
    """

    step: int
    metadata: dict[str, Any]
    skeletons: Any
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, checkpoint: Path) -> Contents:
        """Read a sound checkpoint."""
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        return cls(
            manifest["step"],
            manifest["metadata"],
            json.loads((checkpoint / STATE).read_bytes()),
            load((checkpoint / MODEL).read_bytes()),
            load((checkpoint / STATE_TENSORS).read_bytes()),
        )

    def write(self, checkpoint: Path) -> None:
        """Write a checkpoint over one that is there, with the hashes of these contents."""
        files = {
            MODEL: b"".join(tensor_file_chunks(self.weights)),
            STATE_TENSORS: b"".join(tensor_file_chunks(self.tensors)),
            STATE: json.dumps(self.skeletons).encode(),
        }
        write_files(checkpoint, self.step, self.metadata, files)


def write_files(
    checkpoint: Path, step: int, metadata: dict[str, Any], files: dict[str, bytes]
) -> None:
    """Write the contents of a checkpoint's files and the manifest that vouches for them."""
    records = {}
    for name, data in files.items():
        (checkpoint / name).write_bytes(data)
        records[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    (checkpoint / MANIFEST).write_bytes(render_manifest(step, records, metadata))


def forge(checkpoint: Path, change: Callable[[Contents], object]) -> None:
    """Change what a checkpoint says, and leave it whole in the eyes of every hash."""
    contents = Contents.read(checkpoint)
    change(contents)
    contents.write(checkpoint)
