"""The `replay` command."""

from __future__ import annotations

import argparse
from pathlib import Path

from fundamentallm.engine.arguments import add_plugins
from fundamentallm.engine.stopping import loading
from fundamentallm.files.run_layout import REPORT, no_incident

SUMMARY = "reproduce a recorded numerical incident"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "incident", type=Path, metavar="INCIDENT_DIR", help="a folder under incidents/ of a run"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), auto, cuda, cuda:0, mps")
    add_plugins(parser)


def execute(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    report = options.incident / REPORT
    if not report.exists():  # told before large libraries are imported
        raise no_incident(report, "no such file")
    with loading():
        from fundamentallm.engine.replay import replay

    return replay(options)
