"""Built-in sources by name: the registry, and the two that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

from fundamentallm.data.text_file import read_text
from fundamentallm.errors import DataError
from fundamentallm.files.cache_directory import default_cache_dir
from fundamentallm.files.download import download
from fundamentallm.registry import Registry

SOURCES: Registry[str] = Registry("data source", supplied=("cache_dir",))

TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@SOURCES.register("python-docs")
def python_docs() -> str:
    """The language reference inside every CPython, about 465,000 characters of English.

    The text differs a little between releases of Python.

    Raises:
        DataError: this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python lacks its own documentation (pydoc_data)",
            where="python-docs",
            fix="install the standard library's documentation, or set another data.source",
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


@SOURCES.register("tinyshakespeare")
def tinyshakespeare(cache_dir: Path | None = None) -> str:
    """1.1 M characters of Shakespeare's plays, downloaded once and checked by SHA-256.

    The environment variable FUNDAMENTALLM_TINYSHAKESPEARE_URL names a mirror.

    Args:
        cache_dir: where it is kept; `~/.cache/fundamentallm` if None.

    Raises:
        DataError: it cannot be downloaded, or is not what it should be.
    """
    url = os.environ.get("FUNDAMENTALLM_TINYSHAKESPEARE_URL", TINYSHAKESPEARE_URL)
    path = (cache_dir or default_cache_dir()) / "tinyshakespeare.txt"
    return read_text(download(url, TINYSHAKESPEARE_SHA256, path))
