"""Samples of the trials that kill and stop a run, and proof that they can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests import forked

HEAD = """
import json
from fault_injection import kill, signals
from fault_injection.worker import Plan

"""

# A stop where the schedule saves is none that this could show: more, until one is.
UNSAVED = """
for seed in range(20):
    report = signals.run_trials(4, seed, Plan(is_saved_at_stop=False))
    if report["faults"]:
        break
"""


def report_of(place: Path, code: str) -> Any:
    """Return the `report` of code in a process of its own: it forks, and a test has threads."""
    program = place / "trials.py"
    program.write_text(f"{HEAD}{code}\nprint(json.dumps(report))\n")
    result = forked.run([], place, program=str(program))
    assert result.returncode == 0, result.stderr[-3_000:]
    return json.loads(result.stdout)


def check_kills(report: dict[str, Any], trials: int) -> None:
    assert report["trials"] == trials
    assert report["inside a save"] >= 0.25 * trials  # 40 % of many, by chance fewer of a few
    assert (report["lost"], report["manual"], report["unequal"]) == (0, 0, 0), report["faults"]


def check_signals(report: dict[str, Any], trials: int) -> None:
    assert report["trials"] >= trials
    assert report["second signals"] > 0
    assert report["faults"] == []


def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path: Path) -> None:
    check_kills(report_of(tmp_path, "report = kill.run_trials(8, 1)"), 8)


@pytest.mark.long
@pytest.mark.parametrize("part", ["rng", "position"])
def test_a_checkpoint_without_a_part_of_the_state_is_noticed(part: str, tmp_path: Path) -> None:
    code = f"report = kill.run_trials(12, 1, Plan({part}_is_saved=False))"
    assert report_of(tmp_path, code)["unequal"] > 0


def test_a_store_that_writes_in_place_is_noticed(tmp_path: Path) -> None:
    code = "report = kill.run_trials(8, 2, Plan(is_staged=False))"
    assert report_of(tmp_path, code)["lost"] > 0


def test_a_signal_at_any_moment_stops_saves_and_goes_on(tmp_path: Path) -> None:
    report = report_of(tmp_path, "report = signals.run_trials(8, 2)")
    check_signals(report, 8)
    assert len(report["received"]) >= 4


@pytest.mark.long
def test_a_stop_that_is_not_saved_is_noticed(tmp_path: Path) -> None:
    report = report_of(tmp_path, UNSAVED)
    assert any("newest checkpoint" in fault for fault in report["faults"])


@pytest.mark.long
def test_the_trials_hold_in_larger_samples(tmp_path: Path) -> None:
    check_kills(report_of(tmp_path, "report = kill.run_trials(30, 2, cold=2)"), 30)
    check_signals(report_of(tmp_path, "report = signals.run_trials(20, 3)"), 20)
