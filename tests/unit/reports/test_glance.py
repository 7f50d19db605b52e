"""How far a run is stands on the terminal before a large library is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fundamentallm.reports.glance import TAIL, glance


def lines(first: int, last: int, **metrics: float) -> str:
    records = ({"step": i, "elapsed_seconds": i / 2, **metrics} for i in range(first, last + 1))
    return "".join(json.dumps(record) + "\n" for record in records)


def test_the_last_step_and_the_last_validation_loss(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    assert glance(run) == ""
    metrics = run / "metrics.jsonl"
    metrics.write_text(lines(1, 4))
    assert glance(run) == "mine: step 4 after 2 s"
    metrics.write_text(lines(1, 4, **{"val/loss": 2.25}) + lines(5, 40) + '{"step": 41, "ela')
    assert glance(run) == "mine: step 40 after 20 s, validation loss 2.2500 at step 4"
    metrics.write_text("x" * TAIL + lines(1, 3) + "[]\nnonsense\n")
    assert glance(run) == "mine: step 3 after 2 s"


@pytest.mark.parametrize("command", ["report", "compare"])
def test_it_is_told_without_torch_or_numpy(tmp_path: Path, command: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text(lines(1, 4))
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "fundamentallm", command, "mine", "--debug"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    told, _, rest = result.stderr.partition("Traceback")
    assert told.splitlines() == ["reading mine", "mine: step 4 after 2 s"]
    assert "RuntimeError: imported" in rest
