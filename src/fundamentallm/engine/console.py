"""The output of a run: on the terminal beside a progress bar, and in log.txt."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from io import BufferedWriter, TextIOWrapper
from pathlib import Path
from typing import TextIO

from fundamentallm.files.private import open_to_append

ROOT = "fundamentallm"
_GONE = (errno.EIO, errno.EBADF)  # a terminal that is closed


def program() -> str:
    """Return how this program is called, for the commands that messages name."""
    installed = Path(sys.argv[0]).stem == ROOT
    return ROOT if installed else f"python -m {ROOT}"


def command(name: str, *words: Path | str) -> str:
    """Return a command line of this program, as a user can type it into a shell."""
    return f"{program()} {shlex.join([name, *map(str, words)])}"


class TerminalHandler(logging.Handler):
    """Log lines on standard error, above a progress bar if one is up."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; a closed terminal does not end a run."""
        from tqdm import tqdm

        with contextlib.suppress(OSError, ValueError):
            tqdm.write(printable(self.format(record)), file=sys.stderr)


class LevelPrefix(logging.Formatter):
    """Only the message, with the level before it from WARNING on."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


@contextlib.contextmanager
def console_output(quiet: bool = False) -> Iterator[None]:
    """Send the package's log lines to the terminal.

    Args:
        quiet: only warnings and errors (ranks other than the first).
    """
    handler = TerminalHandler(logging.WARNING if quiet else logging.INFO)
    handler.setFormatter(LevelPrefix())
    root = logging.getLogger(ROOT)
    level, propagate = root.level, root.propagate
    root.setLevel(logging.DEBUG)
    root.propagate = False
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        root.propagate = propagate


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send the package's log lines to a file as well, with their times."""
    try:
        file = TextIOWrapper(BufferedWriter(open_to_append(path)), "utf-8")
    except OSError as error:
        logging.getLogger(ROOT).warning("log.txt cannot be written, training continues: %s", error)
        yield
        return
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # A full disk must not end the run through its log.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    root = logging.getLogger(ROOT)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        with contextlib.suppress(OSError):
            file.close()


def printable(text: str) -> str:
    """Escape control characters except newline and tab: text must not control a terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1]
        for character in text
    )


def say(text: str = "", end: str = "\n") -> None:
    """Print results to standard output; characters that its encoding lacks are escaped.

    After the terminal is closed, further output is dropped without an error.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        discard(sys.stdout)


def tell(line: str) -> None:
    """Print a line to standard error, if the terminal is not closed."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(line), file=sys.stderr, flush=True)


def tell_runs(runs: Sequence[Path]) -> None:
    """Tell how far runs are, at once: it imports no large library."""
    from fundamentallm.reports.glance import glance

    for line in filter(None, map(glance, runs)):
        tell(line)


def discard(stream: TextIO) -> None:
    """Redirect a stream without a reader to the null device, so that its flush does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def settle_streams() -> None:
    """Flush the standard streams; drop what nobody reads any more.

    A line whose write failed stays in its buffer, and Python, which flushes once more when it
    ends, would make the exit code 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno in (*_GONE, errno.EPIPE):
                discard(stream)
        except ValueError:  # a plugin has closed it
            pass


def open_closed_streams() -> None:
    """Open the null device for each standard stream that the parent process had closed.

    Python has None for such a stream, and its file descriptor would go to the next opened file:
    anything that a library then writes to descriptor 2 would end up in a checkpoint.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 (stays)
            setattr(sys, name, stream)
