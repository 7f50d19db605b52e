from __future__ import annotations

import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import Filesystem
from fundamentallm.training.checkpoint.portable import load_portable, save_portable


def test_a_state_survives(tmp_path: Path) -> None:
    tree = {
        "a": {3: (1, 2.5), "3": [None, True, math.inf]},
        "b": torch.arange(3, dtype=torch.int16),
    }
    save_portable(tmp_path / "x.pt", tree)

    loaded = load_portable(tmp_path / "x.pt")
    assert repr(loaded) == repr(tree)


def test_plain_torch_reads_it(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    save_portable(tmp_path / "deep" / "x.pt", {"model": {"a": weight, "b": weight}, "step": 3})

    tree = torch.load(tmp_path / "deep" / "x.pt", weights_only=True)
    assert tree["step"] == 3
    assert tree["model"]["a"].data_ptr() == tree["model"]["b"].data_ptr()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.pt"]


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.long)])
def test_a_changed_byte_never_loads_as_something_else(tmp_path: Path, stride: int) -> None:
    path = tmp_path / "x.pt"
    tree = {"model": {"a": torch.arange(1.0, 51.0)}, "step": 3}
    save_portable(path, tree)
    whole = path.read_bytes()
    found = 0
    for position in range(0, len(whole), stride):
        mask = (0x01, 0x10, 0xFF)[position % 3]
        path.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
        try:
            assert repr(load_portable(path)) == repr(tree)  # a byte between the records, or a date
        except CheckpointError as error:
            found += str(path) in str(error)
    assert found > 800 / stride


def test_a_record_that_became_a_directory_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_portable(path, {"model": {"a": torch.arange(1.0, 51.0)}})
    whole = path.read_bytes()
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/0"))
    path.write_bytes(whole[: entry + 38] + b"\x10" + whole[entry + 39 :])

    with pytest.raises(CheckpointError, match="data/0 was changed"):
        load_portable(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.pt"
    save_portable(path, {"model": {"a": torch.arange(50.0)}})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    with pytest.raises(CheckpointError, match=r"x\.pt"):
        load_portable(path)


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    torch.save({"model": Canary(canary)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"model": Canary(canary)}))
    torch.save({"model": Canary(canary)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)

    for name in ("zip.pt", "raw.pt", "old.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_portable(tmp_path / name)
    assert not canary.exists()


def test_other_contents_are_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": {1, 2}}, tmp_path / "set.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("hello", "world")

    for name in ("list.pt", "set.pt", "zip.pt", "missing.pt"):
        with pytest.raises(CheckpointError):
            load_portable(tmp_path / name)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    class Full(Filesystem):
        def sync(self, file: Any) -> None:
            raise OSError(28, "No space left on device")

    path = tmp_path / "x.pt"
    save_portable(path, {"step": 1})
    with pytest.raises(CheckpointError, match="disk is full"):
        save_portable(path, {"step": 2}, filesystem=Full())
    with pytest.raises(CheckpointError, match="cannot hold"):
        save_portable(path, {"step": {3}})
    assert load_portable(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError, match="there is no such file") as caught:
            load_portable(path)
        assert caught.value.where == str(path)
