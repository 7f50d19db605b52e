from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import FileRecord
from fundamentallm.training.checkpoint.manifest import (
    Manifest,
    parse_json,
    parse_manifest,
    render_manifest,
)

FILES = {"model.safetensors": FileRecord(10, "ab" * 32), "state.json": FileRecord(2, "cd" * 32)}


def parse(data: bytes) -> Manifest:
    return parse_manifest(data, "step-00000007", "dir/MANIFEST.json")


def signed(**fields: Any) -> bytes:
    """A manifest of any fields with a hash that fits them, made without the code under test."""
    content = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    fields["hash"] = hashlib.sha256(content.encode()).hexdigest()
    return (json.dumps(fields, sort_keys=True, indent=2) + "\n").encode()


def test_it_survives() -> None:
    manifest = parse(render_manifest(7, FILES, {"val_loss": 1.5, "name": "\N{SNOWMAN}"}))

    assert manifest.name == "step-00000007"
    assert manifest.step == 7
    assert manifest.files == FILES
    assert manifest.metadata == {"val_loss": 1.5, "name": "\N{SNOWMAN}"}


def test_metadata_comes_back_as_json_has_it() -> None:
    assert parse(render_manifest(0, {}, {"a": (1, 2), 3: None})).metadata == {
        "a": [1, 2],
        "3": None,
    }


def test_the_independent_writer_agrees() -> None:
    data = signed(schema=1, step=7, files={}, metadata={})

    assert data == render_manifest(7, {}, {})


def test_every_change_of_a_byte_is_found() -> None:
    data = render_manifest(7, FILES, {"val_loss": 1.5})
    damaged = 0
    for position in range(len(data)):
        for value in (data[position] ^ 1, data[position] ^ 0x20, 0x20, 0x0A):
            other = data[:position] + bytes([value]) + data[position + 1 :]
            if other != data:
                damaged += 1
                with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
                    parse(other)
    assert damaged > 1000


@pytest.mark.parametrize("length", [0, 1, 50, -1])
def test_a_cut_is_found(length: int) -> None:
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        parse(render_manifest(7, FILES, {})[:length])


def test_a_newer_schema_says_so() -> None:
    with pytest.raises(CheckpointError, match="newer version"):
        parse(signed(schema=2, something="else"))


@pytest.mark.parametrize(
    "fields",
    [
        {"schema": 1, "step": 1, "files": {}},
        {"schema": 1, "step": 1, "files": {}, "metadata": {}, "more": 1},
        {"schema": True, "step": 1, "files": {}, "metadata": {}},
        {"schema": 0, "step": 1, "files": {}, "metadata": {}},
        {"schema": 1, "step": 1.0, "files": {}, "metadata": {}},
        {"schema": 1, "step": True, "files": {}, "metadata": {}},
        {"schema": 1, "step": 1, "files": [], "metadata": {}},
        {"schema": 1, "step": 1, "files": {}, "metadata": []},
        {"schema": 1, "step": 1, "files": {"a": {"size": "1", "sha256": ""}}, "metadata": {}},
        {"schema": 1, "step": 1, "files": {"a": {"size": 1, "sha256": "", "x": 1}}, "metadata": {}},
        {"schema": 1, "step": 1, "files": {"a": 1}, "metadata": {}},
        {"schema": 1, "step": 1, "files": {"a": {"size": True, "sha256": ""}}, "metadata": {}},
    ],
    ids=str,
)
def test_wrong_fields_with_a_right_hash_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        parse(signed(**fields))


@pytest.mark.parametrize(
    ("metadata", "where", "expected"),
    [
        ({"config": 5}, "'config'", "dict"),
        ({"config": {"training": []}}, "'config.training'", "dict"),
        ({"val_loss": "low"}, "'val_loss'", "int or float or null"),
        ({"val_loss": True}, "'val_loss'", "int or float or null"),
        ({"data": {"sha256": 3}}, "'data.sha256'", "str or null"),
    ],
)
def test_metadata_of_another_type_is_refused(
    metadata: dict[str, Any], where: str, expected: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(render_manifest(7, {}, metadata))
    assert caught.value.what.startswith(f"{where} in the checkpoint's metadata is not of")
    assert caught.value.expected == expected


def test_metadata_may_be_absent_or_null() -> None:
    for metadata in ({"config": {}}, {"data": {"sha256": None}}, {"val_loss": None}):
        assert parse(render_manifest(7, {}, metadata)).metadata == metadata


@pytest.mark.parametrize("metadata", [{"a": float("nan")}, {"a": {1}}, {(1, 2): 3}], ids=str)
def test_metadata_that_is_no_json_is_refused(metadata: dict[Any, Any]) -> None:
    with pytest.raises(CheckpointError, match="metadata"):
        render_manifest(0, {}, metadata)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"a": 1, "a": 1}',
        b"[NaN]",
        b"[-Infinity]",
        b"[1e999]",
        b"\xff",
        b"[" * 100_000,
        b"[1] 2",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_json_is_strict(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json: this is not strict JSON"):
        parse_json(data, "state.json")


def test_a_deeply_nested_manifest_with_a_right_hash_is_refused() -> None:
    for depth in range(940, 975):  # somewhere here the stack ends in the parser, or after it
        nested = "[" * depth + "]" * depth
        content = f'{{"files":{{}},"metadata":{{"a":{nested}}},"schema":1,"step":1}}'
        signature = hashlib.sha256(content.encode()).hexdigest()
        with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
            parse((content[:-1] + f',"hash":"{signature}"}}').encode())
