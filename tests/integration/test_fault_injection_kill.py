"""Samples of the trials that kill and stop a run, and proof that they can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests import forked

ROOT = Path(__file__).resolve().parents[2]

SAMPLES = """
import json
from fault_injection import kill, signals
from fault_injection.worker import Plan

print(json.dumps({
    "kill": kill.run_trials(8, 1),
    "in place": kill.run_trials(8, 2, Plan(is_staged=False)),
    "signals": signals.run_trials(8, 2),
}))
"""

MUTANTS = """
import json
from fault_injection import kill, signals
from fault_injection.worker import Plan

# A stop where the schedule saves is none that this could show: more, until one is.
for seed in range(20):
    unsaved = signals.run_trials(4, seed, Plan(is_saved_at_stop=False))
    if unsaved["faults"]:
        break
print(json.dumps({
    "random numbers": kill.run_trials(12, 1, Plan(rng_is_saved=False)),
    "position": kill.run_trials(12, 1, Plan(position_is_saved=False)),
    "unsaved": unsaved,
}))
"""

LARGER_SAMPLES = """
import json
from fault_injection import kill, signals

print(json.dumps({"kill": kill.run_trials(30, 2, cold=2), "signals": signals.run_trials(20, 3)}))
"""


def run(code: str) -> Any:
    """Run Python in a process of its own: workers are forked, and a test process has threads."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
        },
    )
    assert result.returncode == 0, result.stderr[-3_000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("samples")
    (place / "samples.py").write_text(SAMPLES)
    result = forked.run([], place, program=str(place / "samples.py"))
    assert result.returncode == 0, result.stderr[-3_000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def mutants() -> Any:
    return run(MUTANTS)


def check_kills(report: dict[str, Any], trials: int) -> None:
    assert report["trials"] == trials
    assert report["inside a save"] >= 0.25 * trials  # 40 % of many, by chance fewer of a few
    assert (report["lost"], report["manual"], report["unequal"]) == (0, 0, 0), report["faults"]


def check_signals(report: dict[str, Any], trials: int) -> None:
    assert report["trials"] >= trials
    assert report["second signals"] > 0
    assert report["faults"] == []


def test_a_run_that_is_killed_again_and_again_loses_nothing(reports: Any) -> None:
    check_kills(reports["kill"], 8)


@pytest.mark.long
@pytest.mark.parametrize("part", ["random numbers", "position"])
def test_a_checkpoint_without_a_part_of_the_state_is_noticed(mutants: Any, part: str) -> None:
    assert mutants[part]["unequal"] > 0


def test_a_store_that_writes_in_place_is_noticed(reports: Any) -> None:
    assert reports["in place"]["lost"] > 0


def test_a_signal_at_any_moment_stops_saves_and_goes_on(reports: Any) -> None:
    check_signals(reports["signals"], 8)
    assert len(reports["signals"]["received"]) >= 4


@pytest.mark.long
def test_a_stop_that_is_not_saved_is_noticed(mutants: Any) -> None:
    assert any("newest checkpoint" in fault for fault in mutants["unsaved"]["faults"])


@pytest.mark.long
def test_the_trials_hold_in_larger_samples() -> None:
    larger = run(LARGER_SAMPLES)
    check_kills(larger["kill"], 30)
    check_signals(larger["signals"], 20)
