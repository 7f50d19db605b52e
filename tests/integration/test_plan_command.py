"""The `plan` command: small runs in this process, and a file that `run` takes."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.compute.processor import Rates
from fundamentallm.config import TransformerConfig, load_config
from fundamentallm.engine.cli import main
from fundamentallm.engine.planning import design, measuring, scaling_law, shapes
from fundamentallm.engine.planning import plan as planning
from fundamentallm.engine.planning.design import PlannedTrial
from fundamentallm.engine.planning.trial import TrialResult
from fundamentallm.engine.tuning import sizing

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny   # a small one
data:
  source: text.txt
  sequence_length: 16
  batch_size: 4
model:
  d_model: 16   # twice the width of a head
  num_layers: 1
  num_heads: 2
training:
  learning_rate: 1e-2
  total_steps: 400
handlers: {tensorboard: false, samples: false, progress: false}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG)
    monkeypatch.setattr(scaling_law, "STEPS", 200)
    monkeypatch.setattr(shapes, "MOST_HEADS", 3)
    # A process that has lived for minutes has spent a planned minute before its first step.
    monkeypatch.setattr("fundamentallm.engine.planning.plan.seconds_since_start", lambda: 1.0)
    return tmp_path


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five small runs, however fast the machine is."""

    def five(sizes: Any, *arguments: Any) -> list[PlannedTrial]:
        steps = ((0, 30, 1.0), (0, 30, 0.5), (0, 60, 1.0), (1, 30, 1.0), (1, 60, 1.0))
        return [PlannedTrial(sizes[size], count, rate, 1.0) for size, count, rate in steps]

    monkeypatch.setattr(measuring, "design", five)


def plan(*words: str) -> int:
    return main(["plan", "tiny.yaml", "--minutes", "1", "--measure", "60", *words])


def test_it_writes_a_run_of_the_time(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan() == 0
    said = capsys.readouterr().out
    assert "5 small runs" in said
    assert "at most 1 min 15 s" in said
    assert "run tiny.planned.yaml" in said
    row = next(line for line in said.splitlines() if "<- chosen" in line)
    text = Path("tiny.planned.yaml").read_text()
    assert "# a small one" in text
    assert "# twice the width of a head" in text
    config = load_config(Path("tiny.planned.yaml"))
    rate = config.training.learning_rate
    assert f"{rate:.2g}" in row
    assert config.training.total_steps is None or config.training.max_seconds is None
    assert config.training.max_seconds in (None, 60)
    assert not Path("runs").exists()


def test_the_size_of_the_run_stands_in_its_file_in_place_of_auto(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "cpu_rates", lambda: Rates(1e6, 1e6))
    before, _, after = CONFIG.partition("model:")
    rest = after[after.index("training:") :]
    Path("tiny.yaml").write_text(f"{before}model: {{size: auto}}\n{rest}")
    assert plan() == 0
    model = load_config(Path("tiny.planned.yaml")).model
    assert isinstance(model, TransformerConfig)
    assert model.size is None
    assert {"d_model", "num_layers", "num_heads"} <= model.model_fields_set


def test_json_has_the_plan_and_what_it_rests_on(
    few: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("--json", "--out", "mine.yaml", "seed=7") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == "mine.yaml"
    chosen = found["chosen"]
    assert chosen["low"] < chosen["loss"] < chosen["high"]
    assert chosen["loss"] == min(one["loss"] for one in found["candidates"])
    assert len(found["runs"]) == 5
    config = load_config(Path("mine.yaml"))
    assert config.training.learning_rate == chosen["learning_rate"]
    assert config.seed == 7


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_after_a_signal_the_same_command_goes_on(
    number: signal.Signals,
    few: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: list[int] = []
    train = measuring.train

    def interrupted(config: Any, *arguments: Any) -> TrialResult:
        trained.append(config.training.total_steps)
        if len(trained) == 3:
            signal.raise_signal(number)
        return train(config, *arguments)

    monkeypatch.setattr(measuring, "train", interrupted)
    assert plan() == 128 + number
    assert "2 small runs are kept" in capsys.readouterr().err
    assert not Path("tiny.planned.yaml").exists()
    assert plan() == 0
    assert len(trained) == 3 + 3
    assert "Known from before: 2." in capsys.readouterr().out


def test_no_time_to_measure_is_enough_where_small_runs_are_known(
    few: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan() == 0
    monkeypatch.setattr(measuring, "design", design.design)
    _nothing_left(monkeypatch)
    capsys.readouterr()
    assert main(["plan", "tiny.yaml", "--minutes", "1", "--measure", "1e-3"]) == 0
    said = capsys.readouterr().out
    assert "Nothing is left to measure: 5 small runs are known from before." in said
    assert "run tiny.planned-2.yaml" in said


def test_a_planned_number_of_steps_warms_up_for_a_tenth_at_most(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = planning.choose

    def short(*arguments: Any) -> planning.PlannedRun:
        return replace(chosen(*arguments), max_seconds=None, total_steps=150)

    monkeypatch.setattr(planning, "choose", short)
    assert plan("training.warmup_steps=200") == 0
    assert load_config(Path("tiny.planned.yaml")).training.warmup_steps == 15
    assert main(["check", "tiny.planned.yaml"]) == 0
    assert plan("training.warmup_steps=5", "--out", "other.yaml") == 0
    assert load_config(Path("other.yaml")).training.warmup_steps == 5


def test_a_run_that_diverges_is_no_end(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([float("inf"), 3.0, 2.6, 2.9, 2.5])

    def train(*arguments: Any) -> TrialResult:
        return TrialResult(next(results), 1e-5, 0.1)

    monkeypatch.setattr(measuring, "train", train)
    assert plan() == 0


def _nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "train", lambda *arguments: pytest.fail("nothing is to train"))


def _a_folder() -> None:
    Path("folder").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("folder", name).touch()


@pytest.mark.parametrize(
    ("words", "change", "code", "says"),
    [
        (["--minutes", "0.1"], None, 2, "too short to plan"),
        (["--hours", "1e300"], None, 2, "too long to plan"),
        (["--hours", "-1"], None, 2, "the time is invalid"),
        (["--minutes", "1", "--measure", "nan"], None, 2, "time for measuring is invalid"),
        (["--minutes", "1", "--out", "tiny.yaml"], None, 2, "exists already"),
        (["--minutes", "1", "training.learning_rat=1"], None, 2, "did you mean"),
        (["--minutes", "1", "data.split=[1, 0, 0]"], None, 2, "no validation text"),
        (["--minutes", "1", "model.init_from=folder"], _a_folder, 2, "from random weights"),
        (["--minutes", "1", "--measure", "1e-3"], None, 5, "too short for enough small runs"),
        (["--minutes", "1", "data.sequence_length=64"], None, 3, "too small for a plan"),
        (["--minutes", "1"], lambda: Path("text.txt").unlink(), 3, "text.txt"),
    ],
)
def test_what_cannot_be_planned_is_told_before_it_is_measured(
    words: list[str],
    change: Callable[[], None] | None,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _nothing_left(monkeypatch)
    if change is not None:
        change()
    assert main(["plan", "tiny.yaml", *words]) == code
    error = capsys.readouterr().err
    assert says in error
    assert "fix:" in error or "expected:" in error
    assert sorted(path.name for path in Path().glob("*.yaml")) == ["tiny.yaml"]


def test_several_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan() == 5
    assert "plan measures one process" in capsys.readouterr().err


@pytest.mark.long
def test_the_planned_run_ends_in_its_time_with_about_the_loss(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "tiny.yaml", "--minutes", "0.5", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]
    steps = chosen["tokens"] // chosen["tokens_per_step"]
    assert main(["check", "tiny.planned.yaml"]) == 0
    assert f"{chosen['parameters']:,}" in capsys.readouterr().out  # counted by `check`
    words = ["training.max_seconds=null", f"training.total_steps={steps}"]
    assert main(["run", "tiny.planned.yaml", *words]) == 0
    lines = Path("runs/tiny/metrics.jsonl").read_text().splitlines()
    losses = [value["val/loss"] for value in map(json.loads, lines) if "val/loss" in value]
    width = chosen["high"] - chosen["low"]
    # With 80 % inside; outside by more than the whole interval is a fault.
    assert chosen["low"] - width < losses[-1] < chosen["high"] + width
