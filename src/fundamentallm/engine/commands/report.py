"""The `report` command: one page of what runs did."""

from __future__ import annotations

import argparse
from pathlib import Path

from fundamentallm.engine.arguments import add_plugins
from fundamentallm.engine.console import printable, say
from fundamentallm.engine.stopping import loading
from fundamentallm.files.run_layout import PAGE

SUMMARY = "draw runs as one HTML page: curves, samples, incidents, checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write the page; default report.html in the run, or in the present directory"
        " for several runs",
    )
    add_plugins(parser)


def execute(options: argparse.Namespace) -> int:
    """Write the page."""
    with loading():
        from fundamentallm.engine.plugins import load_plugins
        from fundamentallm.files.filesystem import Filesystem, replace_file
        from fundamentallm.reports.comparison import compare
        from fundamentallm.reports.forms import section
        from fundamentallm.reports.page import page
        from fundamentallm.reports.run_data import read_run

    load_plugins(options.plugins, "--plugins")
    runs = [read_run(path) for path in options.runs]
    default = (runs[0].path if len(runs) == 1 else Path()) / PAGE
    out = options.out or default
    content = page(runs, section(compare(runs)) if len(runs) > 1 else None)
    replace_file(Filesystem(), out, [content])
    for run in runs:
        say(printable(f"{run.name}: {run.state}"))
        for note in run.notes:
            say(printable(f"  {note}"))
    say(printable(f"{out} ({len(content) / 2**20:.1f} MiB): open it in a browser"))
    return 0
