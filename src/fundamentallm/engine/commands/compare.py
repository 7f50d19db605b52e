"""The `compare` command: runs side by side, and whether chance explains their difference."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fundamentallm.engine.arguments import add_plugins, refuse_a_missing_run, refuse_no_file
from fundamentallm.engine.console import printable, say, tell_runs
from fundamentallm.engine.stopping import ended_by_signals, loading

SUMMARY = "compare runs: settings, losses, speed, and whether chance explains the difference"
PAGE = Path("comparison.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the directory of a run")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--csv", action="store_true", help="print a row of CSV for each group")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"where to write the page with all curves; default {PAGE}, and no page with --json"
        " or --csv",
    )
    add_plugins(parser)


def execute(options: argparse.Namespace) -> int:
    """Print the comparison and write the page."""
    tell_runs(options.runs)
    if options.out is not None:
        refuse_no_file(options.out)
    for path in options.runs:
        refuse_a_missing_run(path)
    with loading():
        from fundamentallm.engine.plugins import load_plugins
        from fundamentallm.files.filesystem import Filesystem, replace_file
        from fundamentallm.reports.comparison import compare
        from fundamentallm.reports.forms import section, text_table, to_csv, to_json
        from fundamentallm.reports.page import page
        from fundamentallm.reports.run_data import read_run

    load_plugins(options.plugins, "--plugins")
    runs = [read_run(path) for path in options.runs]
    comparison = compare(runs)
    is_table = not (options.json or options.csv)
    if options.json:
        say(json.dumps(to_json(comparison)))
    elif options.csv:
        say(printable(to_csv(comparison)), end="")
    else:
        say(printable(text_table(comparison)))
    out = options.out or (PAGE if is_table else None)
    if out is not None:
        content = page(runs, section(comparison))
        with ended_by_signals():
            replace_file(Filesystem(), out, [content])
        if is_table:
            say(printable(f"{out}: all curves; open it in a browser"))
    return 0
