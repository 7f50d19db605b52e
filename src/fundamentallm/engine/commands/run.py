"""The `run` command."""

from __future__ import annotations

import argparse
from pathlib import Path

from fundamentallm.engine.arguments import (
    RUN_DIR,
    add_config,
    is_run_dir,
    refuse_a_faulty_config,
    refuse_a_missing_run,
    refuse_missing_inputs,
)
from fundamentallm.engine.stopping import loading
from fundamentallm.files.run_layout import RUNS

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
    config = refuse_a_faulty_config(options)
    if options.resume not in ("auto", "never"):
        refuse_a_missing_run(Path(options.resume))
    elif options.resume == "never" or not _directory(options, config.name).exists():
        refuse_missing_inputs(config, options.plugins)  # a finished run needs none
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


def _directory(options: argparse.Namespace, name: str) -> Path:
    """Return the directory that a run of this name uses first."""
    words = [word.removeprefix(RUN_DIR) for word in options.overrides if is_run_dir(word)]
    return Path(words[-1]) if words else options.run_dir or RUNS / name
