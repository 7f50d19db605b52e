from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_injection.faults import CHANGES, Crash, FaultyFilesystem

from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import FileRecord, Filesystem
from fundamentallm.files.run_layout import MANIFEST
from fundamentallm.training.checkpoint import directory
from fundamentallm.training.checkpoint.directory import ALL_FILES
from fundamentallm.training.checkpoint.manifest import render_manifest
from fundamentallm.training.checkpoint.store import CheckpointStore, checked_name, step_name


def tree_of(value: float) -> dict[str, Any]:
    weight = torch.full((3, 2), value)
    return {
        "model": {"embedding.weight": weight, "head.weight": weight, "bias": torch.arange(3.0)},
        "optimizer": {"state": {0: {"step": torch.tensor(value)}}, "betas": (0.9, 0.999)},
        "metrics": {"val_loss": value},
    }


def value_of(tree: dict[str, Any]) -> float:
    """The value that a tree was made of, after a look at every part of it."""
    value = float(tree["metrics"]["val_loss"])
    assert tree["model"]["embedding.weight"].tolist() == [[value] * 2] * 3
    assert tree["model"]["head.weight"] is tree["model"]["embedding.weight"]
    assert tree["optimizer"] == {"state": {0: {"step": torch.tensor(value)}}, "betas": (0.9, 0.999)}
    return value


def write(store: CheckpointStore, step: int, value: float | None = None) -> Path:
    value = float(step) if value is None else value
    return store.write(step_name(step), tree_of(value), {"val_loss": value}, step=step)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def hidden(store: CheckpointStore) -> list[str]:
    return [path.name for path in store.directory.iterdir() if path.name.startswith(".")]


# Writing and reading


def test_a_checkpoint_survives_and_is_laid_out_as_promised(store: CheckpointStore) -> None:
    path = write(store, 200)

    assert path == store.directory / "step-00000200"
    assert {file.name for file in path.iterdir()} == ALL_FILES
    assert value_of(store.read(path)) == 200
    assert hidden(store) == []
    manifest = store.verify(path)
    assert (manifest.step, manifest.metadata) == (200, {"val_loss": 200.0})


def test_tied_weights_are_stored_once_under_plain_names(store: CheckpointStore) -> None:
    from safetensors.torch import load_file

    path = write(store, 1)

    assert set(load_file(path / "model.safetensors")) == {"embedding.weight", "bias"}
    skeletons = json.loads((path / "state.json").read_text())
    assert skeletons["model"]["head.weight"] == {"$tensor": "embedding.weight"}


def test_numbers_come_back_exactly(store: CheckpointStore) -> None:
    tree = {"model": {}, "a": {3: float("nan"), "3": float("-inf")}, "b": [None, (True, 1, 1.0)]}

    back = store.read(store.write("x", tree, step=0))

    assert list(back["a"]) == [3, "3"]
    assert back["a"][3] != back["a"][3]
    assert back["a"]["3"] == float("-inf")
    assert repr(back["b"]) == "[None, (True, 1, 1.0)]"


def test_tensors_under_awkward_keys_are_kept_apart(store: CheckpointStore) -> None:
    keys = ["__metadata__", "\ud800", "\\ud800", "", 0, "0", "a.b", "\0", "~2", "$tensor"]
    tree = {key: torch.tensor(number) for number, key in enumerate(keys)}

    back = store.read(store.write("x", {"model": {}, "s": {**tree, "a": {"b": tree[0]}}}, step=0))

    assert back["s"].pop("a")["b"] is back["s"][0]
    assert {key: tensor.item() for key, tensor in back["s"].items()} == {
        key: number for number, key in enumerate(keys)
    }
    model = store.read(store.write("x", {"model": tree}, step=0))["model"]
    assert {key: tensor.item() for key, tensor in model.items()} == {
        key: number for number, key in enumerate(keys)
    }


def test_what_was_read_is_no_longer_tied_to_the_file(store: CheckpointStore) -> None:
    path = write(store, 1)
    store.read(path)["model"]["bias"].fill_(9)

    assert value_of(store.read(path)) == 1


def test_every_byte_is_synced_before_the_name_appears(tmp_path: Path) -> None:
    filesystem = FaultyFilesystem(None, Crash)
    write(CheckpointStore(tmp_path, filesystem), 1)

    log = [operation for operation in filesystem.log if operation != "write"]
    assert log == [
        "make_directory",
        *["create", "sync"] * 4,
        "sync_directory",  # of the staged directory
        "rename",
        "sync_directory",  # of its parent
    ]


def test_saving_again_replaces(store: CheckpointStore) -> None:
    write(store, 5, 1.0)
    path = write(store, 5, 2.0)

    assert value_of(store.read(path)) == 2
    assert [entry.name for entry in store.directory.iterdir()] == ["step-00000005"]


def test_short_writes_are_continued(tmp_path: Path) -> None:
    class Slow(Filesystem):
        def write(self, file: FileIO, data: memoryview) -> int:
            return file.write(data[:7])

    store = CheckpointStore(tmp_path, Slow())

    assert value_of(store.read(write(store, 3))) == 3


def test_a_write_that_takes_nothing_ends(tmp_path: Path) -> None:
    class Stuck(Filesystem):
        def write(self, file: FileIO, data: memoryview) -> int:
            return 0

    with pytest.raises(CheckpointError, match="input/output error"):
        write(CheckpointStore(tmp_path, Stuck()), 3)


def test_what_is_damaged_while_it_is_written_is_never_committed(tmp_path: Path) -> None:
    class Flipping(Filesystem):
        def write(self, file: FileIO, data: memoryview) -> int:
            is_weights = str(file.name).endswith("model.safetensors")
            return file.write(bytes([data[0] ^ is_weights]) + data[1:])

    store = CheckpointStore(tmp_path, Flipping())

    with pytest.raises(CheckpointError, match="does not hold what was written"):
        write(store, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "a/b", "/a", "a\\b", "C:x", "a\nb", "x" * 201]
)
def test_names_that_could_escape_are_refused(store: CheckpointStore, name: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        checked_name(name)
    with pytest.raises(ValueError, match="plain file name"):
        store.write(name, tree_of(1.0), step=1)


@pytest.mark.parametrize("name", ["my run", "\N{SNOWMAN}", "v1.2", "x" * 200])
def test_other_names_work(store: CheckpointStore, name: str) -> None:
    assert value_of(store.read(store.write(name, tree_of(1.0), step=1))) == 1


def test_a_name_of_another_step_is_refused(store: CheckpointStore) -> None:
    with pytest.raises(ValueError, match="another step"):
        store.write(step_name(3), tree_of(1.0), step=4)


def test_a_state_without_a_model_is_refused(store: CheckpointStore) -> None:
    with pytest.raises(ValueError, match="model"):
        store.write("x", {"weights": {}}, step=0)


def test_a_state_that_cannot_be_saved_leaves_nothing(store: CheckpointStore) -> None:
    write(store, 1)
    for bad in ({"model": {}, "x": {1}}, {"model": {"x": torch.zeros(2, dtype=torch.complex64)}}):
        with pytest.raises(CheckpointError):
            store.write("x", bad, step=0)
    with pytest.raises(CheckpointError):
        store.write("x", {"model": {}}, {"val_loss": float("nan")}, step=0)
    assert [entry.name for entry in store.directory.iterdir()] == ["step-00000001"]


def test_what_is_no_checkpoint_is_never_overwritten_or_deleted(store: CheckpointStore) -> None:
    store.directory.mkdir(parents=True)
    notes = store.directory / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    (store.directory / "file").write_text("more of it")
    (store.directory / "link").symlink_to(notes)

    for name in ("notes", "file", "link"):
        with pytest.raises(CheckpointError, match="it is not replaced"):
            store.write(name, tree_of(1.0), step=1)
        with pytest.raises(CheckpointError, match="it is not replaced"):
            store.retire([name])
    assert (notes / "thesis.txt").read_text() == "years of work"
    assert hidden(store) == []


def test_a_full_disk_is_seen_before_the_first_byte(tmp_path: Path) -> None:
    class Full(FaultyFilesystem):
        def free_bytes(self, directory: Path) -> int:
            return 100

    filesystem = Full(None, Crash)

    with pytest.raises(CheckpointError, match="disk is full") as caught:
        write(CheckpointStore(tmp_path, filesystem), 1)
    assert "100 bytes free" in str(caught.value)
    assert filesystem.log == []


def test_a_fifth_more_than_the_state_must_be_free(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = directory.pack(tree_of(1.0)).num_bytes * 12 // 10
    monkeypatch.setattr(Filesystem, "free_bytes", lambda self, directory: enough)
    write(store, 1)
    monkeypatch.setattr(Filesystem, "free_bytes", lambda self, directory: enough - 1)
    with pytest.raises(CheckpointError, match="disk is full"):
        write(store, 1)


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointError, match="could not be saved") as caught:
        write(CheckpointStore(tmp_path / "file" / "checkpoints"), 1)
    assert "file" in caught.value.where


# Damage


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.long)])
def test_every_flipped_byte_is_found_and_its_file_named(
    store: CheckpointStore, stride: int
) -> None:
    path = write(store, 1)
    flips = 0
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for position in range(0, len(whole), stride):
            file.write_bytes(
                whole[:position]
                + bytes([whole[position] ^ (1 << position % 8)])
                + whole[position + 1 :]
            )
            with pytest.raises(CheckpointError) as caught:
                store.verify(path)
            assert caught.value.where == str(file)
            flips += 1
        file.write_bytes(whole)
    assert flips > 1000 / stride
    assert value_of(store.read(path)) == 1


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap(first: Path, second: Path) -> None:
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def replace(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


DAMAGES: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "bit in the weights": ("model.safetensors", lambda a, _: flip(a / "model.safetensors")),
    "bit in the tensors": ("state.safetensors", lambda a, _: flip(a / "state.safetensors")),
    "bit in the state": ("state.json", lambda a, _: flip(a / "state.json")),
    "cut": ("model.safetensors", lambda a, _: os.truncate(a / "model.safetensors", 20)),
    "emptied": ("state.json", lambda a, _: os.truncate(a / "state.json", 0)),
    "emptied manifest": (MANIFEST, lambda a, _: os.truncate(a / MANIFEST, 0)),
    "huge": ("state.json", lambda a, _: os.truncate(a / "state.json", 1 << 40)),
    "huge manifest": (MANIFEST, lambda a, _: os.truncate(a / MANIFEST, 1 << 40)),
    "missing": ("state.json", lambda a, _: (a / "state.json").unlink()),
    "missing manifest": (MANIFEST, lambda a, _: (a / MANIFEST).unlink()),
    "one too many": ("notes.txt", lambda a, _: (a / "notes.txt").write_text("")),
    "swapped with another's": (
        "model.safetensors",
        lambda a, b: swap(a / "model.safetensors", b / "model.safetensors"),
    ),
    "swapped within": (
        "model.safetensors",
        lambda a, _: swap(a / "model.safetensors", a / "state.safetensors"),
    ),
    "stale manifest": (MANIFEST, lambda a, b: shutil.copy(b / MANIFEST, a / MANIFEST)),
    "another step's files": (MANIFEST, lambda a, b: [shutil.copy(f, a) for f in b.iterdir()]),
    "link": (
        "state.json",
        lambda a, b: replace(a / "state.json", lambda p: p.symlink_to(b / p.name)),
    ),
    "linked manifest": (
        MANIFEST,
        lambda a, b: replace(a / MANIFEST, lambda p: p.symlink_to(b / p.name)),
    ),
    "pipe": ("state.json", lambda a, _: replace(a / "state.json", os.mkfifo)),
    "manifest is a pipe": (MANIFEST, lambda a, _: replace(a / MANIFEST, os.mkfifo)),
    "directory": ("state.json", lambda a, _: replace(a / "state.json", Path.mkdir)),
}


WORDS = {
    "cut": "size",
    "missing": "lacks",
    "missing manifest": "no manifest",
    "one too many": "unknown file",
    "pipe": "regular",
    "another step's files": "another step",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_left_alone(store: CheckpointStore, damage: str) -> None:
    file, inflict = DAMAGES[damage]
    good, path = write(store, 1), write(store, 2)
    store.point("last", path.name)
    inflict(path, good)
    if damage == "swapped with another's":
        good = write(store, 1)

    for read in (store.verify, store.read):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert Path(caught.value.where) == path / file
        assert WORDS.get(damage, "") in caught.value.what
    assert store.resolve("last") == good
    assert [manifest.step for manifest in store.list()] == [1]
    assert len(store.scan()[1]) == 1
    assert path.exists()


@pytest.mark.parametrize(
    "listed",
    [ALL_FILES, {"model.safetensors"}, {"../../x"}, set()],
    ids=lambda names: str(sorted(names)),
)
def test_a_manifest_of_other_files_is_refused(store: CheckpointStore, listed: set[str]) -> None:
    path = write(store, 1)
    records = {name: FileRecord(0, "") for name in listed}
    (path / MANIFEST).write_bytes(render_manifest(1, records, {}))

    with pytest.raises(CheckpointError, match="not of a checkpoint"):
        store.read(path)


def test_a_manifest_of_the_largest_size_is_read(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert directory.MAX_MANIFEST_BYTES == 16_777_216
    path = write(store, 1)
    size = (path / MANIFEST).stat().st_size
    monkeypatch.setattr(directory, "MAX_MANIFEST_BYTES", size)
    assert store.manifest(path).step == 1
    monkeypatch.setattr(directory, "MAX_MANIFEST_BYTES", size - 1)
    with pytest.raises(CheckpointError, match="too large"):
        store.manifest(path)


def forge(path: Path, skeletons: Any) -> None:
    """Give a checkpoint another state.json, with the hashes that belong to it."""
    (path / "state.json").write_text(json.dumps(skeletons))
    records = {}
    for name in ALL_FILES - {MANIFEST}:
        data = (path / name).read_bytes()
        records[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    (path / MANIFEST).write_bytes(render_manifest(1, records, {}))


WEIGHT = {"w": {"$tensor": "w"}}


@pytest.mark.parametrize(
    "skeletons",
    [
        [],
        {"model": WEIGHT},
        {"model": WEIGHT, "state": {}, "more": {}},
        {"model": WEIGHT, "state": []},
        {"model": WEIGHT, "state": {"model": {}}},
        {"model": [{"$tensor": "w"}], "state": {}},
        {"model": {"$tuple": [{"$tensor": "w"}]}, "state": {}},
    ],
    ids=str,
)
def test_a_state_of_another_form_with_right_hashes_is_refused(
    store: CheckpointStore, skeletons: Any
) -> None:
    path = store.write(step_name(1), {"model": {"w": torch.ones(2)}}, step=1)
    forge(path, {"model": WEIGHT, "state": {"a": 1}})
    assert set(store.read(path)) == {"model", "a"}
    forge(path, skeletons)
    with pytest.raises(CheckpointError, match="the saved state is malformed"):
        store.read(path)


def test_the_size_of_a_state_is_that_of_its_tensors_and_its_text() -> None:
    tree = {"model": {"w": torch.ones(3)}, "moment": torch.zeros(5, dtype=torch.float64)}
    state = directory.pack(tree)
    text = b"".join(state.contents["state.json"]())
    assert state.num_bytes == 3 * 4 + 5 * 8 + len(text)


def test_a_quick_look_does_not_replace_the_hashes(store: CheckpointStore) -> None:
    path = write(store, 1)
    flip(path / "model.safetensors")

    assert store.manifest(path).name == path.name, "sizes alone say nothing of it"
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        store.read(path)


def test_nothing_and_no_directory_are_told_apart(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        store.read(store.directory / "step-00000001")
    store.directory.mkdir(parents=True)
    (store.directory / "x").write_text("")
    with pytest.raises(CheckpointError, match="not a checkpoint directory"):
        store.read(store.directory / "x")


def test_a_linked_checkpoint_is_not_followed(store: CheckpointStore, tmp_path: Path) -> None:
    elsewhere = write(CheckpointStore(tmp_path / "other"), 1)
    store.directory.mkdir(parents=True)
    (store.directory / "step-00000001").symlink_to(elsewhere)

    assert store.list() == []


def test_reading_errors_of_the_disk_are_ours(store: CheckpointStore) -> None:
    class Failing(Filesystem):
        def open(self, path: Path) -> FileIO:
            raise OSError(errno.EIO, "Input/output error", str(path))

    path = write(store, 1)
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointStore(store.directory, Failing()).read(path)


# Many checkpoints


def test_they_are_listed_by_step_not_by_time(store: CheckpointStore) -> None:
    for step in (3, 100_000_000, 20_000_000, 1):
        write(store, step)

    assert [manifest.step for manifest in store.list()] == [100_000_000, 20_000_000, 3, 1]


def test_an_empty_or_missing_place_has_none(store: CheckpointStore) -> None:
    assert store.list() == []
    assert store.resolve("last") is None
    assert store.recover() == []
    store.directory.mkdir(parents=True)
    assert store.resolve("best") is None
    assert store.prune(2) == []


def test_a_copied_and_renamed_place_works_alone(store: CheckpointStore, tmp_path: Path) -> None:
    write(store, 1)
    write(store, 2)
    store.point("last", step_name(1))
    shutil.copytree(store.directory, tmp_path / "copy")
    copy = CheckpointStore(tmp_path / "copy")

    assert copy.resolve("last") == tmp_path / "copy" / step_name(1)
    copy.retire([step_name(1)])
    assert len(store.list()) == 2


def test_pointers_are_followed(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        write(store, step)
    store.point("best", step_name(1))
    store.point("best", step_name(2))

    assert (store.directory / "best").read_text() == "step-00000002\n"
    assert store.resolve("best") == store.directory / step_name(2)
    assert hidden(store) == []


def test_a_forgotten_pointer_is_gone(store: CheckpointStore) -> None:
    write(store, 1)
    for name in ("best", "last"):
        store.point(name, step_name(1))
    for _ in range(2):  # the second time there is none
        store.forget("best")
        assert store.pointed("best") is None
        assert not (store.directory / "best").exists()
    assert store.pointed("last") == step_name(1)
    with pytest.raises(ValueError, match="not a plain file name"):
        store.forget("../last")


def test_a_pointer_never_names_what_is_not_there(store: CheckpointStore) -> None:
    write(store, 1)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        store.point("best", step_name(2))
    assert not (store.directory / "best").exists()


@pytest.mark.parametrize(
    "text",
    [
        "step-00000009\n",
        "",
        "\n",
        "../../outside\n",
        "..\n",
        "/etc\n",
        "step-00000001/..\n",
        "step-00000001\nstep-00000002",
        "x" * 300,
        "\udcff",
        "\0",
    ],
    ids=repr,
)
def test_a_bad_pointer_is_ignored(store: CheckpointStore, text: str) -> None:
    write(CheckpointStore(store.directory.parent.parent), 1, 7.0)
    (store.directory.parent.parent / step_name(1)).rename(store.directory.parent.parent / "outside")
    write(store, 1)
    write(store, 2)
    (store.directory / "last").write_bytes(text.encode(errors="surrogateescape"))

    assert store.resolve("last") == store.directory / step_name(2)


def test_a_huge_pointer_is_not_read(store: CheckpointStore) -> None:
    write(store, 1)
    (store.directory / "last").touch()
    os.truncate(store.directory / "last", 1 << 40)

    assert store.resolve("last") == store.directory / step_name(1)


def test_a_pointer_that_is_a_pipe_is_ignored(store: CheckpointStore) -> None:
    write(store, 1)
    os.mkfifo(store.directory / "last")

    assert store.resolve("last") == store.directory / step_name(1)
    assert store.prune(2) == []


def test_only_damaged_ones_left_is_an_error_with_reasons(store: CheckpointStore) -> None:
    flip(write(store, 1) / "model.safetensors")
    (write(store, 2) / MANIFEST).unlink()

    with pytest.raises(CheckpointError, match="there is no usable checkpoint here") as caught:
        store.resolve("last")
    assert "contents changed" in caught.value.got
    assert "no manifest" in caught.value.got


def test_pruning_keeps_the_newest_the_pointed_and_the_named(store: CheckpointStore) -> None:
    for step in range(1, 9):
        write(store, step)
    store.write("mine", tree_of(0.0), step=0)
    store.point("best", step_name(2))

    removed = store.prune(3, keep={step_name(4)})

    assert sorted(removed) == [step_name(step) for step in (1, 3, 5)]
    assert [manifest.step for manifest in store.list()] == [8, 7, 6, 4, 2]
    assert store.verify(store.directory / "mine").step == 0
    assert hidden(store) == []


def test_pruning_counts_only_whole_ones(store: CheckpointStore) -> None:
    for step in range(1, 6):
        write(store, step)
    flip(store.directory / step_name(5) / "model.safetensors")
    os.truncate(store.directory / step_name(4) / "state.json", 3)

    CheckpointStore(store.directory).prune(2)

    assert [manifest.step for manifest in store.list()] == [3, 2]
    assert (store.directory / step_name(5)).exists()


def test_later_steps_are_superseded_and_never_read_again(store: CheckpointStore) -> None:
    for step in (10, 20, 30, 40):
        write(store, step)
    (store.directory / step_name(30) / MANIFEST).write_text("damaged")

    assert list(store.supersede(20)) == [step_name(40), step_name(30)]
    assert list(store.step_names()) == [step_name(20), step_name(10)]
    assert value_of(store.read(store.directory / "superseded" / step_name(40))) == 40
    newest = store.newest()
    assert newest is not None
    assert newest.step == 20

    write(store, 40, value=41.0)
    store.supersede(20)
    assert value_of(store.read(store.directory / "superseded" / step_name(40))) == 40
    assert (store.directory / "superseded" / f"{step_name(40)}-2").is_dir()
    assert list(store.supersede(20)) == []


def test_nothing_is_moved_through_a_link(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (10, 20):
        write(store, step)
    (tmp_path / "elsewhere").mkdir()
    (store.directory / "superseded").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError):
        store.supersede(10)
    assert [manifest.step for manifest in store.list()] == [20, 10]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_version_that_a_killed_save_set_aside_is_superseded_too(store: CheckpointStore) -> None:
    write(store, 10)
    write(store, 20)
    path = store.directory / step_name(20)
    path.rename(store.directory / f".{step_name(20)}.old-0123456789ab")
    store.supersede(10)
    assert list(store.step_names()) == [step_name(10)]
    assert hidden(store) == []


def test_the_newest_is_the_newest_whole_one(store: CheckpointStore) -> None:
    assert store.newest() is None
    write(store, 10)
    write(store, 20)
    (store.directory / step_name(20) / MANIFEST).unlink()
    newest = store.newest()
    assert newest is not None
    assert newest.step == 10


def test_fewer_than_two_are_refused(store: CheckpointStore) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        store.prune(1)


def test_retiring_takes_only_the_named(store: CheckpointStore) -> None:
    for step in (1, 2):
        write(store, step)
    store.retire([step_name(1), step_name(7)])

    assert [manifest.step for manifest in store.list()] == [2]
    with pytest.raises(ValueError, match="plain file name"):
        store.retire(["../x"])


# Faults and crashes at every operation


# A run's use of the store: first saves, pointers, replaced saves (one of them the best), retention.
# Each operation removes one checkpoint at most, so its effect is there or not there.
RUN: list[Callable[[CheckpointStore], Any]] = [
    lambda store: write(store, 1),
    lambda store: store.point("best", step_name(1)),
    lambda store: store.point("last", step_name(1)),
    lambda store: write(store, 2),
    lambda store: store.point("last", step_name(2)),
    lambda store: write(store, 3),
    lambda store: write(store, 4),
    lambda store: store.point("last", step_name(4)),
    lambda store: store.prune(2),
    lambda store: write(store, 4, 14.0),
    lambda store: write(store, 1, 11.0),
    lambda store: store.retire([step_name(3)]),
]
State = tuple[dict[str, float], Path | None, Path | None]


def state_of(place: Path) -> State:
    """What a reader finds: the value of every checkpoint, and where the pointers lead."""
    store = CheckpointStore(place)
    values = {name: value_of(store.read(place / name)) for name in store.step_names()}
    best, last = (path and Path(path.name) for path in map(store.resolve, ("best", "last")))
    return values, best, last


@dataclass(frozen=True)
class QuietRun:
    """A run without faults: before each operation and at the end, the state and a copy of it."""

    states: list[State]
    copies: list[Path]
    num_operations: list[int]

    def points(self, stride: int = 1, offset: int = 0) -> Iterator[tuple[int, int]]:
        """Yield places to fail: the operation of RUN, the file-system operation inside it."""
        places = [(i, n) for i, count in enumerate(self.num_operations) for n in range(count)]
        yield from places[offset::stride]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> QuietRun:
    top = tmp_path_factory.mktemp("quiet")
    place = top / "checkpoints"
    place.mkdir()
    filesystem = FaultyFilesystem(None, Crash)
    store = CheckpointStore(place, filesystem)
    run = QuietRun([state_of(place)], [Path(shutil.copytree(place, top / "0"))], [])
    for index, operation in enumerate(RUN):
        before = len(filesystem.log)
        operation(store)
        run.states.append(state_of(place))
        run.copies.append(Path(shutil.copytree(place, top / str(index + 1))))
        run.num_operations.append(len(filesystem.log) - before)
    assert set(filesystem.log) == set(CHANGES)
    assert run.states[-1][0] == {step_name(4): 14.0, step_name(1): 11.0}
    return run


def fault_of(operation: Callable[[CheckpointStore], Any], store: CheckpointStore) -> Any:
    """Return what the operation raises, or None."""
    try:
        operation(store)
    except (CheckpointError, Crash) as error:
        return error
    return None


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.long)])
def test_a_crash_at_any_point_leaves_all_of_an_operation_or_nothing(
    tmp_path: Path, quiet: QuietRun, stride: int
) -> None:
    crashes = 0
    for index, crash_at in quiet.points(stride):
        allowed = quiet.states[index : index + 2]
        place = tmp_path / f"{index}-{crash_at}"
        shutil.copytree(quiet.copies[index], place)
        store = CheckpointStore(place, FaultyFilesystem(crash_at, Crash))
        assert isinstance(fault_of(RUN[index], store), Crash)

        assert state_of(place) in allowed, "as a mere reader finds it"
        store = CheckpointStore(place)
        store.recover()
        assert state_of(place) in allowed, "after the repair"
        assert hidden(store) == []
        RUN[index](store)
        assert state_of(place) == quiet.states[index + 1]
        crashes += 1
    assert crashes > 120 / stride


LATER = [errno.EDQUOT, errno.EROFS, errno.EACCES]


@pytest.mark.parametrize(
    "code",
    [errno.ENOSPC, errno.EIO, *(pytest.param(code, marks=pytest.mark.long) for code in LATER)],
)
def test_an_error_at_any_point_spares_what_was_committed(
    tmp_path: Path, quiet: QuietRun, code: int
) -> None:
    refused = 0
    for index, fail_at in quiet.points(stride=5, offset=code % 5):
        place = tmp_path / f"{index}-{fail_at}"
        shutil.copytree(quiet.copies[index], place)
        store = CheckpointStore(place, FaultyFilesystem(fail_at, lambda: OSError(code, "fault")))
        error = fault_of(RUN[index], store)
        if error is not None:
            refused += 1
            assert "could not be saved" in str(error)
            assert state_of(place) in quiet.states[index : index + 2]
        else:  # the fault came after the commit, while the replaced checkpoint was deleted
            assert state_of(place) == quiet.states[index + 1]
        RUN[index](store)
        store.recover()
        assert hidden(store) == []
        assert state_of(place) == quiet.states[index + 1]
    assert refused > 20


def test_a_failed_save_leaves_nothing_and_keeps_the_replaced_one(tmp_path: Path) -> None:
    """Fail every operation of one replacing save, the syncs after the renames included."""
    filesystem = FaultyFilesystem(None, Crash)
    store = CheckpointStore(tmp_path / "count", filesystem)
    write(store, 1, 1.0)
    start = len(filesystem.log)
    write(store, 1, 2.0)
    failures = 0
    for fail_at in range(start, len(filesystem.log)):
        place = tmp_path / str(fail_at)
        fault = FaultyFilesystem(fail_at, lambda: OSError(errno.EIO, "Input/output error"))
        store = CheckpointStore(place, fault)
        write(store, 1, 1.0)
        try:
            write(store, 1, 2.0)
        except CheckpointError:
            failures += 1
            assert state_of(place)[0] == {step_name(1): 1.0}
            assert hidden(store) == []
        else:
            assert state_of(place)[0] == {step_name(1): 2.0}
    assert failures > 15


def test_a_foreign_interrupt_is_passed_on_and_cleaned_up(tmp_path: Path) -> None:
    filesystem = FaultyFilesystem(8, KeyboardInterrupt)

    with pytest.raises(KeyboardInterrupt):
        write(CheckpointStore(tmp_path, filesystem), 1)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_others_and_of_users_are_left_alone(store: CheckpointStore) -> None:
    write(store, 1)
    other = store.directory / ".other.tmp-0123456789ab"
    other.mkdir()
    (store.directory / ".notes.old").write_text("")
    write(store, 2)

    assert sorted(hidden(store)) == [".notes.old", ".other.tmp-0123456789ab"]
    assert store.recover() == [".other.tmp-0123456789ab"]
    assert hidden(store) == [".notes.old"]


def test_reading_and_listing_change_nothing(store: CheckpointStore) -> None:
    path = write(store, 1)
    write(store, 2)
    path.rename(store.directory / ".step-00000001.old-0123456789ab")
    (store.directory / ".step-00000003.tmp-0123456789ab").mkdir()
    filesystem = FaultyFilesystem(0, Crash)
    reader = CheckpointStore(store.directory, filesystem)

    assert [manifest.step for manifest in reader.list()] == [2, 1]
    assert value_of(reader.read(path)) == 1
    assert reader.resolve("last") == store.directory / step_name(2)
    assert filesystem.log == []


def test_a_set_aside_one_does_not_give_way_to_a_damaged_one(store: CheckpointStore) -> None:
    path = write(store, 1, 1.0)
    aside = store.directory / ".step-00000001.old-0123456789ab"
    shutil.copytree(path, aside)
    flip(path / "model.safetensors")

    store = CheckpointStore(store.directory)
    store.recover()
    assert aside.exists()
    write(store, 1, 2.0)
    assert hidden(store) == []


# ---------------------------------------------------------------------- what does not count


@pytest.mark.parametrize(
    ("steps", "passing", "left"),
    [
        ([1, 2, 3, 4], [], [3, 4]),
        ([1, 2, 3, 4], [4], [2, 3, 4]),  # the newest of all stays besides the two that count
        ([1, 2, 3, 4], [3], [2, 4]),
        ([1, 2, 3, 4], [2, 3], [1, 4]),
        ([1, 2, 3, 4], [1, 2, 3], [3, 4]),  # never fewer than are asked for
        ([1, 2, 3, 4], [1, 2, 3, 4], [3, 4]),
        ([1, 2], [1, 2], [1, 2]),
    ],
)
def test_passing_checkpoints_take_no_place(tmp_path, steps, passing, left):
    store = CheckpointStore(tmp_path)
    for step in steps:
        store.write(step_name(step), tree_of(float(step)), step=step)
    victims = store.prune(2, passing=[step_name(step) for step in passing])
    assert sorted(store.step_names()) == [step_name(step) for step in left]
    assert sorted(victims) == [step_name(step) for step in steps if step not in left]
