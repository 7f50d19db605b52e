"""The `new` command."""

from __future__ import annotations

import argparse
from pathlib import Path

from fundamentallm.engine.stopping import loading

SUMMARY = "write a commented YAML file that is fit for this machine and your text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", type=Path, metavar="FILE.yaml", help="the file to write")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="a file, a folder or a built-in name; asked for on a terminal, else python-docs",
    )
    parser.add_argument(
        "--budget",
        metavar="TIME",
        help="time to train, as 90s, 10m or 2h; asked for on a terminal, else 10m",
    )


def execute(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    with loading():
        from fundamentallm.engine.new import new

    return new(options.path, options.data, options.budget)
