"""The path that a name in a configuration means, and what can be said of it without reading."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.data.built_in import SOURCES
from fundamentallm.data.file_kinds import SUFFIXES, kind_of, refuse_other_data
from fundamentallm.data.folder import files_in
from fundamentallm.data.text_file import unreadable
from fundamentallm.errors import DataError, did_you_mean

PREPARED = "prepare.json"
"""The file by which a folder is known as one that `prepare` wrote."""


def refuse_missing(names: Sequence[str]) -> None:
    """Refuse paths where nothing is, empty files of text and empty folders; no file is read.

    Args:
        names: of sources that are joined.

    Raises:
        DataError: as the source that reads them.
    """
    paths = {name: existing(name) for name in names if name not in SOURCES}
    empty = []
    for name, path in paths.items():
        try:
            if path.is_dir() and not any(path.iterdir()):
                text_files(name)
            if kind_of(path) in ("text", "") and path.is_file() and path.stat().st_size == 0:
                empty.append(name)
        except OSError as error:
            raise unreadable(path, error) from error
    if empty and len(empty) == len(names):
        raise no_text(names, "0 characters")


def no_text(names: Sequence[str], got: str) -> DataError:
    """Return the error for sources that hold no text."""
    return DataError(
        "the source holds no text",
        where=", ".join(names),
        got=got,
        fix="name a file or folder with text",
    )


def text_files(name: str) -> list[Path]:
    """Return the files of text that a path means; those of a folder are sorted.

    Raises:
        DataError: nothing is there, the file is of other data, or the folder has no text.
    """
    path = existing(name)
    if not path.is_dir():
        refuse_other_data(path, ("other data", "parquet"))
        return [path]

    found = files_in(path, ("text",))
    if not found.read:
        raise DataError(
            "there is no text in this folder",
            where=name,
            expected="files that end in " + " or ".join(SUFFIXES["text"]),
            fix="name the files themselves in place of the folder",
        )
    found.log(name)
    return found.read


def is_tokens(name: str) -> bool:
    """Return whether a name is a token file or a folder that `prepare` wrote."""
    return kind_of(name) == "tokens" or is_prepared(expanded(name))


def is_prepared(path: Path) -> bool:
    """Tell whether a folder is one that `prepare` wrote."""
    try:
        return (path / PREPARED).is_file()
    except (OSError, ValueError):  # a name that no system takes
        return False


def existing(name: str) -> Path:
    """Return a path that the system knows, `~` expanded.

    Raises:
        DataError: nothing is there, or it cannot be reached.
    """
    path = expanded(name)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise DataError(
            "no such file or folder",
            where=name,
            expected="a path, or one of " + ", ".join(SOURCES.names()),
            fix=did_you_mean(name, SOURCES.names()) or f"the path is relative to {Path.cwd()}",
        ) from None
    except OSError as error:
        raise unreadable(path, error) from error
    return path


def expanded(name: str) -> Path:
    """Return a path, `~` expanded."""
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # "~notes.txt" looks like the home of a user
        path = path.expanduser()
    return path
