"""One run of a sweep in a process of its own: its end, whatever it is, does not end the sweep."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from fundamentallm.engine.tuning.measuring import reason_of_end
from fundamentallm.errors import MachineError
from fundamentallm.files.lock import refuse_if_owned
from fundamentallm.files.private import open_to_read
from fundamentallm.files.run_layout import METRICS
from fundamentallm.files.terminal import room_in

CHILD = "fundamentallm.engine.sweeping.child"
POLL_SECONDS = 0.1
TAIL_BYTES = 1 << 14
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, negative after a signal.
        reason: why, in words; empty after code 0.
    """

    code: int
    reason: str = ""


class Processes:
    """Starts a process for each run, and hands signals on to it.

    Args:
        plugins: as for `run`.
    """

    def __init__(self, plugins: Sequence[str] = ()) -> None:
        self.plugins = list(plugins)
        self.signal = 0
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def signals_handed_on(self) -> Iterator[None]:
        """For a block, let a signal stop the run, with its state saved, instead of this process."""
        before = {}
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, self._hand_on)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.send_signal(number)

    def train(self, config: Path, run: Path, steps: int) -> Ended:
        """Run a configuration in a directory to its end, or until a signal."""
        with tqdm(
            total=steps, unit="step", leave=False, disable=None, ncols=room_in(sys.stderr)
        ) as bar:
            while True:
                _wait_while_owned(run, lambda: self.signal != 0)
                ended = self._once(config, run, bar)
                # A process of a sweep that was killed may have been about to start.
                if ended.code != MachineError.exit_code or not is_owned(run) or self.signal:
                    return ended

    def _once(self, config: Path, run: Path, bar: Any) -> Ended:
        words = [str(config), "--run-dir", str(run)]
        if self.plugins:
            words += ["--plugins", *self.plugins]
        if self.signal:
            return Ended(128 + self.signal, "stopped before it began")
        with tempfile.TemporaryFile() as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, by this interpreter
                [sys.executable, "-m", CHILD, str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C arrives once, from here
            )
            if self.signal:  # it came while the process was started
                self._process.send_signal(self.signal)
            try:
                while (code := self._process.poll()) is None:
                    time.sleep(POLL_SECONDS)
                    _show(bar, run)
            finally:
                self._process = None
            if code == 0:
                return Ended(0)
            output.seek(max(output.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            return Ended(code, _reason(code, output.read().decode("utf-8", "replace")))


def is_owned(run: Path) -> bool:
    """Return whether another process trains in a directory."""
    try:
        refuse_if_owned(run)
    except MachineError:
        return True
    return False


def _wait_while_owned(run: Path, given_up: Callable[[], bool]) -> None:
    """Wait for the process of a sweep that was killed: it saves its state and ends."""
    while is_owned(run) and not given_up():
        time.sleep(POLL_SECONDS)


def _reason(code: int, output: str) -> str:
    """Return why a process ended: its error as one line, without the way to mend it."""
    lines = output.strip().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if code < 0 or not starts:
        return reason_of_end(code, lines[-1] if lines else "")
    words = [lines[starts[-1]].removeprefix("error: ")]
    got = (line.strip() for line in lines[starts[-1] + 1 :])
    words += [line for line in got if line.startswith("got:")]
    return "; ".join(words)[:300]


def _show(bar: Any, run: Path) -> None:
    """Show how far a run is, by the last line of its metrics."""
    if bar.disable:
        return
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        with open_to_read(run / METRICS) as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            last = json.loads(file.readall().splitlines()[-1])
        bar.update(int(last["step"]) - bar.n)
