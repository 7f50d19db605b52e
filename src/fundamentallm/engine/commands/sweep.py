"""The `sweep` command."""

from __future__ import annotations

import argparse
from pathlib import Path

from fundamentallm.engine.arguments import add_plugins, refuse_missing_inputs
from fundamentallm.engine.stopping import loading

SUMMARY = "train one configuration with many settings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", type=Path, metavar="SWEEP.yaml", help="the file of the sweep")
    parser.add_argument(
        "--sweep-dir", type=Path, metavar="DIR", help="the directory; default sweeps/<name>"
    )
    add_plugins(parser)


def execute(options: argparse.Namespace) -> int:
    """Begin the sweep, or go on with it; return the exit code."""
    from fundamentallm.config.sweep import load_sweep

    # What can be refused without them is refused before large libraries are imported.
    sweep = load_sweep(options.config)
    config = sweep.run_config(sweep.base(), {})
    if not any(key.startswith("data") for key in sweep.keys):
        refuse_missing_inputs(config, options.plugins)
    with loading():
        from fundamentallm.engine.sweeping.sweep import run_sweep

    return run_sweep(sweep, options.config, options.sweep_dir, options.plugins)
