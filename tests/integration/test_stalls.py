"""A rank that stands still is named by the others, and all end. The whole table, with restarts:
`python -m fault_injection.stalls`."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_injection.stalls import command, environment, prepare, trial, violations
from tests.forked import SECONDS, Forked, rank_environments

PATIENCE = 3.0
Start = Callable[[str, int, float], Forked]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start two ranks without torchrun, one of which stops in a phase; return the other.

    What that one writes is in `error`.
    """
    processes: list[Forked] = []

    def start_both(phase: str, rank: int, patience: float) -> Forked:
        prepare(tmp_path)
        monkeypatch.chdir(tmp_path)
        for own, group in enumerate(rank_environments(2)):
            with Path(os.devnull).open("r+") as nothing, Path(f"error-{own}").open("w") as error:
                streams = [nothing.fileno(), nothing.fileno(), error.fileno()]
                variables = {**environment(phase, rank), **group}
                processes.append(Forked(command(patience)[2:], streams, variables))
        return processes[1 - rank]

    yield start_both
    for process in processes:
        process.kill()
        process.wait()


def wait_for(path: Path, process: Forked) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_stopped_rank_is_named_by_the_other(start, tmp_path):
    other = start("save", 1, PATIENCE)

    code = other.wait()

    error = Path("error-0").read_text()
    assert code == 21, error
    assert re.search(
        r"error on rank 0: rank 1 on \S+, in step 4 \(save\) stands still, since", error
    )
    stacks = (tmp_path / "runs/stalled/stacks-rank-0.txt").read_text()
    assert "rank 1 on" in stacks
    assert "checkpointing.py" in stacks  # where the main thread waits for the other
    assert (tmp_path / "runs/stalled/checkpoints/last").read_text() == "step-00000000\n"


@pytest.mark.long  # the default run stops the other rank
def test_a_stopped_first_rank_takes_the_store_with_it(start):
    other = start("step", 0, PATIENCE)

    code = other.wait()

    error = Path("error-1").read_text()
    assert code == 21, error
    assert re.search(r"error on rank 1: rank 0, which holds the store .* stands still", error)


@pytest.mark.long
def test_a_signal_is_heard_while_another_rank_stands_still(start, tmp_path):
    other = start("step", 1, 1000.0)
    wait_for(tmp_path / "stopped", other)

    other.send_signal(signal.SIGTERM)
    code = other.wait()

    error = Path("error-0").read_text()
    assert code == 128 + signal.SIGTERM, error
    assert "rank 1 on" in error


# Each takes more than a minute, for torchrun itself waits 30 s for a stopped worker; the command
# has all twelve.
@pytest.mark.long
@pytest.mark.parametrize(("phase", "rank"), [("step", 1), ("evaluation", 0)])
def test_torchrun_starts_the_run_again(tmp_path, phase, rank):
    assert violations(trial(tmp_path, phase, rank, 10.0), 10.0, slack=3.0) == []
