"""The `report` command: one page of what runs did, as a file or served while they train."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from fundamentallm.engine.arguments import add_plugins, refuse_a_missing_run, refuse_no_file
from fundamentallm.engine.console import printable, say, tell_runs
from fundamentallm.engine.stopping import ended_by_signals, loading
from fundamentallm.errors import ConfigError, MachineError
from fundamentallm.files.run_layout import PAGE

SUMMARY = "draw runs as one HTML page: curves, samples, incidents, checkpoints"
REFRESH_SECONDS = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the directory of a run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write the page; default report.html in the run, or in the present directory"
        " for several runs",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="serve the page to this machine and keep it up to date, instead of writing it",
    )
    parser.add_argument("--port", type=int, metavar="N", help="of --watch; default: a free one")
    add_plugins(parser)


def execute(options: argparse.Namespace) -> int:
    """Write the page, or serve it until Ctrl-C."""
    tell_runs(options.runs)
    if options.watch and options.out is not None:
        raise ConfigError(
            "a page that is served is not written",
            where=f"--out {options.out}",
            fix="leave out --out or --watch",
        )
    if options.port is not None and not options.watch:
        raise ConfigError(
            "only a page that is served has a port",
            where=f"--port {options.port}",
            fix="add --watch, or leave out --port",
        )
    if options.out is not None:
        refuse_no_file(options.out)
    for path in options.runs:
        refuse_a_missing_run(path)
    with loading():
        from fundamentallm.engine.plugins import load_plugins
        from fundamentallm.files.filesystem import Filesystem, replace_file
        from fundamentallm.reports.comparison import compare
        from fundamentallm.reports.forms import section
        from fundamentallm.reports.page import page
        from fundamentallm.reports.run_data import RunData, read_run

    def made(runs: list[RunData], refresh: float | None = None) -> bytes:
        return page(runs, section(compare(runs)) if len(runs) > 1 else None, refresh)

    load_plugins(options.plugins, "--plugins")
    runs = [read_run(path) for path in options.runs]
    if options.watch:
        _serve(
            options.runs,
            options.port or 0,
            lambda: made([read_run(path) for path in options.runs], REFRESH_SECONDS),
        )
        return 0
    default = (runs[0].path if len(runs) == 1 else Path()) / PAGE
    out = options.out or default
    content = made(runs)
    with ended_by_signals():
        replace_file(Filesystem(), out, [content])
    for run in runs:
        say(printable(f"{run.name}: {run.state}"))
        for note in run.notes:
            say(printable(f"  {note}"))
    say(printable(f"{out} ({len(content) / 2**20:.1f} MiB): open it in a browser"))
    return 0


def _serve(paths: Sequence[Path], port: int, make: Callable[[], bytes]) -> None:
    from fundamentallm.reports.live import LivePage
    from fundamentallm.reports.run_data import stamp

    try:
        server = LivePage(make, lambda: tuple(stamp(path) for path in paths), port)
    except (OSError, OverflowError) as error:
        raise MachineError(
            "the page cannot be served",
            where=f"port {port}",
            got=str(error),
            fix="choose another --port, or leave it out for a free one",
        ) from error
    with server:
        say(f"{server.address}: open it in a browser; Ctrl-C ends the command")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say()
