"""Signals that end a command: SIGTERM as Ctrl-C does, and Ctrl-C while libraries are loaded."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from fundamentallm.errors import InterruptedRunError


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a block as Ctrl-C does, so that it cleans up."""
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise InterruptedRunError(
            f"stopped by {signal_in_words(number)}, nothing is written",
            signal_number=number,
            fix="the same command begins again",
        )

    before = {number: signal.getsignal(number) for number in wanted}
    for number in wanted:
        if before[number] is signal.SIG_DFL:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signal_in_words(number: int) -> str:
    """Return `Ctrl-C`, or the number of another signal, for "stopped by ..."."""
    return "Ctrl-C" if number == signal.SIGINT else f"signal {number}"


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """While large libraries are imported, let Ctrl-C end the process with its line and exit code.

    A KeyboardInterrupt inside the import of an extension module becomes an ImportError, or
    ends in an abort.
    """
    is_main = threading.current_thread() is threading.main_thread()
    ours = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"stopped by {signal_in_words(number)}\n".encode())
    os._exit(128 + number)
