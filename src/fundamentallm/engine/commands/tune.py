"""The `tune` command."""

from __future__ import annotations

import argparse
from pathlib import Path

from fundamentallm.engine.arguments import add_config
from fundamentallm.engine.stopping import loading

SUMMARY = "measure which settings this machine runs fastest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the file to write with the fastest settings; default CONFIG.tuned.yaml",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="start no measurement after S seconds; default 600",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        default=[],
        choices=("precision", "compile", "attention", "micro-batch", "threads"),
        help="keep these settings as they are in the file",
    )


def execute(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    with loading():
        from fundamentallm.engine.tuning.tune import tune

    return tune(
        options.config,
        options.overrides,
        options.plugins,
        options.out,
        options.seconds,
        options.keep,
    )
