"""`fault_injection.revisions` sees any difference between two runs, and only differences."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_injection.revisions import ROOT, Case, Side, compare, main, read_outcome, write_texts
from safetensors.torch import save_file

LINES: list[dict[str, Any]] = [
    {
        "step": step,
        "elapsed_seconds": step * 0.1,
        "train/loss": 1 / step,
        "train/mfu": 0.1,
        "train/tokens_per_second": 99.5,
    }
    for step in (1, 2, 3)
]
INCIDENT = {"step": 2, "verdict": "data", "ledger": {"skipped": [2]}, "environment": {"pid": 1}}
WEIGHTS = {"bias": torch.zeros(3), "weight": torch.ones(2, 3)}


def write_run(
    run: Path,
    lines: list[dict[str, Any]] = LINES,
    weights: dict[str, torch.Tensor] = WEIGHTS,
    incident: dict[str, Any] | None = INCIDENT,
) -> Path:
    """Write the files of a run that are compared."""
    checkpoint = run / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (run / "checkpoints" / "last").write_text("step-00000003\n")
    save_file(weights, checkpoint / "model.safetensors")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if incident is not None:
        (run / "incidents" / "00000002-data").mkdir(parents=True)
        (run / "incidents" / "00000002-data" / "report.json").write_text(json.dumps(incident))
    return run


def changed(step: int, **fields: Any) -> list[dict[str, Any]]:
    return [{**line, **fields} if line["step"] == step else line for line in LINES]


def found(tmp_path: Path, **planted: Any) -> list[str]:
    base = read_outcome(write_run(tmp_path / "base"))
    assert len(base.lines) == 5  # three of metrics, an incident, the checkpoint's name
    assert len(base.tensors) == 2
    return base.differences(read_outcome(write_run(tmp_path / "head", **planted)))


def test_time_speed_and_the_machine_are_not_compared(tmp_path: Path) -> None:
    faster = {"elapsed_seconds": 7.0, "train/mfu": 0.7, "train/tokens_per_second": 1.0}
    elsewhere = {**INCIDENT, "environment": {"pid": 2}}
    assert found(tmp_path, lines=changed(2, **faster), incident=elsewhere) == []


@pytest.mark.parametrize(
    ("planted", "where"),
    [
        ({"lines": changed(2, **{"train/loss": 0.5 + 2**-53})}, "metrics.jsonl:2: "),
        ({"lines": changed(2, **{"val/loss": 1.0})}, "metrics.jsonl:2: "),
        ({"lines": LINES[:2]}, "metrics.jsonl:3: "),
        ({"lines": [*LINES, {"step": 4}]}, "metrics.jsonl:4: nothing against "),
        ({"incident": None}, "00000002-data: "),
        ({"incident": {**INCIDENT, "verdict": "transient"}}, "00000002-data: "),
        ({"incident": {**INCIDENT, "ledger": {"skipped": []}}}, "00000002-data: "),
        ({"weights": {**WEIGHTS, "bias": -torch.zeros(3)}}, "model.safetensors bias: other bytes"),
        (
            {"weights": {**WEIGHTS, "bias": torch.zeros(3).int()}},
            "model.safetensors bias: F32 (3,) against I32",
        ),
        ({"weights": {**WEIGHTS, "weight": torch.ones(3, 2)}}, "model.safetensors weight: "),
        ({"weights": {"bias": WEIGHTS["bias"]}}, "model.safetensors weight: only in the base"),
        ({"weights": {**WEIGHTS, "x": torch.ones(1)}}, "model.safetensors x: only in the head"),
    ],
)
def test_a_planted_difference_is_found_and_located(
    planted: dict[str, Any], where: str, tmp_path: Path
) -> None:
    (difference,) = found(tmp_path, **planted)
    assert difference.startswith(where)


def test_the_text_follows_from_the_seed(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        write_texts(tmp_path / name, seed)
        texts.append([file.read_bytes() for file in sorted((tmp_path / name).glob("*.[jt]*"))])
    assert len(texts[0]) == 3
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.long
def test_the_present_code_equals_itself_and_not_a_changed_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    working = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(working, check=True, capture_output=True, text=True).stdout.strip()
    assert main(["--base", head, "--head", head, "--case", "finetuning", "--quick"]) == 0
    assert "finetuning: 39 lines, " in capsys.readouterr().out

    shutil.copytree(ROOT / "src", tmp_path / "changed" / "src")
    with (tmp_path / "changed" / "src" / "fundamentallm" / "__init__.py").open("a") as package:
        package.write("import math\n_cos = math.cos\nmath.cos = lambda x: _cos(x) * (1 - 1e-9)\n")
    sides = [Side(ROOT, tmp_path / "1"), Side(tmp_path / "changed", tmp_path / "2")]
    case = Case(6, 6, ("case.yaml", "data.source=text.txt", "data.sequence_length=8"))
    outcome, differences = compare(case, "case", sides, quick=True)
    assert len(outcome.lines) > 6
    assert any(line.startswith("metrics.jsonl:") for line in differences)
    assert any(line.startswith("model.safetensors ") for line in differences)

    failing = Case(6, 6, ("case.yaml", "data.source=missing.txt"))
    _, (ended, *said) = compare(failing, "failing", sides, quick=True)
    assert ended.startswith("exit codes [3, 3]")
    assert len(said) == 2
    assert all("missing.txt" in text for text in said)
