"""What `run`, `check`, `evaluate` and `generate` promise, on a run of a dozen steps."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import yaml
from ignite.engine import Events
from tests.runs import trained

from fundamentallm.compute import compilation, processor
from fundamentallm.compute import plan as compute_plan
from fundamentallm.config import RunConfig, load_config
from fundamentallm.config.yaml.file import PACKAGED
from fundamentallm.engine import run as run_module
from fundamentallm.engine.cli import main
from fundamentallm.engine.tuning import auto
from fundamentallm.engine.tuning.measuring import Measurement
from fundamentallm.engine.wiring import assemble as assembly
from fundamentallm.engine.wiring import resolving
from fundamentallm.errors import MachineError
from fundamentallm.events import TrainingEvents
from fundamentallm.files.filesystem import Filesystem
from fundamentallm.training import train
from fundamentallm.training.checkpoint.directory import CONTENT_FILES
from fundamentallm.training.checkpoint.manifest import parse_manifest, render_manifest
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.trainer import Trainer

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2, dropout: 0.1}
training: {learning_rate: 1e-2, total_steps: 12, eval_steps: 4, log_steps: 2}
handlers: {tensorboard: false, samples: false, progress: false}
"""
STEPS_PER_EPOCH = 14  # of the excerpt's 900 training tokens in windows of 4 x 16
OF_TIME = ("elapsed_seconds", "train/tokens_per_second", "train/samples_per_second")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fundamentallm.engine.check._SECONDS", 0.1)  # of steps that it times
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A directory with a finished run of CONFIG; tests take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(TEXT, folder / "text.txt")
    return trained(folder, CONFIG)


@pytest.fixture
def done(finished, place) -> Path:
    shutil.copytree(finished / "runs", place / "runs")
    return Path("runs/tiny")


@pytest.mark.parametrize("command", [["evaluate"], ["generate", "--max-tokens", "1"]])
def test_a_model_is_used_with_the_threads_of_its_run(place, command):
    before = torch.get_num_threads()
    try:
        assert main(["run", "tiny.yaml", "training.threads=2", "training.total_steps=1"]) == 0
        torch.set_num_threads(3)
        assert main([command[0], "runs/tiny", *command[1:]]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def at_step(monkeypatch) -> Callable[..., None]:
    """Let a function be called at the n-th of an event, in the next runs."""

    def arrange(
        count: int, action: Callable[[Trainer], None], event: Any = Events.ITERATION_COMPLETED
    ) -> None:
        def assemble_and_listen(*arguments: Any, **options: Any) -> assembly.Run:
            run = assembly.assemble(*arguments, **options)
            run.trainer.add_event_handler(event(once=count), action)
            return run

        monkeypatch.setattr(run_module, "assemble", assemble_and_listen)

    return arrange


def press_ctrl_c(trainer: Trainer) -> None:
    signal.raise_signal(signal.SIGINT)


def weights(run: Path | str, checkpoint: str = "step-00000012") -> bytes:
    return (Path(run) / "checkpoints" / checkpoint / "model.safetensors").read_bytes()


def lines(run: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def timeless(run: Path | str) -> list[dict[str, Any]]:
    return [{key: line[key] for key in line if key not in OF_TIME} for line in lines(run)]


def checkpoints(run: Path | str) -> list[str]:
    return sorted(path.name for path in (Path(run) / "checkpoints").glob("step-*"))


def last(run: Path | str) -> str:
    return (Path(run) / "checkpoints" / "last").read_text().strip()


def listing(place: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in place.rglob("*")}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# ---------------------------------------------------------------------- the directory


def test_the_directory_holds_what_is_promised(place):
    on = ["handlers.tensorboard=true", "handlers.samples.num_tokens=5", "handlers.progress=true"]

    assert main(["run", "tiny.yaml", *on]) == 0

    run = Path("runs/tiny")
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "README.md",
        "checkpoints",
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "samples.jsonl",
        "tensorboard",
        "usage.jsonl",
    }
    assert any((run / "tensorboard").iterdir())
    assert checkpoints(run) == ["step-00000004", "step-00000008", "step-00000012"]
    for name in checkpoints(run):
        files = {path.name for path in (run / "checkpoints" / name).iterdir()}
        assert files == {"MANIFEST.json", "model.safetensors", "state.json", "state.safetensors"}
    assert last(run) == "step-00000012"
    assert (run / "checkpoints" / "best").read_text().strip() in checkpoints(run)
    assert "step 12: validation loss" in (run / "log.txt").read_text()
    assert (run / "README.md").stat().st_mode == (run / "config.yaml").stat().st_mode
    text = (run / "README.md").read_text()
    for name in (
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "samples.jsonl",
        "usage.jsonl",
        "tensorboard/",
    ):
        assert f"| `{name}` |" in text
    for command in re.findall(r"`\S+ -m fundamentallm ((?:evaluate|verify) [^`]+)`", text):
        assert main(shlex.split(command)) == 0
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [4, 8, 12]
    assert [len(sample["text"]) for sample in samples] == [5, 5, 5]
    for copying in (sample["copying"] for sample in samples):
        assert copying["whole"]
        assert copying["validation"]["count"] > 0
        assert copying["place"].startswith("text.txt:")
    assert {path.name for path in place.iterdir()} == {"runs", "text.txt", "tiny.yaml"}


def test_the_stored_config_is_resolved_and_is_itself_a_config(done):
    config = RunConfig.from_yaml(done / "config.yaml")

    assert config.model.vocab_size == len(set(TEXT.read_text()))
    assert config.model.sequence_length == 16
    assert (config.training.warmup_steps, config.training.total_steps) == (1, 12)
    assert (config.training.precision, config.training.device) == ("fp32", "cpu")
    assert config.training.compile is False


def test_the_stored_config_trains_to_the_same_weights(done):
    shutil.copy(done / "config.yaml", "again.yaml")

    assert main(["run", "again.yaml", "--run-dir", "again"]) == 0

    assert weights("again") == weights(done)


def test_what_auto_chooses_is_stored(monkeypatch):
    monkeypatch.setattr(compilation, "find_compiler", lambda: None)  # it takes seconds to call
    auto = ["training.device=auto", "training.precision=auto", "training.compile=auto"]

    assert main(["run", "tiny.yaml", "training.total_steps=1", *auto]) == 0

    stored = yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["training"]
    assert stored["device"] != "auto"
    assert stored["precision"] in ("fp32", "bf16", "fp16")
    assert stored["bf16_weights"] in (True, False)
    assert stored["attention"] in ("flash", "explicit")
    assert stored["compile"] is False


def test_every_line_of_metrics_has_its_keys(done):
    written = lines(done)

    for line in written:
        assert {"step", "epoch", "tokens", "elapsed_seconds"} <= line.keys()
        assert line["tokens"] == line["step"] * 64
        assert line["epoch"] == 1
    training = [line for line in written if "train/loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8, 10, 12]
    for line in training:
        for key in ("loss", "loss_ema", "perplexity", "grad_norm", "lr"):
            assert math.isfinite(line[f"train/{key}"])
        assert line["train/tokens_per_second"] > 0
        assert line["train/samples_per_second"] > 0
    validation = [line for line in written if "val/loss" in line]
    assert [line["step"] for line in validation] == [4, 8, 12]
    for line in validation:
        assert line["val/perplexity"] == pytest.approx(math.exp(line["val/loss"]))
    assert validation[-1]["val/loss"] < validation[0]["val/loss"]


def test_an_epochs_end_is_validated_and_its_loss_is_logged():
    steps = f"training.total_steps={STEPS_PER_EPOCH + 1}"
    assert main(["run", "tiny.yaml", steps, "training.eval_steps=1000"]) == 0

    by_step = {line["step"]: line for line in lines("runs/tiny") if "train/loss" in line}
    assert "train/epoch_loss" in by_step[STEPS_PER_EPOCH]
    assert by_step[STEPS_PER_EPOCH + 1]["epoch"] == 2
    evaluated = [line["step"] for line in lines("runs/tiny") if "val/loss" in line]
    assert evaluated == [STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1]
    assert checkpoints("runs/tiny")[0] == "step-00000000"


def test_the_best_pointer_stays_when_the_loss_rises(at_step, capsys):
    def spoil(trainer: Trainer) -> None:
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(30)

    at_step(5, spoil)
    assert main(["run", "tiny.yaml", "training.keep_last=2", "training.eval_steps=2"]) == 0

    losses = {line["step"]: line["val/loss"] for line in lines("runs/tiny") if "val/loss" in line}
    assert min(losses, key=losses.__getitem__) == 4
    assert Path("runs/tiny/checkpoints/best").read_text().strip() == "step-00000004"
    assert checkpoints("runs/tiny") == ["step-00000004", "step-00000010", "step-00000012"]
    capsys.readouterr()
    assert main(["evaluate", "runs/tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(losses[4], rel=1e-6)


def test_only_the_newest_and_the_best_checkpoints_stay():
    assert main(["run", "tiny.yaml", "training.checkpoint_steps=1", "training.keep_last=2"]) == 0

    best = Path("runs/tiny/checkpoints/best").read_text().strip()
    assert checkpoints("runs/tiny") == sorted({best, "step-00000011", "step-00000012"})


def test_a_built_in_source_is_kept_beside_the_run():
    tiny = ["training.total_steps=1", "data.split=[0.002,0.001,0.997]"]

    assert main(["run", "tiny.yaml", "data.source=python-docs", *tiny]) == 0

    from fundamentallm.data.built_in import python_docs

    assert Path("runs/tiny/corpus.txt").read_text(encoding="utf-8") == python_docs()


def test_an_absolute_checkpoint_dir_is_taken_as_it_is(place):
    assert main(["run", "tiny.yaml", f"training.checkpoint_dir={place}/elsewhere"]) == 0

    assert last_name(place / "elsewhere") == "step-00000012"
    assert not Path("runs/tiny/checkpoints").exists()


def last_name(folder: Path) -> str:
    return (folder / "last").read_text().strip()


# ---------------------------------------------------------------------- going on


@pytest.mark.parametrize("step", [3, 4, 7])
def test_an_interrupted_run_goes_on_to_the_same_end(done, at_step, capsys, step):
    at_step(step, press_ctrl_c)
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 130
    error = capsys.readouterr().err
    assert f"stopped by Ctrl-C, saved at step {step}; the same command goes on" in error
    assert last("cut") == f"step-{step:08d}"
    assert lines("cut")[-1]["step"] <= step

    at_step(10**6, press_ctrl_c)
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 0

    assert f"continuing cut from step {step}" in capsys.readouterr().err
    assert weights("cut") == weights(done)
    assert timeless("cut") == timeless(done)
    store, reference = CheckpointStore("cut/checkpoints"), CheckpointStore(done / "checkpoints")
    state = store.read(store.directory / "step-00000012")
    expected = reference.read(reference.directory / "step-00000012")
    assert same(state["optimizer"], expected["optimizer"])


def test_going_on_reads_each_checkpoint_once(at_step, monkeypatch):
    at_step(7, press_ctrl_c)
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 130
    at_step(10**6, press_ctrl_c)
    saved = checkpoints("cut")
    opened: Counter[Path] = Counter()
    open_file = Filesystem.open
    monkeypatch.setattr(
        Filesystem,
        "open",
        lambda disk, path: (opened.update([path.absolute()]), open_file(disk, path))[1],
    )

    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 0

    assert len(saved) == 3
    for name in saved:
        files = [Path("cut/checkpoints", name, file).absolute() for file in CONTENT_FILES]
        assert [opened[file] for file in files] == [1, 1, 1]


def test_the_way_on_that_an_interrupted_run_names_works(at_step, capsys):
    at_step(5, press_ctrl_c)
    start = ["data.batch_size=2", "training.scheduler={name: cosine}", "--run-dir", "my run"]
    assert main(["run", "tiny.yaml", *start]) == 130
    words = shlex.split(
        capsys.readouterr().err.split("the same command goes on: ")[1].splitlines()[0]
    )
    at_step(10**6, press_ctrl_c)

    assert words[:3] == ["python", "-m", "fundamentallm"]
    assert main(words[3:]) == 0

    assert last("my run") == "step-00000012"
    assert not Path("runs").exists()


def test_an_evaluation_cut_short_runs_again(done, at_step):
    at_step(2, press_ctrl_c, TrainingEvents.FLLM_EVALUATION_STARTED)
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 130
    assert last("cut") == "step-00000008"
    at_step(10**6, press_ctrl_c)
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 0

    assert weights("cut") == weights(done)
    assert timeless("cut") == timeless(done)


@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_an_evaluation_that_fails_runs_again_and_costs_no_step(done, at_step, capsys, evaluation):
    def fail(trainer: Trainer) -> None:
        raise MemoryError("too much")

    at_step(evaluation, fail, TrainingEvents.FLLM_EVALUATION_STARTED)
    with pytest.raises(MachineError, match="out of memory"):
        main(["run", "tiny.yaml", "--run-dir", "cut", "--debug"])
    assert last("cut") == f"step-{4 * evaluation:08d}"
    at_step(10**6, press_ctrl_c)
    capsys.readouterr()
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 0

    output = capsys.readouterr()
    assert f"continuing cut from step {4 * evaluation}" in output.err
    assert "Done: 12 steps" in output.out
    assert weights("cut") == weights(done)
    assert timeless("cut") == timeless(done)
    losses = [line["val/loss"] for line in lines("cut") if "val/loss" in line]
    assert f"Validation loss {losses[-1]:.4f} (best {min(losses):.4f})." in output.out
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 0
    assert "is finished: the last step is done" in capsys.readouterr().out


def test_a_run_that_stopped_early_says_so_and_goes_on_with_a_larger_budget(capsys):
    early = ["run", "tiny.yaml", "handlers.early_stopping={patience: 1, min_delta: 9.0}"]
    assert main(early) == 0
    assert last("runs/tiny") == "step-00000008"
    capsys.readouterr()
    assert main(early) == 0
    assert "is finished: no lower validation loss in 1 evaluations" in capsys.readouterr().out

    assert main([*early, "training.total_steps=14", "--resume", "runs/tiny"]) == 0
    assert last("runs/tiny") == "step-00000012"


def test_a_run_in_its_own_directory_goes_on_by_itself(at_step):
    at_step(5, press_ctrl_c)
    assert main(["run", "tiny.yaml"]) == 130
    at_step(10**6, press_ctrl_c)

    assert main(["run", "tiny.yaml", "--resume", "auto"]) == 0

    assert [path.name for path in Path("runs").iterdir()] == ["tiny"]
    assert last("runs/tiny") == "step-00000012"


def test_a_cut_in_the_second_epoch_goes_on_to_the_same_end(at_step):
    longer = ["training.total_steps=20", "training.scheduler=cosine"]
    assert main(["run", "tiny.yaml", *longer, "--run-dir", "whole"]) == 0
    at_step(STEPS_PER_EPOCH + 2, press_ctrl_c)
    assert main(["run", "tiny.yaml", *longer, "--run-dir", "cut"]) == 130
    at_step(10**6, press_ctrl_c)
    assert main(["run", "tiny.yaml", *longer, "--run-dir", "cut"]) == 0

    assert weights("cut", "step-00000020") == weights("whole", "step-00000020")
    assert timeless("cut") == timeless("whole")


def test_a_crash_goes_on_from_the_newest_checkpoint_with_one_history(done, at_step):
    def crash(trainer: Trainer) -> None:
        raise ZeroDivisionError

    at_step(7, crash)
    with pytest.raises(ZeroDivisionError):
        main(["run", "tiny.yaml", "--run-dir", "cut"])
    assert last("cut") == "step-00000004"
    with Path("cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tr')  # a line that the crash left half written
    at_step(10**6, press_ctrl_c)
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 0

    assert weights("cut") == weights(done)
    assert timeless("cut") == timeless(done)


def test_a_pause_is_saved_and_resumed(done, monkeypatch, capsys):
    seconds = iter(range(10**6))
    monkeypatch.setattr(assembly, "seconds_since_start", lambda: float(next(seconds)))
    pause = ["--run-dir", "cut", "training.stop_after_seconds=20"]
    assert main(["run", "tiny.yaml", *pause]) == 0
    assert "Saved at step" in capsys.readouterr().out
    stopped_at = last("cut")
    assert "step-00000000" < stopped_at < "step-00000012"

    monkeypatch.setattr(assembly, "seconds_since_start", lambda: 0.0)
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 0

    assert weights("cut") == weights(done)
    assert timeless("cut") == timeless(done)


def test_a_finished_run_says_so_and_takes_no_step(done, place, capsys):
    before = listing(place)

    assert main(["run", "tiny.yaml"]) == 0

    out = capsys.readouterr().out
    assert "finished" in out
    assert "--resume runs/tiny" in out
    assert "--resume never" in out
    assert listing(place) == before


def test_the_ways_on_that_a_finished_run_names_work(done, capsys):
    assert main(["run", "tiny.yaml"]) == 0
    ways = re.findall(r"^  python -m fundamentallm (.*)$", capsys.readouterr().out, re.M)
    assert len(ways) == 2

    assert main(shlex.split(ways[0], comments=True)) == 0
    assert "from step 12" in capsys.readouterr().err
    assert last(done) == "step-00000024"

    assert main(shlex.split(ways[1])) == 0
    assert last("runs/tiny-2") == "step-00000012"


def test_a_run_that_a_handler_terminated_says_so_and_goes_on_by_its_path(done, at_step, capsys):
    at_step(6, lambda trainer: trainer.terminate())
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 0
    assert last("cut") == "step-00000006"
    at_step(10**6, press_ctrl_c)

    capsys.readouterr()
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 0
    out = capsys.readouterr().out
    assert "stopped by <lambda> (test_run_command.py, line " in out
    assert last("cut") == "step-00000006"

    way = re.search(r"^  python -m fundamentallm (.*)$", out, re.M)
    assert way is not None
    assert main(shlex.split(way[1])) == 0
    assert last("cut") == "step-00000012"
    assert weights("cut") == weights(done)


def test_a_smaller_budget_is_no_way_on(done, place, capsys):
    before = listing(place)

    assert main(["run", "tiny.yaml", "training.total_steps=10", "--resume", "runs/tiny"]) == 0

    assert "finished" in capsys.readouterr().out
    assert listing(place) == before


def test_a_longer_run_equals_one_that_was_long_from_the_start(done):
    longer = ["training.total_steps=16", "training.scheduler=linear_warmup"]
    steady = ["training.warmup_steps=1"]
    assert main(["run", "tiny.yaml", *steady, "--run-dir", "grown"]) == 0
    assert main(["run", "tiny.yaml", *steady, *longer, "--resume", "grown"]) == 0
    assert main(["run", "tiny.yaml", *steady, *longer, "--run-dir", "long"]) == 0

    assert weights("grown", "step-00000016") == weights("long", "step-00000016")


def test_resuming_a_finished_run_by_path_without_more_budget_says_so(done, place, capsys):
    before = {**listing(place)}

    assert main(["run", "tiny.yaml", "--resume", "runs/tiny"]) == 0

    assert "finished" in capsys.readouterr().out
    assert last(done) == "step-00000012"
    assert [line["step"] for line in lines(done)][-1] == 12
    assert listing(place) == before


def test_a_changed_config_starts_the_next_directory_and_says_so(done, capsys):
    assert main(["run", "tiny.yaml", "training.learning_rate=2e-2"]) == 0

    error = capsys.readouterr().err
    assert "runs/tiny-2" in error
    assert "training.learning_rate: 0.01 in the run, 0.02 now" in error
    assert last("runs/tiny-2") == "step-00000012"
    assert weights("runs/tiny-2") != weights(done)
    assert main(["run", "tiny.yaml", "training.learning_rate=2e-2"]) == 0
    assert main(["run", "tiny.yaml", "training.learning_rate=3e-2"]) == 0
    assert {path.name for path in Path("runs").iterdir()} == {"tiny", "tiny-2", "tiny-3"}


def test_resume_never_takes_the_next_free_directory(done):
    assert main(["run", "tiny.yaml", "--resume", "never"]) == 0
    assert main(["run", "tiny.yaml", "--resume", "never"]) == 0

    assert {path.name for path in Path("runs").iterdir()} == {"tiny", "tiny-2", "tiny-3"}
    assert weights("runs/tiny-2") == weights("runs/tiny-3") == weights(done)


def test_logging_and_budgets_are_no_other_run(done, capsys):
    assert main(["run", "tiny.yaml", "training.log_steps=1", "handlers.logs=false"]) == 0

    assert "finished" in capsys.readouterr().out
    assert [path.name for path in Path("runs").iterdir()] == ["tiny"]


def test_resume_from_an_unfinished_run_by_path(done, at_step):
    at_step(6, press_ctrl_c)
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 130
    at_step(10**6, press_ctrl_c)

    assert main(["run", "tiny.yaml", "--resume", "cut"]) == 0

    assert weights("cut") == weights(done)
    assert not Path("runs/cut").exists()


def test_resume_from_the_newest_checkpoint_by_path(done, at_step):
    at_step(6, press_ctrl_c)
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 130
    at_step(10**6, press_ctrl_c)

    assert main(["run", "tiny.yaml", "--resume", "cut/checkpoints/step-00000006"]) == 0

    assert weights("cut") == weights(done)
    assert timeless("cut") == timeless(done)


def test_resume_by_a_pointer(done):
    longer = ["training.total_steps=14", "--resume", "runs/tiny/checkpoints/last"]

    assert main(["run", "tiny.yaml", *longer]) == 0

    assert last(done) == "step-00000014"


def test_resume_from_a_checkpoint_that_lies_deeper_in_its_run(at_step):
    deep = "training.checkpoint_dir=deep/down"
    at_step(6, press_ctrl_c)
    assert main(["run", "tiny.yaml", deep]) == 130
    at_step(10**6, press_ctrl_c)

    assert main(["run", "tiny.yaml", deep, "--resume", "runs/tiny/deep/down/step-00000006"]) == 0

    assert last_name(Path("runs/tiny/deep/down")) == "step-00000012"
    assert [line["step"] for line in lines("runs/tiny")][-1] == 12
    assert {path.name for path in Path("runs/tiny/deep").iterdir()} == {"down"}


def test_resume_from_an_older_checkpoint_sets_the_later_ones_aside(done):
    reference, metrics = weights(done), timeless(done)

    assert main(["run", "tiny.yaml", "--resume", "runs/tiny/checkpoints/step-00000004"]) == 0

    assert weights(done) == reference
    assert timeless(done) == metrics
    aside = done / "checkpoints" / "superseded"
    names = {path.name for path in aside.rglob("step-*")}
    assert {name[:13] for name in names} == {"step-00000008", "step-00000012"}
    assert last(done) == "step-00000012"


def test_the_run_goes_on_as_usual_after_an_older_checkpoint_was_chosen(done, at_step):
    at_step(6, press_ctrl_c)
    older = str(done / "checkpoints" / "step-00000004")
    reference = weights(done)
    assert main(["run", "tiny.yaml", "--resume", older]) == 130
    assert last(done) == "step-00000006"
    at_step(10**6, press_ctrl_c)

    assert main(["run", "tiny.yaml"]) == 0

    assert weights(done) == reference
    assert [path.name for path in Path("runs").iterdir()] == ["tiny"]


def test_what_auto_chose_is_not_chosen_again_on_resume(at_step, monkeypatch, capsys):
    """As on a machine that chooses bf16, and then on one that would choose fp32."""

    def choosing(choice: str) -> Callable[..., str]:
        return lambda name, *_: choice if name == "auto" else name

    at_step(5, press_ctrl_c)
    monkeypatch.setattr(compute_plan, "resolve_precision", choosing("bf16"))
    assert main(["run", "tiny.yaml", "training.precision=auto"]) == 130
    at_step(10**6, press_ctrl_c)
    monkeypatch.setattr(compute_plan, "resolve_precision", choosing("fp32"))
    capsys.readouterr()
    assert main(["run", "tiny.yaml", "training.precision=auto"]) == 0

    assert "on cpu in bf16" in capsys.readouterr().err
    stored = yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["training"]
    assert stored["precision"] == "bf16"


@pytest.fixture
def measured(monkeypatch, tmp_path) -> list[str]:
    """Measurements that find bf16 faster, also in a short run; the types that were measured."""
    asked: list[str] = []

    def measure(config, plan, *_, **__):
        asked.append(plan.precision)
        return Measurement(0.5 if plan.precision == "bf16" else 1.0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(auto, "LEAST_MICRO_BATCHES", 1)
    monkeypatch.setattr(auto, "measure", measure)
    return asked


def test_what_was_measured_at_the_start_holds_on_resume(at_step, measured, capsys):
    words = ["tiny.yaml", "training.precision=auto"]
    assert main(["run", *words, "--run-dir", "whole"]) == 0
    assert measured == ["fp32", "bf16"]
    assert "auto: bf16; a micro-batch takes, measured now" in capsys.readouterr().err
    at_step(5, press_ctrl_c)
    assert main(["run", *words, "--run-dir", "cut"]) == 130
    at_step(10**6, press_ctrl_c)
    shutil.rmtree("cache")  # as on another machine
    measured.clear()

    assert main(["run", *words, "--run-dir", "cut"]) == 0

    assert measured == []
    assert weights("cut") == weights("whole")
    stored = yaml.safe_load(Path("cut/config.yaml").read_text())["training"]
    assert (stored["precision"], stored["bf16_weights"]) == ("bf16", True)


def test_a_check_measures_for_auto_and_the_run_takes_its_figures(measured, capsys):
    assert main(["check", "tiny.yaml", "training.precision=auto"]) == 0
    assert measured == ["fp32", "bf16"]
    assert re.search(r"^device +cpu, bf16$", capsys.readouterr().out, re.M)

    assert main(["run", "tiny.yaml", "training.precision=auto"]) == 0

    assert measured == ["fp32", "bf16"]
    assert "on cpu in bf16" in capsys.readouterr().err


def test_a_real_measurement_leaves_no_trace_in_the_run(done, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {"LEAST_MICRO_BATCHES": 1, "LEAST_SECONDS": 0.0, "SECONDS": 1e-9}.items():
        monkeypatch.setattr(auto, name, value)
    monkeypatch.setattr(auto, "LEAST_GAIN", 1.0)  # whatever is measured, fp32 remains

    assert main(["run", "tiny.yaml", "training.precision=auto", "--run-dir", "chosen"]) == 0

    assert (tmp_path / "cache" / "fundamentallm" / "speed.json").exists()
    assert weights("chosen") == weights(done)


@pytest.mark.long
@pytest.mark.skipif(compilation.find_compiler() is None, reason="needs a C++ compiler")
# Torch hides this one from users while it traces, by way of showwarning, which pytest has replaced.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_run_that_measured_compiled_code_goes_on_exactly_without_measuring(
    at_step, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("LEAST_MICRO_BATCHES", "LEAST_SECONDS", "LEAST_SECONDS_TO_COMPILE"):
        monkeypatch.setattr(auto, name, 0)
    measuring = auto.choose

    def choose(start, *others):
        measuring(start, *others)
        return replace(start, compile=True)  # whatever is faster here

    monkeypatch.setattr(auto, "choose", choose)
    steps = "training.total_steps=20"
    words = ["tiny.yaml", "training.compile=auto", "model.dropout=0", steps]
    assert main(["run", *words, "--run-dir", "whole"]) == 0
    at_step(STEPS_PER_EPOCH - 1, press_ctrl_c)  # the resumed one begins with a short batch
    assert main(["run", *words, "--run-dir", "cut"]) == 130
    at_step(10**6, press_ctrl_c)
    monkeypatch.setattr(auto, "choose", None)
    torch._dynamo.reset()
    assert main(["run", *words, "--run-dir", "cut"]) == 0

    stored = yaml.safe_load(Path("cut/config.yaml").read_text())["training"]
    assert stored["compile"] is True
    assert weights("cut", "step-00000020") == weights("whole", "step-00000020")


@pytest.mark.long
@pytest.mark.skipif(compilation.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_run_goes_on_where_no_compiler_is(at_step, monkeypatch, capsys):
    words = ["tiny.yaml", "training.compile=true"]
    at_step(6, press_ctrl_c)
    assert main(["run", *words]) == 130
    at_step(10**6, press_ctrl_c)
    monkeypatch.setenv("CXX", "no-such-compiler")
    capsys.readouterr()
    assert main(["run", *words]) == 0
    assert "this machine cannot compile (there is no C++ compiler)" in " ".join(
        "".join(capsys.readouterr()).split()
    )
    stored = yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["training"]
    assert stored["compile"] is False
    assert main(["run", "tiny.yaml", "training.compile=true", "--run-dir", "other"]) != 0


NATIVE = ["tiny.yaml", "data.sequence_length=32", "model.d_model=64", "model.dropout=0"]
NATIVE += ["training.compile=native", "training.precision=bf16", "training.eval_steps=3"]


@pytest.mark.skipif(compilation.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("step", "precision"), [(1, "bf16"), (5, "bf16"), (6, "bf16"), (5, "fp32")]
)
def test_a_run_of_native_code_goes_on_exactly(at_step, step, precision):
    words = [*NATIVE, f"training.precision={precision}"]
    at_step(10**6, press_ctrl_c)
    assert main(["run", *words, "--run-dir", "whole"]) == 0
    at_step(step, press_ctrl_c)
    assert main(["run", *words, "--run-dir", "cut"]) == 130
    at_step(10**6, press_ctrl_c)
    assert main(["run", *words, "--run-dir", "cut"]) == 0
    stored = yaml.safe_load(Path("cut/config.yaml").read_text())["training"]
    assert (stored["compile"], stored["bf16_weights"]) == ("native", False)
    assert stored["precision"] == precision
    assert weights("cut") == weights("whole")
    assert timeless("cut") == timeless("whole")


@pytest.mark.skipif(compilation.find_compiler() is None, reason="needs a C++ compiler")
def test_a_native_run_goes_on_where_no_compiler_is(at_step, monkeypatch, capsys):
    at_step(6, press_ctrl_c)
    assert main(["run", *NATIVE]) == 130
    at_step(10**6, press_ctrl_c)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["run", *NATIVE]) == 0
    assert "this machine cannot compile (there is no C++ compiler)" in " ".join(
        "".join(capsys.readouterr()).split()
    )
    assert main(["run", *NATIVE, "--run-dir", "other"]) == 5
    assert "compile: native needs a C++ compiler" in capsys.readouterr().err


@pytest.mark.skipif(compilation.find_compiler() is None, reason="needs a C++ compiler")
def test_a_native_run_goes_on_where_the_code_is_refused(at_step, monkeypatch, capsys):
    at_step(6, press_ctrl_c)
    assert main(["run", *NATIVE]) == 130
    at_step(10**6, press_ctrl_c)

    def refuses(precision: str) -> None:
        raise MachineError("the system refuses the processor's tile registers (AMX)")

    monkeypatch.setattr(resolving, "load_library", refuses)
    assert main(["run", *NATIVE]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "cannot compile (the system refuses the processor's tile registers (AMX))" in said
    stored = yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["training"]
    assert (stored["compile"], stored["precision"]) == (False, "bf16")


def test_a_type_that_the_processor_is_slow_in_is_said(monkeypatch, capsys):
    monkeypatch.setattr(processor, "cpu_rates", lambda: (1e11, 1e9))
    assert main(["run", "tiny.yaml", "training.precision=bf16", "training.total_steps=1"]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "precision: bf16 is slower than fp32: matrix products here do 1 GFLOP/s" in said
    assert main(["run", "tiny.yaml", "training.total_steps=1", "--run-dir", "wide"]) == 0
    assert "bf16" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("config", sorted(PACKAGED.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_run_with_the_optimizer_of_a_shipped_file_goes_on_bitwise(config, at_step):
    optimizer = load_config(config).training.optimizer.to_plain()
    command = ["run", "tiny.yaml", f"training.optimizer={json.dumps(optimizer)}"]
    assert main([*command, "--run-dir", "whole"]) == 0
    at_step(6, press_ctrl_c)
    assert main([*command, "--run-dir", "halved"]) == 130
    at_step(10**6, press_ctrl_c)
    assert main([*command, "--run-dir", "halved"]) == 0
    assert weights("halved") == weights("whole")


def test_muons_type_is_chosen_once_and_stored(at_step, monkeypatch, capsys):
    muon = "training.optimizer={name: muon, dtype: %s}"
    command = ["run", "tiny.yaml", muon % "auto", "training.total_steps=12"]

    def stored() -> str:
        config = yaml.safe_load(Path("runs/tiny/config.yaml").read_text())
        return config["training"]["optimizer"]["dtype"]

    monkeypatch.setattr(processor, "cpu_rates", lambda: (1e11, 1e9))
    at_step(6, press_ctrl_c)
    assert main(command) == 130
    assert stored() == "float32"
    assert "slower" not in "".join(capsys.readouterr())
    # the same run on a processor that is fast in bfloat16
    monkeypatch.setattr(processor, "cpu_rates", lambda: (1e11, 5e11))
    at_step(10**6, press_ctrl_c)
    assert main(command) == 0
    assert stored() == "float32"

    monkeypatch.setattr(processor, "cpu_rates", lambda: (1e11, 1e9))
    capsys.readouterr()
    assert main(["check", "tiny.yaml", muon % "bfloat16"]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert (
        "muon's dtype: bfloat16 is slower than float32: matrix products here do 1 GFLOP/s in "
        "bfloat16 and 100 in float32; set it to auto or float32"
    ) in said


def test_documents_apart_are_not_computed_by_native_code(capsys):
    assert main(["prepare", "text.txt", "--tokenizer", "character", "--out", "prepared"]) == 0
    words = ["data.source=prepared", "data.packing=document", "training.total_steps=1"]
    assert main(["run", *NATIVE, *words]) == 0
    assert "training.compile has no effect" in "".join(capsys.readouterr())
    stored = yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["training"]
    assert stored["compile"] is False


@pytest.mark.skipif(compilation.find_compiler() is None, reason="needs a C++ compiler")
def test_every_command_takes_a_native_run(capsys):
    assert main(["check", *NATIVE]) == 0
    assert main(["run", *NATIVE]) == 0
    trained = [line["val/loss"] for line in lines("runs/tiny") if "val/loss" in line][-1]
    capsys.readouterr()
    assert main(["evaluate", "runs/tiny/checkpoints/step-00000012", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(trained, rel=1e-3)
    assert main(["generate", "runs/tiny", "--prompt", "a", "--max-tokens", "8"]) == 0


def test_a_model_that_native_code_does_not_know_is_refused_with_the_reason(capsys):
    assert main(["run", *NATIVE, "model.bias=true", "model.d_model=48"]) == 2
    said = capsys.readouterr().err
    assert "compile: native does not support this model's block" in said
    assert "d_model 48" in said
    assert "training.compile" in said


def test_nothing_is_measured_of_what_cannot_fit(monkeypatch, capsys):
    monkeypatch.setattr(auto, "measure", None)
    monkeypatch.setattr("fundamentallm.engine.tuning.fit.memory_limit", lambda device: 1 << 20)
    words = ["training.precision=auto", "model.d_model=512", "training.total_steps=1000"]
    assert main(["run", "tiny.yaml", *words]) == 2
    assert "does not fit into memory" in capsys.readouterr().err


def test_what_has_no_effect_is_said(capsys):
    words = ["training.bf16_weights=true", "training.total_steps=1"]
    assert main(["run", "tiny.yaml", *words]) == 0
    assert "training.bf16_weights has no effect with precision fp32" in "".join(capsys.readouterr())
    assert main(["prepare", "text.txt", "--tokenizer", "character", "--out", "prepared"]) == 0
    words = ["data.source=prepared", "data.packing=document", "training.total_steps=1"]
    words += ["training.compile=true", "training.attention=explicit"]
    assert main(["run", "tiny.yaml", *words, "--run-dir", "apart"]) == 0
    said = "".join(capsys.readouterr())
    assert "training.compile has no effect" in said
    assert "training.attention has no effect" in said


def test_threads_are_set_before_anything_is_computed(at_step):
    seen = []
    at_step(1, lambda trainer: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    try:
        assert main(["run", "tiny.yaml", f"training.threads={before + 1}"]) == 0
    finally:
        torch.set_num_threads(before)
    assert seen == [before + 1]
    manifest = json.loads(Path("runs/tiny/checkpoints/step-00000004/MANIFEST.json").read_text())
    assert manifest["metadata"]["circumstances"]["threads"] == before + 1


def test_a_checkpoint_from_before_a_field_existed_is_gone_on_from(
    done, at_step, monkeypatch, capsys
):
    monkeypatch.setattr(assembly, "seconds_since_start", lambda: 1.0)  # not those of all tests
    at_step(6, press_ctrl_c)
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 130
    at_step(10**6, press_ctrl_c)
    for path in Path("cut/checkpoints").glob("step-*/MANIFEST.json"):
        stored = parse_manifest(path.read_bytes(), path.parent.name, str(path))
        metadata = json.loads(json.dumps(stored.metadata))
        for description in (metadata["config_as_written"], metadata["config"]):
            del description["model"]["init_from"], description["model"]["logit_softcap"]
            del description["training"]["max_seconds"], description["plugins"]
            for field in ("attention", "bf16_weights", "threads"):
                del description["training"][field]
        path.write_bytes(render_manifest(stored.step, stored.files, metadata))

    assert main(["run", "tiny.yaml", "model.logit_softcap=30", "--resume", "cut"]) == 4
    assert "model.logit_softcap: null in the run, 30.0 now" in capsys.readouterr().err
    assert main(["evaluate", "cut"]) == 0
    assert main(["run", "tiny.yaml", "--resume", "cut"]) == 0
    assert weights("cut") == weights(done)
    longer = ["training.max_seconds=900", "training.total_steps=14"]
    assert main(["run", "tiny.yaml", *longer, "--resume", "cut"]) == 0
    assert "finished" not in capsys.readouterr().out


def test_drift_is_refused_with_every_difference(done, place, capsys):
    before = listing(place)
    changes = ["training.learning_rate=2e-2", "model.d_model=32", "data.batch_size=8", "seed=7"]

    assert main(["run", "tiny.yaml", *changes, "--resume", "runs/tiny"]) == 4

    error = capsys.readouterr().err
    assert "training.learning_rate: 0.01 in the run, 0.02 now" in error
    assert "model.d_model: 16 in the run, 32 now" in error
    assert "data.batch_size: 4 in the run, 8 now" in error
    assert "seed: 42 in the run, 7 now" in error
    assert "--resume never" in error
    assert "Traceback" not in error
    assert listing(place) == before


# ---------------------------------------------------------------------- places and doors


def test_run_dir_is_used_instead_of_runs(place):
    assert main(["run", "tiny.yaml", "--run-dir", "some/where"]) == 0

    assert last("some/where") == "step-00000012"
    assert not Path("runs").exists()


def test_run_dir_as_an_override(place):
    assert main(["run", "tiny.yaml", "run_dir=elsewhere"]) == 0

    assert last("elsewhere") == "step-00000012"
    assert not Path("runs").exists()


def test_run_dir_with_other_things_in_it_is_refused(place, capsys):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")

    assert main(["run", "tiny.yaml", "--run-dir", "mine"]) == 4

    assert "mine" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


def test_overrides_stand_anywhere_after_the_config():
    command = "run tiny.yaml training.total_steps=2 --resume never training.eval_steps=1 --run-dir"
    assert main([*command.split(), "here", "seed=3", "training.learning_rate=1e-3"]) == 0

    stored = yaml.safe_load(Path("here/config.yaml").read_text())
    assert (stored["training"]["total_steps"], stored["training"]["eval_steps"]) == (2, 1)
    assert (stored["seed"], stored["training"]["learning_rate"]) == (3, 1e-3)


PLUGIN = """
from pathlib import Path
from ignite.engine import Events
from fundamentallm.training.handlers import HANDLERS

@HANDLERS.register("{name}")
class Note:
    def __init__(self, path: str = "noted.txt") -> None:
        self.path = path
    def attach(self, trainer):
        trainer.add_event_handler(Events.COMPLETED, self.note)
    def note(self, trainer):
        Path(self.path).write_text(str(trainer.state.iteration))
"""


@pytest.mark.parametrize("way", ["option", "file"])
def test_a_plugin_adds_a_handler_and_is_announced(place, monkeypatch, capsys, way):
    name = f"note_by_{way}"
    Path(f"{name}_plugin.py").write_text(PLUGIN.format(name=name))
    monkeypatch.syspath_prepend(place)
    chosen = f"handlers.{name}.path=seen.txt"
    if way == "option":
        arguments = ["--plugins", f"{name}_plugin", chosen]
    else:
        arguments = [f"plugins=[{name}_plugin]", chosen]

    assert main(["run", "tiny.yaml", *arguments]) == 0

    assert Path("seen.txt").read_text() == "12"
    assert f"importing the plugin {name}_plugin" in capsys.readouterr().err


def test_a_stored_config_imports_nothing_by_itself(done, place, capsys, monkeypatch):
    """What a checkpoint names under plugins is not imported by evaluate and generate."""
    monkeypatch.syspath_prepend(place)
    Path("trap_plugin.py").write_text("")
    assert main(["run", "tiny.yaml", "--run-dir", "trapped", "plugins=[trap_plugin]"]) == 0
    monkeypatch.delitem(sys.modules, "trap_plugin")
    Path("trap_plugin.py").write_text("raise SystemExit('imported')")
    capsys.readouterr()

    assert main(["evaluate", "trapped"]) == 0
    assert main(["generate", "trapped", "--max-tokens", "2"]) == 0

    assert "plugin" not in capsys.readouterr().err


def test_the_other_door_is_the_same_run(done, place):
    Path("bare.yaml").write_text(CONFIG.replace("source: text.txt, ", ""))

    code = train.main(["--config", "bare.yaml", "--data-path", "text.txt", "--run-dir", "door"])

    assert code == 0
    assert weights("door") == weights(done)
    assert timeless("door") == timeless(done)


# ---------------------------------------------------------------------- budgets and notes


def test_max_tokens_ends_the_run():
    assert main(["run", "tiny.yaml", "training.total_steps=null", "training.max_tokens=300"]) == 0

    assert last("runs/tiny") == "step-00000005"
    assert lines("runs/tiny")[-1]["tokens"] == 320


def test_the_first_limit_ends_the_run():
    assert main(["run", "tiny.yaml", "training.max_tokens=100000000"]) == 0

    assert last("runs/tiny") == "step-00000012"


def test_num_epochs_end_the_run_where_nothing_else_does():
    assert main(["run", "tiny.yaml", "training.total_steps=null", "training.num_epochs=1"]) == 0

    assert last("runs/tiny") == f"step-{STEPS_PER_EPOCH:08d}"


def test_max_seconds_finish_the_run(monkeypatch, capsys):
    seconds = iter(range(10**6))
    monkeypatch.setattr(assembly, "seconds_since_start", lambda: float(next(seconds)))
    budget = ["training.total_steps=null", "training.max_seconds=40"]
    assert main(["run", "tiny.yaml", *budget]) == 0

    step = int(last("runs/tiny").removeprefix("step-"))
    assert 0 < step < 40
    assert lines("runs/tiny")[-1]["val/loss"] > 0
    capsys.readouterr()
    assert main(["run", "tiny.yaml", *budget]) == 0
    assert "finished" in capsys.readouterr().out
    assert last("runs/tiny") == f"step-{step:08d}"


def test_a_handler_switched_off_is_off():
    off = [f"handlers.{name}=false" for name in ("logs", "loss_ema", "throughput", "evaluation")]

    assert main(["run", "tiny.yaml", *off]) == 0

    assert not Path("runs/tiny/metrics.jsonl").exists()
    assert not Path("runs/tiny/samples.jsonl").exists()
    assert not Path("runs/tiny/tensorboard").exists()
    assert not Path("runs/tiny/checkpoints/best").exists()
    assert last("runs/tiny") == "step-00000012"


def test_observers_do_not_change_the_training(done):
    on = ["handlers.samples=true", "handlers.tensorboard=true", "handlers.progress=true"]

    assert main(["run", "tiny.yaml", *on, "--run-dir", "watched"]) == 0

    assert weights("watched") == weights(done)


def test_the_warmup_that_was_chosen_is_said(capsys):
    assert main(["run", "tiny.yaml", "training.total_steps=2"]) == 0
    assert "warmup_steps: 0, a tenth of the run's 2 steps" in capsys.readouterr().err

    assert main(["run", "tiny.yaml", "training.scheduler=constant", "training.total_steps=2"]) == 0
    assert "warmup_steps" not in capsys.readouterr().err

    assert main(["run", "tiny.yaml", "training.warmup_steps=1", "training.total_steps=2"]) == 0
    assert "a tenth of" not in capsys.readouterr().err


def test_the_end_names_the_next_commands_and_they_work(capsys):
    assert main(["run", "tiny.yaml"]) == 0
    out = capsys.readouterr().out
    assert "Done: 12 steps, 768 tokens" in out

    commands = [
        shlex.split(line, comments=True)[3:] for line in out.splitlines() if "python -m" in line
    ]
    # The text has no T: the prompt is one that its vocabulary has.
    assert commands == [
        ["generate", "runs/tiny", "--prompt", "First"],
        ["evaluate", "runs/tiny"],
        ["report", "runs/tiny"],
        ["run", "tiny.yaml", "training.total_steps=24", "--resume", "runs/tiny"],
    ]
    for command in commands:
        assert main(command) == 0


def test_accumulation_gives_the_loss_of_the_larger_batch(done):
    split = ["data.batch_size=2", "training.accumulation_steps=2", "model.dropout=0.0"]
    assert main(["run", "tiny.yaml", *split, "--run-dir", "two"]) == 0
    assert main(["run", "tiny.yaml", "model.dropout=0.0", "--run-dir", "one"]) == 0

    for a, b in zip(lines("two"), lines("one"), strict=True):
        if "val/loss" in a:
            assert a["val/loss"] == pytest.approx(b["val/loss"], rel=1e-5)


# ---------------------------------------------------------------------- check


def test_check_prints_costs_and_timeline_and_writes_nothing(place, capsys):
    before = listing(place)

    assert main(["check", "tiny.yaml", "training.learning_rate=1e-3"]) == 0

    out = capsys.readouterr().out
    figures = {line[:17].strip(): line[17:] for line in out.splitlines() if line[17:]}
    assert figures["tokens per step"] == "64"
    assert figures["steps per epoch"] == str(STEPS_PER_EPOCH)
    assert figures["steps"] == "12 (768 tokens)"
    assert float(figures["FLOPs"]) > 1e6
    assert "MiB" in figures["memory"]
    assert "ms a step" in figures["time"]
    events = ["ITERATION_COMPLETED", "FLLM_LOG_DUE", "FLLM_CHECKPOINT_DUE"]
    positions = [out.index(f"  {event} ") for event in [*events, "FLLM_EVALUATION_DUE"]]
    assert positions == sorted(positions)
    assert "schedule" in out
    assert listing(place) == before


def test_check_counts_the_parameters_that_the_run_trains(done, capsys):
    capsys.readouterr()
    assert main(["check", "tiny.yaml"]) == 0

    out = capsys.readouterr().out
    manifest_store = CheckpointStore(done / "checkpoints")
    tree = manifest_store.read(manifest_store.directory / "step-00000012")["model"]
    distinct = {(t.data_ptr(), t.shape): t.numel() for t in tree.values()}
    (line,) = [line for line in out.splitlines() if line.startswith("parameters")]
    assert int(line.split()[1].replace(",", "")) == sum(distinct.values())


def test_check_shows_what_a_config_changes(capsys):
    changed = ["handlers.weight_ema=true", "handlers.nan_rollback=false"]

    assert main(["check", "tiny.yaml", *changed]) == 0

    timeline = capsys.readouterr().out.split("firing order:")[1]
    assert "weight_ema" in timeline
    assert "nan_rollback" not in timeline


# ---------------------------------------------------------------------- evaluate


def test_evaluate_reports_the_last_validation_loss(done, capsys):
    best = (done / "checkpoints" / "best").read_text().strip()
    assert best == "step-00000012"

    assert main(["evaluate", "runs/tiny", "--json"]) == 0

    result = json.loads(capsys.readouterr().out)
    expected = [line["val/loss"] for line in lines(done) if "val/loss" in line][-1]
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["step"] == 12
    assert result["num_tokens"] == 99
    # One token of the character tokenizer is one character, and this text is ASCII.
    assert result["bits_per_character"] == pytest.approx(result["loss"] / math.log(2))
    assert result["bits_per_byte"] == pytest.approx(result["bits_per_character"])


def test_evaluate_prints_the_same_figures(done, capsys):
    assert main(["evaluate", "runs/tiny", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)

    assert main(["evaluate", "runs/tiny"]) == 0

    out = capsys.readouterr().out
    assert f"loss                {result['loss']:.4f} nats per token" in out
    assert "validation split" in out
    assert "step-00000012" in out


@pytest.mark.parametrize("name", ["", "step-00000004", "best", "last"])
def test_evaluate_takes_a_run_a_checkpoint_or_a_pointer(done, capsys, name):
    path = done / "checkpoints" / name if name else done

    assert main(["evaluate", str(path), "--json"]) == 0

    step = json.loads(capsys.readouterr().out)["step"]
    assert step == (4 if "4" in name else 12)


def test_evaluate_on_another_text(done, capsys):
    Path("other.txt").write_text(TEXT.read_text()[:50])

    assert main(["evaluate", "runs/tiny", "--data", "other.txt", "--json"]) == 0

    result = json.loads(capsys.readouterr().out)
    assert result["num_tokens"] == 49
    assert result["data"] == "other.txt"


def evaluated(capsys, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", "runs/tiny", "--json", *options]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_evaluate_measures_each_part_of_the_split(done, capsys):
    text = TEXT.read_text()
    begin = int(0.9 * len(text))
    for part, own in (("train", text[:begin]), ("val", text[begin:])):
        Path("part.txt").write_text(own)
        result = evaluated(capsys, "--split", part)
        expected = evaluated(capsys, "--data", "part.txt")
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert result["num_tokens"] == len(own) - 1
    assert main(["evaluate", "runs/tiny", "--split", "test"]) == 3
    assert "there is nothing to evaluate" in capsys.readouterr().err


def test_evaluate_counts_the_text_itself_or_says_that_it_cannot(place, capsys):
    """A tokenizer that leaves characters out of what it decodes must not make texts shorter."""
    Path("text.txt").write_text(TEXT.read_text().lower())
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=60, special_tokens=["<unk>"], show_progress=False
    )
    library.train(["text.txt"], trainer)
    library.save("words.json")
    tokenizer = "data.tokenizer={name: file, path: words.json}"
    split = "data.split=[0.5, 0.5, 0.0]"
    assert main(["run", "tiny.yaml", "data.sequence_length=8", tokenizer, split]) == 0
    whole = evaluated(capsys, "--data", "text.txt")
    text = Path("text.txt").read_text()
    assert len(text) - 10 <= whole["num_characters"] < len(text)
    assert whole["bits_comparable"] is True
    val = evaluated(capsys)
    assert val["bits_comparable"] is False
    for options, noted in (([], True), (["--data", "text.txt"], False)):
        assert main(["evaluate", "runs/tiny", *options]) == 0
        assert ("not compare them with those of other" in capsys.readouterr().out) == noted


def test_evaluate_knows_a_text_that_the_tokenizer_leaves_as_it_is(place, capsys):
    tokenizer = "data.tokenizer={name: character, unknown: skip}"
    assert main(["run", "tiny.yaml", tokenizer]) == 0
    assert evaluated(capsys)["bits_comparable"] is True
    Path("other.txt").write_text("First \u4f60\u597d\u4f60 line")
    other = evaluated(capsys, "--data", "other.txt", "--document-separator", "\n")
    assert (other["num_tokens"], other["num_characters"], other["num_bytes"]) == (10, 13, 19)


def test_evaluate_with_a_stride_predicts_from_more(done, capsys):
    plain, full = evaluated(capsys), evaluated(capsys, "--stride", "1")
    assert (plain["stride"], full["stride"]) == (16, 1)
    assert full["num_tokens"] == plain["num_tokens"]
    assert full["loss"] != plain["loss"]
    assert evaluated(capsys, "--stride", "16") == plain
    assert main(["evaluate", "runs/tiny", "--stride", "4"]) == 0
    assert "windows             of 16 tokens, one every 4" in capsys.readouterr().out
    for stride in ("0", "17"):
        assert main(["evaluate", "runs/tiny", "--stride", stride]) == 2
        assert "1 to 16, the context length" in capsys.readouterr().err


def test_evaluate_documents_of_a_folder(done, capsys):
    whole = TEXT.read_text()
    Path("texts").mkdir()
    texts = {"a.txt": whole[:30], "b.txt": whole[30:31], "c.md": whole[31:120]}
    for name, text in texts.items():
        Path("texts", name).write_text(text)
    result = evaluated(capsys, "--data", "texts", "--documents")
    names = [Path(document["name"]).name for document in result["documents"]]
    assert names == ["a.txt", "c.md"]
    assert result["documents_too_short"] == 1
    assert result["num_tokens"] == 29 + 88
    total = 0.0
    for document in result["documents"]:
        alone = evaluated(capsys, "--data", document["name"])
        for key in ("loss", "perplexity", "bits_per_byte", "num_tokens", "num_bytes"):
            assert document[key] == pytest.approx(alone[key], rel=1e-6), key
        total += document["loss"] * document["num_tokens"]
    assert result["loss"] == pytest.approx(total / (29 + 88))
    assert main(["evaluate", "runs/tiny", "--data", "texts", "--documents"]) == 0
    out = capsys.readouterr().out
    assert "2 documents, each evaluated separately; 1 without a token to predict left out" in out
    assert out.splitlines()[-1].split()[0] == "88"
    assert out.splitlines()[-1].endswith(names[-1])
    assert "documents" not in evaluated(capsys, "--data", "texts")


def test_evaluate_documents_between_separators(done, capsys):
    Path("many.txt").write_text("First\nline\n\nSecond\n\n\n\nFirst\n")
    result = evaluated(capsys, "--data", "many.txt", "--document-separator", "\n\n")
    found = [(one["name"], one["num_tokens"]) for one in result["documents"]]
    assert found == [("many.txt:1", 11), ("many.txt:4", 9), ("many.txt:8", 5)]
    Path("one.txt").write_text("Second\n\n\n\n")
    alone = evaluated(capsys, "--data", "one.txt")
    assert result["documents"][1]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_evaluate_names_the_document_that_cannot_be_encoded(done, capsys):
    Path("many.txt").write_text("First\n\nSeconé\n")
    options = ["--data", "many.txt", "--document-separator", "\n\n"]
    assert main(["evaluate", "runs/tiny", *options]) == 3
    assert "many.txt:3: character 5 of the text" in capsys.readouterr().err


def test_evaluate_takes_the_validation_split_apart(done, capsys):
    text = TEXT.read_text()
    begin = int(0.9 * len(text))
    result = evaluated(capsys, "--documents", "--document-separator", "\n")
    pieces = re.findall(r"[^\n]*\n+|[^\n]+$", text[begin:])
    assert [one["num_tokens"] + 1 for one in result["documents"]] == [len(p) for p in pieces]
    last = result["documents"][-1]
    assert last["name"] == f"text.txt:{text.count(chr(10), 0, text.rindex(pieces[-1])) + 1}"
    Path("line.txt").write_text(pieces[-1])
    assert last["loss"] == pytest.approx(evaluated(capsys, "--data", "line.txt")["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--document-separator", ""], "--document-separator is empty"),
        (["--split", "val", "--data", "text.txt"], "--data names another"),
    ],
)
def test_evaluate_refuses_options_that_say_nothing(done, capsys, options, message):
    assert main(["evaluate", "runs/tiny", *options]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_and_generate_write_nothing(done, place):
    before = listing(place)

    assert main(["evaluate", "runs/tiny"]) == 0
    assert main(["generate", "runs/tiny", "--max-tokens", "3"]) == 0

    assert listing(place) == before


def test_evaluate_uses_averaged_weights_where_they_are_on(capsys):
    assert main(["run", "tiny.yaml", "handlers.weight_ema.decay=0.5"]) == 0
    capsys.readouterr()

    assert main(["evaluate", "runs/tiny/checkpoints/last", "--json"]) == 0

    result = json.loads(capsys.readouterr().out)
    expected = [line["val/loss"] for line in lines("runs/tiny") if "val/loss" in line][-1]
    assert result["averaged_weights"] is True
    assert result["loss"] == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------- generate


def test_generate_tells_what_it_copies(done, capsys):
    command = ["generate", "runs/tiny", "--max-tokens", "40", "--num-samples", "2"]
    assert main([*command, "--check-copying"]) == 0
    out = capsys.readouterr().out
    assert main(command) == 0
    texts, table = out.split("\n\n" + 16 * " ")
    assert capsys.readouterr().out.rstrip() == texts.rstrip()
    rows = [line.split() for line in table.splitlines()[1:7]]
    assert [row[:2] for row in rows] == [
        *(["sample", str(number)] for number in (1, 2)),
        *(["validation", str(number)] for number in (1, 2, 3, 4)),
    ]
    assert all(1 <= int(row[2]) <= 40 for row in rows)
    assert all(re.fullmatch(r"\S+\.txt:\d+:\d+", row[5]) for row in rows)


def test_generate_is_the_same_for_a_seed(done, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", "runs/tiny", "--max-tokens", "40", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)

    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 41


def test_generate_continues_the_prompt(done, capsys):
    assert main(["generate", "runs/tiny", "--prompt", "the ", "--max-tokens", "10"]) == 0

    out = capsys.readouterr().out
    assert out.startswith("the ")
    assert len(out) == 4 + 10 + 1


def test_temperature_0_is_greedy_whatever_the_seed(done, capsys):
    texts = set()
    for options in (["--seed", "1"], ["--seed", "2"], ["--top-k", "1", "--temperature", "1"]):
        greedy = [] if "--top-k" in options else ["--temperature", "0"]
        assert main(["generate", "runs/tiny", "--max-tokens", "20", *greedy, *options]) == 0
        texts.add(capsys.readouterr().out)

    assert len(texts) == 1


def test_generate_several_samples(done, capsys):
    assert main(["generate", "runs/tiny", "--max-tokens", "20", "--num-samples", "2"]) == 0

    first, second = capsys.readouterr().out.split("--- sample 2 ---\n")
    assert first.removeprefix("--- sample 1 ---\n") != second


def test_each_sample_of_a_batch_is_the_text_of_its_own_seed(done, capsys):
    """17 of them, which do not fit into one batch."""
    rules = ["--prompt", "the ", "--max-tokens", "30", "--min-p", "0.02"]
    rules += ["--repetition-penalty", "1.2", "--stop", "e", "--stop", "o\n"]
    alone = []
    for seed in range(5, 22):
        assert main(["generate", "runs/tiny", *rules, "--seed", str(seed)]) == 0
        alone.append(capsys.readouterr().out)

    assert main(["generate", "runs/tiny", *rules, "--seed", "5", "--num-samples", "17"]) == 0

    together = re.split(r"--- sample \d+ ---\n", capsys.readouterr().out)
    assert together == ["", *alone]
    assert len(set(alone)) > 10
    for text in alone:
        assert "e" not in text.removeprefix("the ")


def test_a_prompt_longer_than_the_context_is_no_obstacle(done, capsys):
    prompt = "the " * 20

    assert main(["generate", "runs/tiny", "--prompt", prompt, "--max-tokens", "3"]) == 0

    assert capsys.readouterr().out.startswith(prompt)


def test_a_prompt_outside_the_vocabulary_is_refused(done, capsys):
    assert main(["generate", "runs/tiny", "--prompt", "\N{GREEK SMALL LETTER PI}"]) == 3

    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\N{GREEK SMALL LETTER PI}" in captured.err or "03c0" in captured.err.lower()
