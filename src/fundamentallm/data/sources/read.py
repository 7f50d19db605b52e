"""Read the source that a configuration names, of any kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.config.data import SourceConfig
from fundamentallm.data.paths import existing, is_tokens
from fundamentallm.data.sources.base import Source
from fundamentallm.data.sources.examples import ExampleSource, is_examples
from fundamentallm.data.sources.mixture import MixtureSource
from fundamentallm.data.sources.text import TextSource
from fundamentallm.data.sources.tokens import read_token_source
from fundamentallm.data.text_file import check_regular
from fundamentallm.errors import DataError
from fundamentallm.files.cache_directory import default_cache_dir
from fundamentallm.files.download import download, sha256_of
from fundamentallm.redaction import redacted


def read_source(
    source: str | Sequence[str] | Sequence[SourceConfig],
    cache_dir: Path | None = None,
    kept: Path | None = None,
    *,
    response_end: str | None = None,
) -> Source:
    """Read a built-in source, a file, a folder, a token file, a prepared folder, or a list.

    Args:
        source: a name in `SOURCES`, a path, or a list of these: texts, which are joined in that
            order with nothing between them, or files of examples (.jsonl, see
            `fundamentallm.data.examples`). A token file or a prepared folder is the only one.
            Sources with weights are a mixture.
        cache_dir: where downloads are kept; `~/.cache/fundamentallm` if None.
        kept: a run's directory, whose copy of a built-in source is read in its place.
        response_end: as `end` in `read_examples`.

    Raises:
        DataError: the source does not exist, holds no text, or is not UTF-8 text.
    """
    entries: list[str | SourceConfig] = [source] if isinstance(source, str) else [*source]
    weights = [entry.weight for entry in entries if isinstance(entry, SourceConfig)]
    names = [_local(entry, cache_dir) for entry in entries]
    if not any(weight is not None for weight in weights):
        return _read(names, cache_dir, kept, response_end)
    members = [_read([name], cache_dir, kept, response_end) for name in names]
    return MixtureSource.of([float(weight or 0) for weight in weights], members)


def _read(
    names: Sequence[str], cache_dir: Path | None, kept: Path | None, response_end: str | None
) -> Source:
    tokens = [name for name in names if is_tokens(name)]
    if tokens:
        if len(names) > 1:
            raise DataError(
                "token files cannot be joined with other sources",
                where=", ".join(tokens),
                fix="name only one in data.source, or give each entry of data.sources a weight",
            )
        return read_token_source(names[0])
    if any(is_examples(name) for name in names):
        return ExampleSource.read(names, response_end)
    return TextSource.read(names, cache_dir, kept)


def _local(entry: str | SourceConfig, cache_dir: Path | None) -> str:
    """Return the name or path of a source, downloaded and checked against its hash."""
    if isinstance(entry, str):
        return entry
    if entry.url is not None:
        assert entry.sha256 is not None
        address = redacted(entry.url).partition("?")[0]
        basename = address.rstrip("/").rpartition("/")[2] or "download"
        basename = re.sub(r"[^A-Za-z0-9._-]", "_", basename)[-100:]
        path = (cache_dir or default_cache_dir()) / f"{entry.sha256[:16]}-{basename}"
        return str(download(entry.url, entry.sha256, path))
    if entry.path is not None and entry.sha256 is not None:
        path = existing(entry.path)
        check_regular(path)
        found = sha256_of(path)
        if found != entry.sha256:
            raise DataError(
                "the file does not have the SHA-256 in the configuration",
                where=entry.path,
                got=f"SHA-256 {found}",
                expected=f"SHA-256 {entry.sha256}",
                fix="put the right file there, or correct sha256",
            )
    return entry.text
