"""The `check` command."""

from __future__ import annotations

import argparse

from fundamentallm.engine.arguments import add_config, refuse_a_faulty_config, refuse_missing_inputs
from fundamentallm.engine.stopping import loading

SUMMARY = "validate a YAML file and show what it would train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config(parser)


def execute(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    refuse_missing_inputs(refuse_a_faulty_config(options), options.plugins)
    with loading():
        from fundamentallm.engine.check import check

    return check(options.config, options.overrides, options.plugins)
