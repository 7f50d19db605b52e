"""The age of this process, against what the operating system says in another way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fundamentallm.training import clock


def test_moves_on_with_the_monotonic_clock():
    before, age = time.monotonic(), clock.seconds_since_start()
    time.sleep(0.02)
    passed = time.monotonic() - before
    assert age >= 0
    assert 0.02 <= clock.seconds_since_start() - age <= passed + 0.02


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_counts_what_came_before_the_import():
    code = (
        "import time; time.sleep(0.6)\n"
        "import importlib.util as u, sys\n"
        f"spec = u.spec_from_file_location('clock', {clock.__file__!r})\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.seconds_since_start())"
    )
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True, timeout=30
    )
    # The kernel counts in ticks of a hundredth of a second.
    assert 0.58 <= float(result.stdout) <= time.monotonic() - began + 0.05


@pytest.mark.parametrize(
    "stat",
    ["", "1 (x) S", "1 (a b) c) S " + "x " * 40, None],
)
def test_begins_at_the_import_where_the_kernel_does_not_tell(monkeypatch, stat):
    def read_text(self: Path) -> str:
        if stat is None:
            raise FileNotFoundError
        return stat if self.name == "stat" else "1000.0 1.0"

    monkeypatch.setattr(clock.Path, "read_text", read_text)
    assert clock._age() == 0.0


def test_reads_the_start_behind_a_command_name_with_spaces_and_parentheses(monkeypatch):
    monkeypatch.setattr(clock.os, "sysconf", lambda name: 100)
    # Fields 3 to 21 stand for themselves; field 22 is the start, in ticks.
    stat = "7 (a) b (c) " + " ".join(map(str, range(3, 22))) + " 90000 1 2\n"
    texts = {"stat": stat, "uptime": "925.5 3.0\n"}
    monkeypatch.setattr(clock.Path, "read_text", lambda self: texts[self.name])
    assert clock._age() == pytest.approx(25.5)
    texts["uptime"] = "900.25 3.0\n"
    assert clock._age() == pytest.approx(0.25)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_an_age_of_its_own():
    """As under a server that imports once, and forks for each run."""
    time.sleep(max(0.0, 0.5 - clock.seconds_since_start()))
    reader, writer = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.write(writer, str(clock.seconds_since_start()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    age = float(os.read(reader, 64))
    os.close(reader)
    os.close(writer)
    assert 0 <= age <= time.monotonic() - began + 0.05
