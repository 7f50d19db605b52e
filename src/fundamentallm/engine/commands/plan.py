"""The `plan` command."""

from __future__ import annotations

import argparse
from pathlib import Path

from fundamentallm.engine.arguments import add_config, refuse_a_faulty_config, refuse_missing_inputs
from fundamentallm.engine.stopping import loading

SUMMARY = "plan what to train on this machine, with this text, in a given time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config(parser)
    time = parser.add_mutually_exclusive_group(required=True)
    time.add_argument("--hours", type=float, metavar="H", help="the time of the run, in hours")
    time.add_argument("--minutes", type=float, metavar="M", help="the time of the run, in minutes")
    parser.add_argument(
        "--measure",
        type=float,
        metavar="S",
        help="seconds for the small runs that are measured; default: a quarter of the time, two"
        " to five minutes",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the file to write with the planned run; default CONFIG.planned.yaml",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    refuse_missing_inputs(refuse_a_faulty_config(options), options.plugins)
    with loading():
        from fundamentallm.engine.planning.plan import plan

    seconds = 3600 * options.hours if options.hours is not None else 60 * options.minutes
    return plan(
        options.config,
        seconds,
        options.overrides,
        options.plugins,
        options.out,
        options.measure,
        options.json,
    )
