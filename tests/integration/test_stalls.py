"""A rank that stands still is named by the others, and all end. The whole table, with restarts:
`python -m fault_injection.stalls`."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_injection.stalls import command, environment, prepare, trial, violations

PATIENCE = 4.0
Start = Callable[[str, int, float], tuple[subprocess.Popen[str], subprocess.Popen[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start two ranks without torchrun, one of which stops in a phase; return it last."""
    processes: list[subprocess.Popen[str]] = []

    def start_both(
        phase: str, rank: int, patience: float
    ) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
        prepare(tmp_path)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for own in ("0", "1"):
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command(patience)],
                    cwd=tmp_path,
                    env={**environment(phase, rank), **group, "RANK": own, "LOCAL_RANK": own},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return processes[1 - rank], processes[rank]

    yield start_both
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_stopped_rank_is_named_by_the_other(start, tmp_path):
    other, _ = start("save", 1, PATIENCE)

    _, error = other.communicate(timeout=150)

    assert other.returncode == 21, error
    assert re.search(
        r"error on rank 0: rank 1 on \S+, in step 4 \(save\) stands still, since", error
    )
    stacks = (tmp_path / "runs/stalled/stacks-rank-0.txt").read_text()
    assert "rank 1 on" in stacks
    assert "checkpointing.py" in stacks  # where the main thread waits for the other
    assert (tmp_path / "runs/stalled/checkpoints/last").read_text() == "step-00000000\n"


@pytest.mark.long  # the default run stops the other rank
def test_a_stopped_first_rank_takes_the_store_with_it(start):
    other, _ = start("step", 0, PATIENCE)

    _, error = other.communicate(timeout=150)

    assert other.returncode == 21, error
    assert re.search(r"error on rank 1: rank 0, which holds the store .* stands still", error)


@pytest.mark.long
def test_a_signal_is_heard_while_another_rank_stands_still(start, tmp_path):
    other, _ = start("step", 1, 1000.0)
    wait_for(tmp_path / "stopped", other)

    other.send_signal(signal.SIGTERM)
    _, error = other.communicate(timeout=60)

    assert other.returncode == 128 + signal.SIGTERM, error
    assert "rank 1 on" in error


# Each takes more than a minute, for torchrun itself waits 30 s for a stopped worker; the command
# has all twelve.
@pytest.mark.long
@pytest.mark.parametrize(("phase", "rank"), [("step", 1), ("evaluation", 0), ("save", 1)])
def test_torchrun_starts_the_run_again(tmp_path, phase, rank):
    assert violations(trial(tmp_path, phase, rank, 10.0), 10.0, slack=3.0) == []
