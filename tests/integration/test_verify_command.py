from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.runs import copied, trained

from fundamentallm.compute.plan import Machine
from fundamentallm.engine.cli import main
from fundamentallm.engine.wiring import exactness
from fundamentallm.training.checkpoint.store import CheckpointStore

EXCERPT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = f"""
name: tiny
data: {{source: {EXCERPT}, sequence_length: 16, batch_size: 4}}
model: {{d_model: 16, num_layers: 1, num_heads: 2}}
training: {{total_steps: 6, eval_steps: 2}}
handlers: {{tensorboard: false, samples: false}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("trained"), CONFIG)


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return copied(finished, tmp_path / "copy", monkeypatch)


def test_a_whole_run_is_a_table_and_exit_0(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["verify", str(run)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:]] == [
        "step-00000006",
        "step-00000004",
        "step-00000002",
    ]
    assert all("whole" in row for row in rows[1:])
    assert rows[1].endswith("best, last")


@pytest.mark.parametrize("name", ["step-00000004", "best"])
def test_one_checkpoint_can_be_named(
    run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    capsys.readouterr()
    assert main(["verify", str(run / "checkpoints" / name)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_every_fault_is_named_and_the_exit_code_is_4(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "step-00000006" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (run / "checkpoints" / "step-00000004" / "state.json").unlink()
    capsys.readouterr()
    assert main(["verify", str(run)]) == 4
    out, err = capsys.readouterr()
    assert [row.split()[5] for row in out.splitlines()[1:4]] == ["FAILED", "FAILED", "whole"]
    assert "2 of 3 checkpoints failed" in err
    assert "step-00000006/state.safetensors" in err
    assert "step-00000004/state.json" in err


def rewrite(run: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Save a changed state under the newest step, with hashes that fit it."""
    store = CheckpointStore(run / "checkpoints")
    path = store.directory / "step-00000006"
    state, metadata = store.read(path), dict(store.manifest(path).metadata)
    change(state, metadata)
    store.write("step-00000006", state, metadata, step=6)


def test_numbers_that_are_none_are_found_behind_right_hashes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run, lambda state, _: state["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan))
    assert main(["verify", str(run)]) == 4
    assert "not finite" in capsys.readouterr().err
    # And nothing goes on from it: the one before it is the newest that can.
    assert main(["run", "tiny.yaml"]) == 0
    assert "from step 4" in capsys.readouterr().err


def test_shapes_that_the_configuration_does_not_give_are_found(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def widen(state, metadata) -> None:  # type: ignore[no-untyped-def]
        metadata["config"] = json.loads(json.dumps(metadata["config"]))
        metadata["config"]["model"]["d_model"] = 32

    rewrite(run, widen)
    assert main(["verify", str(run)]) == 4
    assert "another model" in capsys.readouterr().err


def test_nothing_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nowhere")]) == 4
    assert main(["verify", str(tmp_path)]) == 4
    assert "there is no checkpoint here" in capsys.readouterr().err


# ------------------------------------------------------------------ what an exact resume needs


@pytest.fixture
def unfinished(run: Path) -> Path:
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    return run


def test_other_versions_are_refused_with_the_difference(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = exactness.versions()
    monkeypatch.setattr(exactness, "versions", lambda: {**now, "torch": "9.9.9", "numpy": "0"})
    capsys.readouterr()
    assert main(["run", "tiny.yaml"]) == 4
    err = capsys.readouterr().err
    assert f"torch: {now['torch']} then, 9.9.9 now" in err
    assert "numpy" not in err
    assert "--allow-inexact" in err
    assert not (unfinished / "checkpoints" / "step-00000006").exists()
    assert main(["run", "tiny.yaml", "--allow-inexact"]) == 0
    assert "the run is not continued bit for bit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"), [("threads", 77), ("processor", "an older one"), ("instructions", "AVX2")]
)
def test_other_circumstances_are_told(
    unfinished: Path,
    name: str,
    value: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = Machine.circumstances
    was = here(Machine())[name]
    value = "NO AVX" if value == was else value
    monkeypatch.setattr(Machine, "circumstances", lambda self: {**here(self), name: value})
    capsys.readouterr()
    assert main(["run", "tiny.yaml"]) == 0
    said = f"equal up to rounding, not bit for bit: {name} was"
    assert said in capsys.readouterr().err
