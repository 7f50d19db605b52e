"""Samples of the campaigns that kill and stop a run, and proof that they can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> Any:
    """Run Python in a process of its own: victims are forked, and a test process has threads."""
    result = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-3_000:]
    return json.loads(result.stdout)


def kills(trials: int, plan: str = "", seed: int = 1) -> Any:
    return run(
        "from campaigns.kill import campaign; from campaigns.victim import Plan;"
        f"print(json.dumps(campaign({trials}, {seed}, Plan({plan}))))"
    )


def test_a_run_that_is_killed_again_and_again_loses_nothing() -> None:
    report = kills(6)
    assert report["trials"] >= 6
    assert report["inside a save"] >= 2
    assert (report["lost"], report["stuck"], report["unequal"]) == (0, 0, 0)


def test_a_run_that_forgets_its_random_numbers_is_noticed() -> None:
    assert kills(2, "rng_is_saved=False")["unequal"] > 0


@pytest.mark.long
def test_a_store_that_writes_in_place_is_noticed() -> None:
    report = kills(30, "in_place=True")
    assert report["lost"] + report["stuck"] + report["unequal"] > 0


def test_a_signal_at_any_moment_stops_saves_and_goes_on() -> None:
    report = run("from campaigns.signals import campaign; print(json.dumps(campaign(5, 3)))")
    assert report["trials"] >= 5
    assert set(report["moments"]) == {"step", "evaluating", "sampling", "saving", "ready"}
    assert report["faults"] == []


@pytest.mark.long
def test_the_campaigns_hold_in_larger_samples() -> None:
    report = kills(60, seed=2)
    assert (report["lost"], report["stuck"], report["unequal"]) == (0, 0, 0)
    assert (
        run("from campaigns.signals import campaign; print(json.dumps(campaign(40)))")["faults"]
        == []
    )
