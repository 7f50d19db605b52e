"""The `run` command."""

from __future__ import annotations

import argparse
from pathlib import Path

from fundamentallm.engine.arguments import add_config, refuse_a_faulty_config
from fundamentallm.engine.stopping import loading

SUMMARY = "train a model from a YAML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): continue the unfinished run of this config; never: start a new run;"
        " PATH: continue that run or checkpoint",
    )
    parser.add_argument(
        "--change",
        action="store_true",
        help="continue the run although its rate, schedule, handlers, batch or budget changed; each"
        " change is said and recorded",
    )
    parser.add_argument(
        "--allow-inexact",
        action="store_true",
        help="continue although other library versions will change the results",
    )
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="the run's directory; default runs/<name>"
    )


def execute(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    refuse_a_faulty_config(options)
    with loading():
        from fundamentallm.engine.run import run

    return run(
        options.config,
        options.overrides,
        options.resume,
        options.run_dir,
        options.plugins,
        options.allow_inexact,
        options.change,
    )
