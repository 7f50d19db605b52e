"""The `tune` command."""

from __future__ import annotations

import argparse
from pathlib import Path

from fundamentallm.engine.arguments import add_config, refuse_a_faulty_config, refuse_missing_inputs
from fundamentallm.engine.stopping import loading
from fundamentallm.errors import ConfigError

SUMMARY = "measure which settings this machine runs fastest, or which learning rate to take"


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
    parser.add_argument(
        "--learning-rate",
        action="store_true",
        help="test learning rates instead: a few of the run's steps, with a rate that rises",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps of --learning-rate; default 200",
    )


def execute(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    if options.learning_rate:
        return _learning_rate(options)
    if options.steps is not None:
        raise ConfigError("--steps belongs to --learning-rate", where=f"--steps {options.steps}")
    refuse_missing_inputs(refuse_a_faulty_config(options), options.plugins)
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


def _learning_rate(options: argparse.Namespace) -> int:
    if options.keep:
        raise ConfigError(
            "--keep has no effect beside --learning-rate", where=f"--keep {' '.join(options.keep)}"
        )
    refuse_missing_inputs(refuse_a_faulty_config(options), options.plugins)
    with loading():
        from fundamentallm.engine.tuning.range_test import STEPS, tune_learning_rate

    return tune_learning_rate(
        options.config,
        options.overrides,
        options.plugins,
        options.out,
        options.seconds,
        STEPS if options.steps is None else options.steps,
    )
