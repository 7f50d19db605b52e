"""A configuration file's bytes -> text, and the schema that its first line names."""

from __future__ import annotations

import contextlib
import json
import stat
from pathlib import Path

from fundamentallm.config.yaml.key_path import excerpt
from fundamentallm.errors import ConfigError, nearest
from fundamentallm.files.private import narrow
from fundamentallm.files.run_layout import CONFIG

PACKAGED = Path(__file__).parents[2] / "configs"
"""The configurations that come with the package; `configs/` in the repository is a link to it."""

SCHEMA = PACKAGED / "schema.json"
"""The JSON schema of a configuration without plugins."""

TITLE = "FundamentaLLM run"
"""The title of that schema, with plugins too."""

MODELINE = "# yaml-language-server: $schema="
"""The comment in which editors look for the path of a file's schema."""

LARGEST_FILE = 1_000_000  # bytes
_SUFFIXES = (".yaml", ".yml")


def read_yaml_text(path: Path) -> str:
    """Read a regular UTF-8 file of at most `LARGEST_FILE` bytes.

    A name such as `quickstart`, of which there is no file, is a packaged configuration.

    Raises:
        ConfigError: the file does not exist, or it is not a regular UTF-8 file.
    """
    return _decoded(_read_bytes(packaged(path) or path), str(path))


def packaged(path: Path) -> Path | None:
    """Return the packaged configuration that a name without a suffix stands for, if there is one.

    A file or folder of that name comes first.
    """
    file = PACKAGED / f"{path.name}.yaml"
    return file if path.parent == Path() and file.is_file() and not path.exists() else None


def _read_bytes(path: Path) -> bytes:
    where = str(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError(
                "this path is a directory",
                where=where,
                expected="a YAML file",
                fix=f"name the file in it, for example {path / CONFIG}",
            )
        if not stat.S_ISREG(mode):  # reading a pipe or a device may never end
            raise ConfigError(
                "this path is not a regular file", where=where, expected="a YAML file"
            )
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(
            "the configuration file does not exist",
            where=where,
            fix=_nearby(path) or f"check the path, or choose one of {', '.join(packaged_names())}",
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"the configuration file cannot be read: {reason}", where=excerpt(where, 300)
        ) from None
    return content


def packaged_names() -> list[str]:
    """Return the names of the packaged configurations, sorted."""
    return sorted(file.stem for file in PACKAGED.glob("*.yaml"))


def _nearby(path: Path) -> str:
    try:
        items = sorted(path.parent.iterdir())
    except OSError:
        return ""
    # The suffix, which all of them have, makes no name like another.
    names = {item.stem: item.name for item in items if item.suffix in _SUFFIXES}
    if not path.suffix:
        names |= {name: name for name in packaged_names()}
    near = nearest(path.stem, names)
    return f"did you mean '{names[near]}'?" if near else ""


def _decoded(content: bytes, name: str) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ConfigError(
            "the file is UTF-16", where=name, expected="UTF-8", fix="save the file as UTF-8"
        )
    if len(content) > LARGEST_FILE:
        raise too_large(name)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"the file is not UTF-8: byte offset {error.start}",
            where=f"{name}:{line}",
            got=f"byte 0x{content[error.start]:02x}",
            expected="UTF-8",
            fix="save the file as UTF-8",
        ) from None


def too_large(name: str) -> ConfigError:
    """Return the error for text of more than `LARGEST_FILE` bytes."""
    return ConfigError(
        "the configuration is too large",
        where=name,
        expected=f"at most {LARGEST_FILE:,} bytes",
        fix="check that this is a configuration and not data",
    )


def with_schema(text: str, path: Path) -> str:
    """Return a new configuration whose first line names a schema that is there.

    Where it names none, the schema is written beside the file: a path relative to the file stays
    right when both are moved, and tells nobody where this machine has its packages. A file of that
    name that is no schema of a run is kept, and the schema in the package is named.

    Args:
        text: of the configuration; without a line for a schema it stays as it is.
        path: where the text will be written.
    """
    first, _, rest = text.partition("\n")
    named = first.removeprefix(MODELINE).strip()
    if named == first.strip() or "://" in named or _is_schema(path.parent / named):
        return text
    beside = path.parent / SCHEMA.name
    with contextlib.suppress(OSError), open(beside, "x", encoding="utf-8", opener=narrow) as file:
        file.write(SCHEMA.read_text(encoding="utf-8"))
    return f"{MODELINE}{SCHEMA.name if _is_schema(beside) else SCHEMA}\n{rest}"


def _is_schema(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        return bool(json.loads(path.read_text(encoding="utf-8"))["title"] == TITLE)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
