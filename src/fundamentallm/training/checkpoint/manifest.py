"""MANIFEST.json: what a checkpoint directory must contain, to the byte.

It is written last and read first. Its own `hash` covers all its other fields, and its text has one
legal rendering, so no byte of it can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import FileRecord

SCHEMA = 1
OPTIONAL_TEXT = (str, type(None))
OPTIONAL_NUMBER = (int, float, type(None))
METADATA_FORMS: dict[tuple[str, ...], tuple[type, ...]] = {
    ("config",): (dict,),
    ("config", "training"): (dict,),
    ("config_as_written",): (dict,),
    ("config_as_written", "training"): (dict,),
    ("tokenizer",): (dict,),
    ("data",): (dict,),
    ("data", "sha256"): OPTIONAL_TEXT,
    ("data", "response_end"): OPTIONAL_TEXT,
    ("origin",): (dict,),
    ("versions",): (dict,),
    ("circumstances",): (dict,),
    ("val_loss",): OPTIONAL_NUMBER,
    **{
        ("config_as_written", "training", budget): OPTIONAL_NUMBER
        for budget in ("num_epochs", "total_steps", "max_tokens", "max_seconds")
    },
    ("finished",): (str,),
    ("run_id",): OPTIONAL_TEXT,
}
"""What this program reads of a checkpoint's metadata, by the keys that lead there, and the types
that it may have there. All of it may be absent."""
FIELDS = {"schema", "step", "files", "metadata", "hash"}


@dataclass(frozen=True)
class Manifest:
    """What a verified MANIFEST.json says.

    Args:
        name: the name of the checkpoint, as `step-00000200`.
        step: the optimizer step of the state.
        files: the record of every other file in the directory, by name.
        metadata: what the writer added: plain JSON, readable without the tensors.
        hash: SHA-256 over the other fields; names this checkpoint's content.
    """

    name: str
    step: int
    files: Mapping[str, FileRecord]
    metadata: Mapping[str, Any]
    hash: str


def render_manifest(
    step: int, files: Mapping[str, FileRecord], metadata: Mapping[str, Any]
) -> bytes:
    """Return the text of a manifest.

    Raises:
        CheckpointError: metadata that is not strict JSON.
    """
    fields = {
        "schema": SCHEMA,
        "step": step,
        "files": {name: asdict(record) for name, record in files.items()},
        "metadata": dict(metadata),
    }
    try:
        plain = json.loads(json.dumps(fields, allow_nan=False))  # tuples and int keys as JSON has
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "the checkpoint's metadata is not plain JSON",
            got=str(error),
            expected="dict with text keys, list, None, bool, int, finite float, str",
        ) from error
    return _render({**plain, "hash": _content_hash(plain)})


def parse_manifest(data: bytes, name: str, where: str) -> Manifest:
    """Return the manifest whose text is `data`, of the checkpoint `name`.

    Raises:
        CheckpointError: text that `render_manifest` cannot have made, or another schema version.
    """
    fields = parse_json(data, where)
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if type(schema) is not int or not isinstance(fields, dict):
        raise _damaged(where, "it has no schema version")
    if schema > SCHEMA:
        raise CheckpointError(
            "the checkpoint was written by a newer version of this program",
            where=where,
            got=f"schema {schema}",
            expected=f"schema {SCHEMA}",
            fix="update fundamentallm",
        )
    if schema != SCHEMA or set(fields) != FIELDS:
        raise _damaged(where, "fields are missing or unknown")
    if not _is_own_text(fields, data):
        raise _damaged(where, "its contents do not match its own hash")
    if type(fields["step"]) is not int or not isinstance(fields["metadata"], dict):
        raise _damaged(where, "the step or the metadata has the wrong type")
    for path, types in METADATA_FORMS.items():
        _check_form(fields["metadata"], path, types, where)
    return Manifest(
        name, fields["step"], _records(fields["files"], where), fields["metadata"], fields["hash"]
    )


def _check_form(
    metadata: Mapping[str, Any], path: tuple[str, ...], types: tuple[type, ...], where: str
) -> None:
    """Refuse metadata that has something else than one of these types at a path."""
    value: Any = metadata
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return
        value = value[key]
    if type(value) not in types:
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
        raise CheckpointError(
            f"'{'.'.join(path)}' in the checkpoint's metadata is not of the expected type",
            where=where,
            got=repr(value)[:80],
            expected=expected,
            fix="use another checkpoint, or the version of fundamentallm that wrote this one",
        )


def parse_json(data: bytes, where: str) -> Any:
    """Parse strict JSON: UTF-8, no duplicate keys, no NaN or infinity.

    Raises:
        CheckpointError: anything else; `where` names the file.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, **FINITE)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError("this is not strict JSON", where=where, got=str(error)) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # 1e999
        raise ValueError(f"{text[:20]} is beyond a float64")
    return number


FINITE: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite}
"""Arguments of `json.loads` for which NaN and infinity are no numbers, however they are written."""


def _records(files: Any, where: str) -> dict[str, FileRecord]:
    if not isinstance(files, dict):
        raise _damaged(where, "the list of files has the wrong type")
    records = {}
    for name, record in files.items():
        match record:
            case {"size": int(size), "sha256": str(sha256)} if (
                len(record) == 2 and type(size) is int
            ):
                records[name] = FileRecord(size, sha256)
            case _:
                raise _damaged(where, f"the record of {name!r} is malformed")
    return records


def _is_own_text(fields: Mapping[str, Any], data: bytes) -> bool:
    content = {key: value for key, value in fields.items() if key != "hash"}
    try:
        return fields["hash"] == _content_hash(content) and data == _render(fields)
    except RecursionError:  # the encoder needs more stack than the parser did
        return False


def _content_hash(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _render(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, sort_keys=True, indent=2) + "\n").encode()


def _damaged(where: str, got: str) -> CheckpointError:
    return CheckpointError("the manifest is damaged", where=where, got=got)
