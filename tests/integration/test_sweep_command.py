"""The `sweep` command: runs in this process, but for one that is killed with its sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fault_injection.sweeps import campaign

from fundamentallm.engine.cli import main
from fundamentallm.engine.sweeping import processes
from fundamentallm.engine.sweeping.processes import Ended, Processes

EXCERPT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
BASE = f"""
data: {{source: {EXCERPT}, sequence_length: 16, batch_size: 4}}
model: {{d_model: 16, num_layers: 1, num_heads: 2}}
training: {{eval_steps: 2, precision: fp32}}
handlers: {{tensorboard: false, samples: false, progress: false}}
"""
SWEEP = """
name: rates
config: base.yaml
steps: 4
seeds: 2
keys: {training.learning_rate: [1e-2, 1e-3, 3e-2]}
"""


class Killed(BaseException):
    """The sweep's process was killed."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("sweep.yaml").write_text(SWEEP)

    def train(self: Processes, config: Path, run: Path, steps: int) -> Ended:
        code = main(["run", str(config), "--run-dir", str(run)])
        return Ended(code, f"code {code}" if code else "")

    monkeypatch.setattr(Processes, "train", train)
    return tmp_path


def outcome(directory: Path) -> dict[str, object]:
    """Return all trials with their results to the last bit, and the weights at the end."""
    trials = json.loads((directory / "sweep.json").read_text())["trials"]
    models = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.glob("*/checkpoints/step-*/model.safetensors"))
    }
    return {"trials": trials, "models": models}


def test_a_sweep_trains_all_and_compares(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "sweep.yaml"]) == 0
    said = capsys.readouterr().out
    record = json.loads(Path("sweeps/rates/sweep.json").read_text())
    best = {
        trial["settings"]["training.learning_rate"]: [
            min(loss for _, loss in run["evaluations"]) for run in trial["runs"]
        ]
        for trial in record["trials"]
    }
    assert list(best) == [1e-2, 1e-3, 3e-2]
    assert all(len(losses) == 2 for losses in best.values())
    for losses in best.values():
        assert f"{sum(losses) / 2:.4f} \u00b1 " in said
    rate = min(best, key=lambda one: sum(best[one]))
    assert f"training.learning_rate={rate}" in said.partition("Best: ")[2].splitlines()[0]
    assert Path("sweeps/rates/comparison.html").exists()

    before = outcome(Path("sweeps/rates"))
    assert main(["sweep", "sweep.yaml"]) == 0  # nothing is left to train
    assert outcome(Path("sweeps/rates")) == before
    Path("sweep.yaml").write_text(SWEEP.replace("steps: 4", "steps: 2").replace(", 1e-3", ""))
    assert main(["sweep", "sweep.yaml"]) == 0
    assert Path("sweeps/rates-2/0002-seed-43/metrics.jsonl").exists()


OF_OPTUNA = """
name: rates
config: base.yaml
steps: 4
method: optuna
trials: 3
keys: {training.learning_rate: {low: 1e-3, high: 3e-2, log: true}}
"""


@pytest.mark.parametrize("method", ["grid", "optuna"])
def test_a_sweep_that_was_killed_goes_on_with_the_same_trials(
    place: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    if method == "optuna":
        pytest.importorskip("optuna")
    text = OF_OPTUNA if method == "optuna" else SWEEP.replace("seeds: 2", "seeds: 1")
    Path("sweep.yaml").write_text(text)
    assert main(["sweep", "sweep.yaml", "--sweep-dir", "whole"]) == 0
    train = Processes.train
    calls = []

    def killed(self: Processes, config: Path, run: Path, steps: int) -> Ended:
        calls.append(run.name)
        if len(calls) in (1, 3):
            raise Killed  # before the run
        ended = train(self, config, run, steps)
        if len(calls) == 4:
            raise Killed  # behind it, before its result is recorded
        return ended

    monkeypatch.setattr(Processes, "train", killed)
    for _ in range(3):
        with pytest.raises(Killed):
            main(["sweep", "sweep.yaml", "--sweep-dir", "killed"])
    assert main(["sweep", "sweep.yaml", "--sweep-dir", "killed"]) == 0
    assert calls == [f"000{n}-seed-42" for n in (1, 1, 2, 2, 2, 3)]
    assert outcome(Path("killed")) == outcome(Path("whole"))


def test_a_run_that_fails_is_a_row(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = Processes.train

    def failing(self: Processes, config: Path, run: Path, steps: int) -> Ended:
        if run.name == "0002-seed-42":
            return Ended(20, "the loss is NaN")
        return train(self, config, run, steps)

    monkeypatch.setattr(Processes, "train", failing)
    Path("sweep.yaml").write_text(SWEEP.replace("seeds: 2", "seeds: 1"))
    assert main(["sweep", "sweep.yaml"]) == 0
    assert "0002-seed-42 failed: the loss is NaN" in capsys.readouterr().out
    monkeypatch.setattr(Processes, "train", lambda *_: Ended(20, "the loss is NaN"))
    assert main(["sweep", "sweep.yaml", "--sweep-dir", "all"]) == 5
    assert "no run of the sweep was completed" in capsys.readouterr().err


def test_a_run_above_the_median_is_pruned(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweep.yaml").write_text(
        SWEEP.replace("[1e-2, 1e-3, 3e-2]", "[3e-2, 1e-2, 1e-9]") + "prune: {trials: 2}\n"
    )
    assert main(["sweep", "sweep.yaml"]) == 0
    trials = json.loads(Path("sweeps/rates/sweep.json").read_text())["trials"]
    (pruned,) = trials[2]["runs"]
    assert pruned["state"] == "pruned"
    assert [step for step, _ in pruned["evaluations"]] == [2]
    losses = [trial["runs"][0]["evaluations"][0][1] for trial in trials[:2]]
    assert f"is above {sum(losses) / 2:.4f}" in pruned["reason"]
    assert "0003-seed-42 ended early: pruned at step 2" in capsys.readouterr().out


def test_another_sweep_in_the_chosen_directory_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other").mkdir()
    Path("other/text.txt").write_text("mine")
    assert main(["sweep", "sweep.yaml", "--sweep-dir", "other"]) == 4
    assert "holds something else" in capsys.readouterr().err


def test_a_process_that_ends_with_an_error_tells_it() -> None:
    said = "reading x\nerror: base.yaml: the loss is NaN\n  got:      nan\n  fix:      lower it\n"
    assert processes._reason(20, said) == "base.yaml: the loss is NaN; got:      nan"
    assert "memory" in processes._reason(-9, "anything")


def test_a_run_killed_in_its_first_writes_begins_again(place: Path) -> None:
    run = Path("runs/torn")
    (run / "checkpoints" / ".step-00000000.tmp-0123456789ab").mkdir(parents=True)
    (run / ".config.yaml.tmp-0123456789ab").write_text("na")
    arguments = ["run", "base.yaml", "training.total_steps=1", "--run-dir", str(run)]
    assert main(arguments) == 0


@pytest.mark.long
def test_a_sweep_killed_with_its_processes_gives_the_same_results() -> None:
    report = campaign(kills=3, seed=1, method="random")
    assert (report["kills"], report["errors"], report["different"]) == (3, [], [])
