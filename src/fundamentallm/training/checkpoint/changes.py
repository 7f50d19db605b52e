"""The record of the changes with which a run went on.

A checkpoint has the changes that led to it in its manifest, under the key `changes`: for each the
`step` after which it holds and its `differences` (key, old, new). Where the rows of a step changed,
there are `rows` (old, new), and of the state `tokens` and `epochs` (length, cuts). So the record
follows a resume, a rollback and the choice of an older checkpoint as the state does, and is proved
with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fundamentallm.config.yaml.difference import value_in_words
from fundamentallm.training.checkpoint.manifest import Manifest

CHANGES = "changes"  # in the metadata of a checkpoint

Record = dict[str, Any]
"""A change as a checkpoint has it: plain JSON."""


def records_in(manifest: Manifest) -> list[Record]:
    """Return the changes that led to a checkpoint; what is no record is left out."""
    found = manifest.metadata.get(CHANGES, [])
    return [dict(one) for one in found if _is_record(one)] if isinstance(found, list) else []


def in_words(record: Record) -> list[str]:
    """Return each difference of a record as `key: old -> new`."""
    return [
        f"{key}: {value_in_words(was)} -> {value_in_words(now)}"
        for key, was, now in record["differences"]
    ]


def changed_keys(records: Iterable[Record]) -> set[str]:
    """Return the keys that were changed."""
    return {key for record in records for key, _, _ in record["differences"]}


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, Mapping)
        and type(record.get("step")) is int
        and record["step"] >= 0
        and isinstance(record.get("differences"), list)
        and all(
            isinstance(one, list) and len(one) == 3 and isinstance(one[0], str)
            for one in record["differences"]
        )
        and ("rows" not in record or _says_its_rows(record))
    )


def _says_its_rows(record: Mapping[str, Any]) -> bool:
    try:
        rows, tokens, (length, cuts) = record["rows"], record["tokens"], record["epochs"]
        numbers = [*rows, tokens, length, *(number for cut in cuts for number in cut)]
        return (
            all(type(number) is int for number in numbers)
            and len(rows) == 2
            and min(*rows, length) > 0
            and tokens >= 0
            and all(len(cut) in (2, 3) for cut in cuts)
        )
    except (LookupError, TypeError, ValueError):
        return False
