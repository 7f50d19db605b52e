from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fundamentallm.errors import MachineError
from fundamentallm.files.lock import refuse_if_owned, run_lock
from fundamentallm.files.run_layout import LOCK

OWNER = """
import sys, time
from pathlib import Path
from fundamentallm.files.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path: Path):  # type: ignore[no-untyped-def]
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_at_once_with_the_owners_pid_and_host(
    tmp_path: Path,
    owner: subprocess.Popen[str],
) -> None:
    started = time.monotonic()
    for attempt in (lambda: refuse_if_owned(tmp_path), lambda: run_lock(tmp_path).__enter__()):
        with pytest.raises(MachineError) as raised:
            attempt()
        assert f"process {owner.pid} on {socket.gethostname()}" in str(raised.value)
        assert raised.value.exit_code == 5
    assert time.monotonic() - started < 1.0


def test_the_lock_of_a_killed_process_is_taken_over(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    refuse_if_owned(tmp_path)
    with run_lock(tmp_path):
        said = json.loads((tmp_path / LOCK).read_text())
    assert said == {"pid": os.getpid(), "host": socket.gethostname()}


def test_looking_writes_nothing(tmp_path: Path) -> None:
    refuse_if_owned(tmp_path / "nowhere")
    refuse_if_owned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_said_nothing_is_refused_all_the_same(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    (tmp_path / LOCK).write_text("\x1b[31m")
    with pytest.raises(MachineError, match="unknown process"):
        refuse_if_owned(tmp_path)
