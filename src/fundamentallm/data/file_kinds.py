"""What a file holds, by the end of its name, in capitals or not."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from fundamentallm.errors import DataError

Kind = Literal["text", "lines", "json", "parquet", "tokens", "other data", ""]

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "text": (".txt", ".md"),
    "lines": (".jsonl", ".ndjson"),
    "json": (".json",),
    "parquet": (".parquet",),
    "tokens": (".tokens", ".npy"),
    # Known not to be text, and not read here.
    "other data": (
        *(".csv", ".tsv", ".psv", ".xls", ".xlsx", ".ods", ".db", ".sqlite", ".sqlite3"),
        *(".npz", ".bin", ".idx", ".pt", ".pth", ".pkl", ".pickle", ".safetensors", ".gguf"),
        *(".arrow", ".feather", ".orc", ".avro", ".h5", ".hdf5", ".tfrecord", ".zip", ".tar"),
    ),
}
COMPRESSED = (".gz", ".zst")


def kind_of(name: str | PurePath) -> Kind:
    """Return what a file holds by its name; "" for a name that says nothing."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else "."
    return next((kind for kind, known in SUFFIXES.items() if last in known), "")


def refuse_other_data(name: str | PurePath, kinds: tuple[Kind, ...] = ("other data",)) -> None:
    """Refuse a file whose name says that it holds data which would be read as if it were text.

    Args:
        name: of the file.
        kinds: what is refused.

    Raises:
        DataError: it is of one of these kinds.
    """
    if kind_of(name) in kinds:
        suffix = PurePath(name).suffix
        raise DataError(
            f"a {suffix} file is data, not text to learn",
            where=str(name),
            expected="text, JSON lines, Parquet for `prepare`, or what `prepare` wrote",
            fix=f"convert it to JSON lines; if the characters of the {suffix} file are the text,"
            " give it a name that ends in .txt",
        )
