"""The present code goes on with runs that an older revision saved, and reads them, as it did then.

`tests/data/old_runs/` holds runs that ended at step 150 of 200, made by `python -m
fault_injection.old_runs`; the revision stands in each expected.json, beside what it made of the run
itself. Exact are the order of the data, the exit codes and, with the same torch on x86-64, every
double of the metrics, of `evaluate`, every generated character and every byte of the exported and
the final weights. The last bits of a float32 sum depend on the kernels that a processor gets, so
both sides pin them (`fault_injection.old_runs.PINS`). Another torch or architecture has other
kernels all the same: there the numbers need only agree as far as 50 steps of training let rounding
grow. A run that ends by the clock has other learning rates in each process: of what it trains after
the resume, only the data is compared.
"""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_injection.old_runs import KINDS, SAVED, use
from fault_injection.revisions import ROOT

STORED = Path(__file__).parents[1] / "data" / "old_runs"
ROUNDING = 0.02  # relative, of a loss after 50 steps that were rounded in another way

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Any, Any, bool]:
    """A kind, what the older revision made of its run, what the present code does, exactness."""
    stored = STORED / request.param
    expected = json.loads((stored / "expected.json").read_text(encoding="utf-8"))
    same_torch = torch.__version__.partition("+")[0] == expected["torch"]
    place = shutil.copytree(stored, tmp_path_factory.mktemp("old") / request.param)
    found = use(ROOT, place, KINDS[request.param], inexact=not same_torch)
    # Through JSON like what is stored: its keys are text.
    found = json.loads(json.dumps(found))
    exact = same_torch and platform.machine() == expected["machine"]
    return request.param, expected, found, exact


def by_step(outcome: Any) -> list[tuple[Any, ...]]:
    return [(line["step"], line["tokens"], sorted(line)) for line in outcome["lines"]]


def test_every_command_ends_as_it_did(both: Any) -> None:
    kind, expected, found, _ = both
    assert found["codes"] == expected["codes"]
    stopped = 143 if kind == "max_seconds" else 0
    assert list(found["codes"].values()) == [0, 0, 0, 0, 0, stopped]


def test_the_resumed_run_reads_the_same_data(both: Any) -> None:
    kind, expected, found, _ = both
    steps = range(SAVED + 1, KINDS[kind].last_step + 1)
    assert list(map(int, found["data"])) == list(steps)
    assert len(set(found["data"].values())) == len(steps)
    assert found["data"] == expected["data"]


def test_the_resumed_run_computes_the_same_numbers(both: Any) -> None:
    kind, expected, found, exact = both
    assert by_step(found) == by_step(expected)
    assert found["weights"].keys() == expected["weights"].keys()
    if kind == "max_seconds":
        return
    if exact:
        assert found["lines"] == expected["lines"]
        assert found["weights"] == expected["weights"]
    else:
        for own, theirs in zip(found["lines"], expected["lines"], strict=True):
            for name in own.keys() & {"train/loss", "val/loss"}:
                assert own[name] == pytest.approx(theirs[name], rel=ROUNDING)


def test_it_is_measured_and_continued_as_it_was(both: Any) -> None:
    _, expected, found, exact = both
    if exact:
        assert found["evaluate"] == expected["evaluate"]
        assert found["sampled"] == expected["sampled"]
        assert found["greedy"] == expected["greedy"]
    else:
        assert found["evaluate"] == pytest.approx(expected["evaluate"], rel=1e-5)


def test_its_export_holds_the_same_bytes(both: Any) -> None:
    _, expected, found, _ = both
    assert found["exported"] == expected["exported"]


def test_what_is_compared_is_there() -> None:
    kinds = {path.name for path in STORED.iterdir()}
    assert kinds == set(KINDS)
    for kind in kinds:
        expected = json.loads((STORED / kind / "expected.json").read_text(encoding="utf-8"))
        assert len(expected["lines"]) >= 3
        assert any("val/loss" in line for line in expected["lines"])
        assert len(expected["weights"]) > 10
        assert len(expected["exported"]) > 10
        assert len(expected["greedy"]) > 20
        assert expected["greedy"] != expected["sampled"]
