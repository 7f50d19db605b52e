"""The `new` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fundamentallm.engine.budget import seconds_of
from fundamentallm.engine.stopping import loading
from fundamentallm.errors import ConfigError

SUMMARY = "write a commented YAML file that is fit for this machine and your text"
DATA, BUDGET = "python-docs", "10m"
_SUFFIXES = (".yaml", ".yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", type=Path, metavar="FILE.yaml", nargs="?", help="the file to write")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="files, folders or a built-in name; asked for on a terminal, else python-docs",
    )
    parser.add_argument(
        "--budget",
        metavar="TIME",
        help="time to train, as 90s, 10m or 2h; asked for on a terminal, else 10m",
    )


def execute(options: argparse.Namespace) -> int:
    """Run the command; return the exit code.

    What can be refused without them is refused before large libraries are imported.

    Raises:
        ConfigError: the name or the budget is not valid, or the file exists.
        DataError: a text is missing or empty.
    """
    path, data = options.path, options.data
    if path is None and data and len(data) > 1 and data[-1].endswith(_SUFFIXES):
        path, data = Path(data[-1]), data[:-1]  # behind --data it was taken for one more text
    if path is None:
        raise ConfigError(
            "FILE.yaml is missing", fix="name the file to write, as in `new mine.yaml`"
        )
    if path.suffix not in _SUFFIXES:
        raise ConfigError(
            "a configuration is a .yaml file", where=str(path), fix=f"write {path.name}.yaml"
        )
    if path.exists():
        raise ConfigError("the file exists already", where=str(path), fix="choose another name")
    data = data or [_ask("Text to train on: a file, a folder, or a built-in name", DATA)]
    seconds = seconds_of(options.budget or _ask("Time to train, as 90s, 10m or 2h", BUDGET))
    from fundamentallm.data.paths import refuse_missing

    refuse_missing(data)
    with loading():
        from fundamentallm.engine.new import new

    return new(path, data, seconds)


def _ask(question: str, default: str) -> str:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return default
    try:
        return input(f"{question} [{default}]: ").strip() or default
    except EOFError:
        return default
