"""Two threads on each rank that notice when a rank stands still, and end the run.

A rank that is stopped or hangs takes all others with it into a collective that never ends, and a
main thread that waits there hears no signal. So one thread tells the others, through the store
where the ranks have met, where its rank is, and reads where they are. Another one judges what was
read, also while the store does not answer: a request to a store that is stopped may never return.
What is read is compared with what was read before: the clocks of two machines are not compared.

    silent      nothing new was read of a rank for `step` seconds: its process is stopped, or its
                machine is gone. That holds in every phase.
    stuck       a rank is heard from, but is where it was: for `step` seconds in a step, `save` in a
                phase that may take long. The rank that has begun the fewest collectives is named;
                the others wait for it.
    store       the store does not answer for `step` seconds.

Then every rank that can says so, writes the stacks of its threads, and exits with the code of
`StalledRankError`, so that torchrun starts all of them from the newest checkpoint. The time-out of
the process group stands behind that, and comes later.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fundamentallm.compute.distributed import Ranks
from fundamentallm.errors import CheckpointError, StalledRankError
from fundamentallm.files.private import open_to_append
from fundamentallm.files.run_layout import stacks_of

START, STEP = "start", "step"
MARGIN = 60.0  # seconds from our own end of a run to that of the process group
SIGNALLED = 5.0  # seconds that a silent rank is waited for after a signal has come
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


@dataclass
class Sighting:
    """What is known of one rank.

    Attributes:
        report: its newest report: `phase`, `step`, `patient`, `entered`, `collectives`, `beat`,
            `host`, `verdict`, `left`.
        heard: when the report was last a new one, on this rank's monotonic clock in seconds.
        moved: when the rank was last at a new place.
    """

    heard: float
    moved: float
    report: Mapping[str, Any] = field(default_factory=dict)

    def see(self, report: Mapping[str, Any], now: float) -> None:
        """Take over a report."""
        if report != self.report:
            self.heard = now
        if _place(report) != _place(self.report):
            self.moved = now
        self.report = report


def _place(report: Mapping[str, Any]) -> tuple[Any, ...]:
    return report.get("entered"), report.get("collectives")


def stalled(
    sightings: Sequence[Sighting], now: float, step: float, save: float
) -> tuple[list[int], float, str]:
    """Return which ranks stand still, since when, and how it shows; no ranks if none does.

    Args:
        sightings: of every rank, in order.
        now: on the clock of the sightings, in seconds.
        step: seconds that a rank may be silent, or be at one place in a step.
        save: seconds that it may be at one place elsewhere.
    """
    present = [rank for rank, seen in enumerate(sightings) if not seen.report.get("left")]
    silent = [rank for rank in present if now - sightings[rank].heard > step]
    if silent:
        return silent, min(sightings[rank].heard for rank in silent), "nothing is heard from it"
    stuck = [
        rank
        for rank in present
        if now - sightings[rank].moved > (save if sightings[rank].report.get("patient") else step)
    ]
    if not stuck:
        return [], now, ""
    begun = [int(sightings[rank].report["collectives"]) for rank in stuck]
    named = [rank for rank, count in zip(stuck, begun, strict=True) if count == min(begun)]
    since = max(sightings[rank].moved for rank in named)
    return named, since, "its process lives, its main thread does not go on"


class Watchdog:
    """Watches the ranks from this one.

    Args:
        ranks: this process among the others.
        store: where the ranks have met; the thread makes a connection of its own.
        step: patience in seconds, as in `stalled`.
        save: as in `stalled`.

    Attributes:
        folder: where stacks are written; None, while it is not known, for the terminal alone.
    """

    def __init__(self, ranks: Ranks, store: Any, step: float, save: float) -> None:
        self.ranks = ranks
        self.step, self.save = step, save
        self.folder: Path | None = None
        # Every rank reads of every rank: a thousand of them do so less often.
        self.interval = min(max(1.0, ranks.world_size / 100), max(0.2, step / 10))
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=max(1.0, self.interval)))
        self._host = socket.gethostname()
        self._at: tuple[str, int, bool, int] = (START, 0, True, 0)
        self._time_out = 0.0
        self._beat = 0
        self._signals: list[int] = []
        self._signalled: int | None = None
        self._ended = threading.Event()
        self._verdict = ""
        self._read: tuple[float, list[dict[str, Any]]] = time.monotonic(), []
        self._threads = [
            threading.Thread(target=work, name=f"watchdog-{work.__name__}", daemon=True)
            for work in (self._exchange, self._watch)
        ]

    def enter(self, phase: str, step: int = 0, patient: bool = True) -> None:
        """Say that this rank begins something; call it in the main thread.

        Args:
            phase: what, in a word or two.
            step: the optimizer step.
            patient: whether it may take `save` seconds, not `step`.
        """
        self._at = phase, step, patient, self._at[3] + 1
        time_out = (self.save if patient else self.step) + MARGIN
        if time_out != self._time_out:
            self._time_out = time_out
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=time_out))
        if patient:  # these are few, and the name of the phase is then right at once
            with suppress(RuntimeError):
                self._tell()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the block."""
        self.enter(START)
        self.ranks.barrier()  # whoever reads finds a report of every rank
        reading, writing = socket.socketpair()
        for end in (reading, writing):
            end.setblocking(False)
        self._wakeup = reading
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False) if in_main else 0
        self._read = time.monotonic(), []
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in self._threads:
                thread.join(2.0)
            if in_main:
                signal.set_wakeup_fd(before)
            reading.close()
            writing.close()

    # ------------------------------------------------------------------ in the threads

    def _exchange(self) -> None:
        """Tell where this rank is and read where the others are, again and again."""
        keys = [_key(rank) for rank in range(self.ranks.world_size)]
        while not self._ended.wait(self.interval):
            with suppress(RuntimeError):  # no answer in time, or nobody there
                self._tell()
                reports = [json.loads(data) for data in self._store.multi_get(keys)]
                self._read = time.monotonic(), reports
        with suppress(RuntimeError):  # the rank that holds the store has left before
            self._tell(left=True)

    def _watch(self) -> None:
        last, (answered, _) = time.monotonic(), self._read
        sightings = [Sighting(last, last) for _ in range(self.ranks.world_size)]
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            if now - last > max(1.0, 3 * self.interval):
                # This process was stopped itself: what it has not seen says nothing.
                answered = now
                sightings = [Sighting(now, now, seen.report) for seen in sightings]
            last = now
            read_at, reports = self._read
            answered = max(answered, read_at)
            for seen, report in zip(sightings, reports, strict=False):
                seen.see(report, now)
            self._hear_signals()
            said = next((report["verdict"] for report in reports if report["verdict"]), "")
            if said:
                self._end(said)
            soon = max(SIGNALLED, 4 * self.interval)
            silence = self.step if self._signalled is None else min(self.step, soon)
            if now - answered > silence:
                self._end(self._store_is_silent(sightings[0], now, answered))
            named, since, how = stalled(sightings, now, silence, self.save)
            # Of a store that is silent itself no rank is to blame.
            if named and now - answered <= 2 * self.interval:
                self._end(self._describe(sightings, named, since, how, now))

    def _tell(self, left: bool = False) -> None:
        self._beat += 1
        phase, step, patient, entered = self._at
        report = {
            "phase": phase,
            "step": step,
            "patient": patient,
            "entered": entered,
            "collectives": 0 if left else _collectives_begun(),
            "beat": self._beat,
            "host": self._host,
            "verdict": self._verdict,
            "left": left,
        }
        self._store.set(_key(self.ranks.rank), json.dumps(report))

    def _hear_signals(self) -> None:
        """End the process at the second signal: the main thread may be unable to hear it."""
        with suppress(OSError):
            numbers = {getattr(signal, name, None) for name in _ENDING}
            self._signals += [number for number in self._wakeup.recv(64) if number in numbers]
        entered = self._at[3]
        if self._signalled not in (None, entered):  # the main thread goes on: it has heard it
            self._signalled, self._signals = None, []
        elif len(self._signals) > 1:
            os._exit(128 + self._signals[-1])
        elif self._signals:
            self._signalled = entered

    def _describe(
        self, sightings: Sequence[Sighting], named: list[int], since: float, how: str, now: float
    ) -> str:
        places = []
        for rank in named:
            at = sightings[rank].report
            where = f" on {at['host']}, in step {at['step']} ({at['phase']})" if at else ""
            places.append(f"rank {rank}{where}")
        return self._message("; ".join(places) + " stands still", since, now, how)

    def _store_is_silent(self, first: Sighting, now: float, since: float) -> str:
        held_by = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "rank 0"
        at = first.report
        last = f"; rank 0 was last in step {at['step']} ({at['phase']})" if at else ""
        address = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
        return self._message(
            f"{held_by}, which holds the store of the ranks at {address}, or its machine stands"
            f" still{last}",
            since,
            now,
            "the store does not answer",
        )

    def _message(self, what: str, since: float, now: float, how: str) -> str:
        began = time.strftime("%H:%M:%S", time.localtime(time.time() - (now - since)))
        error = StalledRankError(
            f"{what}, since {began} ({now - since:.0f} s)",
            got=how,
            fix="see stacks-rank-*.txt in the run directory and what that machine says; start all"
            " ranks again to go on from the newest checkpoint (torchrun --max-restarts does). If it"
            " was only slow, raise parallel.patience",
        )
        return str(error)

    def _end(self, verdict: str) -> None:
        """Say why, let the other ranks know, write the stacks, and end this process."""
        self._verdict = verdict
        text = f"error on rank {self.ranks.rank}: {verdict}\n"
        with suppress(OSError):
            os.write(2, text.encode(errors="replace"))
        self._write_stacks(text)
        time.sleep(2.5 * self.interval)  # or the others see but a broken connection
        os._exit(128 + self._signals[-1] if self._signals else StalledRankError.exit_code)

    def _write_stacks(self, text: str) -> None:
        if self.folder is None or not self.folder.is_dir():
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            return
        with (
            suppress(OSError, CheckpointError),
            open_to_append(self.folder / stacks_of(self.ranks.rank)) as file,
        ):
            file.write(text.encode())
            faulthandler.dump_traceback(file)


def _key(rank: int) -> str:
    return f"fundamentallm/watchdog/{rank}"


def _collectives_begun() -> int:
    group: Any = dist.group.WORLD
    return int(group._get_sequence_number_for_group()) if group is not None else 0


@contextmanager
def watched(ranks: Ranks, step: float, save: float) -> Iterator[Watchdog | None]:
    """Watch the ranks inside the block; one process has nobody to watch, and gets None."""
    if ranks.alone:
        yield None
        return
    watchdog = Watchdog(ranks, dist.distributed_c10d._get_default_store(), step, save)
    with watchdog.watching():
        yield watchdog
