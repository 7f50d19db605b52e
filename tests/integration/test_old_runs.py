"""The present code reads runs that an older revision saved as it did then, and trains none further.

`tests/data/old_runs/` holds runs that ended at step 150 of 200, made by `python -m
fault_injection.old_runs`; the revision stands in each expected.json, beside what it made of the run
itself. They have no number of rules, so going on is refused. Exact are, with the same torch on
x86-64, every double of `evaluate`, every generated character and every byte of the exported
weights. The last bits of a float32 sum depend on the kernels that a processor gets, so both sides
pin them (`fault_injection.old_runs.PINS`).
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


def test_every_command_but_training_ends_as_it_did(both: Any) -> None:
    _, expected, found, _ = both
    codes = dict(found["codes"])
    assert codes.pop("resume") == 4
    assert codes == {name: 0 for name in expected["codes"] if name != "resume"}


def test_going_on_is_refused_as_written(both: Any) -> None:
    """The rules of the data, the split and the limits are others now; none of the old are kept."""
    _, expected, found, _ = both
    assert "began under other rules" in found["said"]
    assert f"go on with revision {expected['revision'][:7]}" in found["said"]
    assert found["data"] == {}
    # The run is left as it was.
    assert {line["step"] for line in found["lines"]} == {SAVED}


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
