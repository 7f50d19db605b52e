"""A sample of the fuzzing, and each of its guards seen to notice what it is there for."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_injection import fuzz as fuzzing
from fault_injection.fuzz import KINDS, Kind, forked, fuzz, trial_directory

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="forks, and reads /proc"
)


@pytest.mark.parametrize("count", [4, pytest.param(8, marks=pytest.mark.long)])
def test_a_sample_of_every_kind_holds(count):
    counts = dict.fromkeys(KINDS, count)
    result = fuzz(counts, seed=2)
    assert result.failures == []
    assert result.trials == counts


@pytest.mark.long  # a start of Python
def test_a_trial_in_a_process_of_its_own_holds():
    result = fuzz({"yaml": 0}, seed=3, num_cold=1)
    assert result.failures == []
    assert result.trials == {"yaml": 1}


def raises(rng: random.Random) -> int:
    raise ValueError("not a typed error")


def leaves(rng: random.Random) -> int:
    sys.exit(0)


def writes_outside(rng: random.Random) -> int:
    Path("../evil").write_text("x")
    return 0


def removes_outside(rng: random.Random) -> int:
    Path("../../report").unlink()
    return 0


def starts_a_process(rng: random.Random) -> int:
    subprocess.run(["true"], check=True)
    return 0


def imports_what_lies_there(rng: random.Random) -> int:
    sys.path.insert(0, str(Path.cwd()))
    __import__("evil")
    return 0


def takes_memory(rng: random.Random) -> int:
    return len(b"x" * (3 << 29)) * 0


def takes_time(rng: random.Random) -> int:
    while True:
        pass


def ends_by_code_one(rng: random.Random) -> int:
    return 1


FAULTS: dict[Callable[[random.Random], int], str] = {
    raises: "ValueError: not a typed error",
    leaves: "SystemExit",
    writes_outside: "was opened for writing",
    removes_outside: "os.remove",
    starts_a_process: "subprocess.Popen",
    imports_what_lies_there: "import",
    takes_memory: "MiB more than the parent",
    takes_time: "-24",
    ends_by_code_one: "exit code 1",
}


@pytest.mark.parametrize("use", FAULTS, ids=lambda use: use.__name__)
def test_what_must_not_happen_is_noticed(tmp_path, monkeypatch, use):
    monkeypatch.setattr(fuzzing, "CPU_SECONDS", 1 if use is takes_time else 20)
    monkeypatch.setitem(KINDS, "examples", Kind(lambda material, rng: None, use))
    with trial_directory(tmp_path) as place:
        assert FAULTS[use] in forked("examples", 0, 0, tmp_path, place)


def test_the_same_number_makes_the_same_file(tmp_path, monkeypatch):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        KINDS["yaml"].prepare(tmp_path, random.Random("0 yaml 5"))
        made.append(Path("run.yaml").read_bytes())
    assert made[0] == made[1]
