"""What `tune` promises: a table, a file that runs, the same steps, and nothing else touched."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tests import forked

from fundamentallm.compute.compilation import find_compiler
from fundamentallm.compute.plan import Plan
from fundamentallm.config import load_config
from fundamentallm.engine.cli import main
from fundamentallm.engine.tuning import tune as tune_module
from fundamentallm.engine.tuning.measuring import Measurement, failed

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny   # a small one
data:
  source: text.txt
  sequence_length: 16
  batch_size: 4
model: {d_model: 16, num_layers: 1, num_heads: 2}
training:
  learning_rate: 1e-2
  precision: auto  # let it choose
  total_steps: 12
handlers: {tensorboard: false, samples: false, progress: false}
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fundamentallm.engine.check._SECONDS", 0.1)  # of steps that it times
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG)
    return tmp_path


class Machine:
    """A machine whose times are a formula, in place of processes that measure."""

    def __init__(self) -> None:
        self.configs = []
        self.rows = []

    def cost(self, setting: Plan) -> Measurement:
        if setting.attention == "flash" and setting.bf16_weights:
            return failed("out of memory")
        seconds = 0.5 if setting.compile else 1.0
        seconds *= 0.5 if setting.precision == "bf16" else 1.0
        seconds *= 1 + abs(math.log2(setting.batch_size / 2))
        seconds *= 1.5 if setting.threads else 1.0
        seconds *= 1.2 if setting.attention == "explicit" else 1.0
        return Measurement(seconds, 9.0 if setting.compile else 0.0, 300 << 20)

    def __call__(self, config, plan, rows, plugins, seconds, patience) -> Measurement:
        self.configs.append(plan.applied_to(config))
        self.rows.append(rows)
        return self.cost(plan)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(tune_module, "measure_in_process", machine)
    monkeypatch.setattr(tune_module, "find_compiler", lambda: "/usr/bin/g++")
    return machine


def test_the_winner_is_written_into_a_copy_of_the_file(machine, capsys):
    assert main(["tune", "tiny.yaml"]) == 0

    text = Path("tiny.tuned.yaml").read_text()
    assert "name: tiny   # a small one\n" in text
    assert "  precision: bf16  # let it choose\n" in text
    config = load_config("tiny.tuned.yaml")
    assert config.training.compile is True
    assert (config.data.batch_size, config.training.accumulation_steps) == (2, 2)
    assert Path("tiny.yaml").read_text() == CONFIG
    written = capsys.readouterr().out
    assert "python -m fundamentallm run tiny.tuned.yaml" in written
    assert "8.00 times as fast as the settings of the file" in written


def test_native_code_is_a_candidate_where_the_block_is_known(machine, capsys):
    known = ["model.d_model=64", "data.sequence_length=32", "model.d_ff=96"]
    assert main(["tune", "tiny.yaml", *known]) == 0
    tried = [c.training for c in machine.configs if c.training.compile == "native"]
    assert tried
    assert {(t.precision, t.bf16_weights) for t in tried} == {("bf16", False), ("fp32", False)}
    assert "native" in capsys.readouterr().out
    machine.configs.clear()
    assert main(["tune", "tiny.yaml"]) == 0
    assert "native" not in {c.training.compile for c in machine.configs}


@pytest.mark.parametrize("kept", ["precision", "compile"])
def test_what_is_kept_rules_native_code_out(machine, kept):
    words = ["model.d_model=64", "data.sequence_length=32", "model.d_ff=96"]
    words += ["training.precision=bf16", "training.bf16_weights=true"]
    assert main(["tune", "tiny.yaml", *words, "--keep", kept]) == 0
    assert "native" not in {c.training.compile for c in machine.configs}


def test_native_code_that_is_kept_is_the_only_kind(machine):
    words = ["model.d_model=64", "data.sequence_length=32", "model.d_ff=96"]
    words += ["training.precision=bf16", "training.compile=native"]
    assert main(["tune", "tiny.yaml", *words, "--keep", "compile"]) == 0
    found = {(c.training.compile, c.training.precision) for c in machine.configs}
    assert found == {("native", "bf16"), ("native", "fp32")}


def test_native_code_that_wins_is_written(machine, monkeypatch):
    monkeypatch.setattr(
        machine,
        "cost",
        lambda setting: Measurement(0.1 if setting.compile == "native" else 1.0, 3.0),
    )
    known = ["model.d_model=64", "data.sequence_length=32", "model.d_ff=96"]
    assert main(["tune", "tiny.yaml", *known]) == 0
    training = load_config("tiny.tuned.yaml").training
    assert (training.compile, training.precision) == ("native", "bf16")


def test_the_table_shows_every_candidate_and_marks_the_winner(machine, capsys):
    main(["tune", "tiny.yaml"])

    written = capsys.readouterr().out
    progress, ranking = written.split("The fastest first:")
    assert progress.count("out of memory") >= 1
    assert progress.count("x 1") + progress.count("x 2") + progress.count("x 4") == len(
        machine.configs
    )
    assert "out of memory" not in ranking
    (chosen,) = [line for line in ranking.splitlines() if "<- chosen" in line]
    # 64 tokens in a quarter of a second
    assert chosen.split()[-7:] == ["256", "300", "MiB", "9.0", "s", "<-", "chosen"]
    assert ranking.splitlines()[3] == chosen
    assert "tokens/s" in progress
    assert "memory" in progress


def test_all_candidates_take_the_same_step(machine):
    main(["tune", "tiny.yaml", "training.accumulation_steps=3"])

    assert len({config.data.batch_size for config in machine.configs}) > 1
    for config, rows in zip(machine.configs, machine.rows, strict=True):
        assert config.data.batch_size * config.training.accumulation_steps == 12
        assert rows["input_ids"].shape == (12, 16)


def test_with_a_global_batch_accumulation_follows_in_the_new_file(machine):
    assert main(["tune", "tiny.yaml", "data.global_batch=12"]) == 0

    written = load_config("tiny.tuned.yaml")
    assert (written.data.batch_size, written.data.global_batch) == (2, 12)
    assert "accumulation_steps" not in written.training.model_fields_set
    assert {c.data.batch_size * c.training.accumulation_steps for c in machine.configs} == {12}
    assert main(["check", "tiny.tuned.yaml"]) == 0


def test_an_accumulation_beside_a_global_batch_agrees_in_the_new_file(machine):
    words = ["data.global_batch=12", "training.accumulation_steps=3"]
    assert main(["tune", "tiny.yaml", *words]) == 0
    assert load_config("tiny.tuned.yaml").training.accumulation_steps == 6


COUNTING = """
import __main__

if hasattr(__main__, "measure"):  # of the process that measures
    __main__.measure = lambda config, plan, windows, seconds: __main__.failed(
        f"{[len(window.micro_batches) for window in windows]} micro-batches"
    )
"""


@pytest.mark.long
def test_a_step_of_a_global_batch_is_measured_whole(capsys, monkeypatch, place):
    """Accumulation is not in the file from which the measuring process reads."""
    Path("counting.py").write_text(COUNTING)
    monkeypatch.syspath_prepend(place)
    words = ["data.global_batch=12", "plugins=[counting]", "training.precision=fp32"]
    kept = ["--keep", "precision", "compile", "attention", "micro-batch", "threads"]
    assert main(["tune", "tiny.yaml", *words, *kept]) == 5
    assert "[3] micro-batches" in capsys.readouterr().err


def test_the_written_file_runs_to_the_same_loss(machine, monkeypatch):
    """The settings change how a step is computed: at full precision, not its loss."""
    keep = ["--keep", "precision", "compile"]
    assert main(["tune", "tiny.yaml", "training.precision=fp32", *keep]) == 0
    assert main(["run", "tiny.yaml", "training.precision=fp32", "--run-dir", "a"]) == 0
    assert main(["run", "tiny.tuned.yaml", "--run-dir", "b"]) == 0

    assert load_config("tiny.tuned.yaml").data.batch_size == 2
    losses = [
        [line for line in Path(run, "metrics.jsonl").read_text().splitlines() if "val/loss" in line]
        for run in "ab"
    ]
    for one, other in zip(*losses, strict=True):
        assert yaml.safe_load(one)["val/loss"] == pytest.approx(
            yaml.safe_load(other)["val/loss"], rel=1e-5
        )


def test_overrides_are_in_the_new_file(machine):
    main(["tune", "tiny.yaml", "model.num_layers=2", "data.sequence_length=8", "name=other"])

    config = load_config("tiny.tuned.yaml")
    assert (config.name, config.model.num_layers, config.data.sequence_length) == ("other", 2, 8)


def test_what_is_kept_is_left_as_the_file_has_it(machine):
    main(["tune", "tiny.yaml", "--keep", "precision", "micro-batch", "threads"])

    config = load_config("tiny.tuned.yaml")
    # Not "auto" as in the file: the run would choose, and not necessarily what was measured.
    assert config.training.precision == "fp32"
    assert config.data.batch_size == 4
    assert config.training.compile is True
    assert {c.training.precision for c in machine.configs} == {"fp32"}


def test_a_kept_kernel_is_the_one_that_was_measured(machine):
    main(["tune", "tiny.yaml", "training.precision=fp32", "--keep", "attention"])

    written = load_config("tiny.tuned.yaml").training
    assert {c.training.attention for c in machine.configs} == {"flash"}
    assert written.attention == "flash"  # with "auto", bf16 would have taken another


def test_documents_apart_are_not_compiled_to_no_effect(machine):
    text = CONFIG.replace("source: text.txt", "source: prepared\n  packing: document")
    Path("tiny.yaml").write_text(text)
    words = ["text.txt", "--tokenizer", "character", "--out", "prepared"]
    assert main(["prepare", *words]) == 0
    assert main(["tune", "tiny.yaml"]) == 0
    assert {c.training.compile for c in machine.configs} == {False}
    assert {c.training.attention for c in machine.configs} == {"flash"}


def test_a_conflicting_field_is_settled(machine):
    Path("tiny.yaml").write_text(CONFIG.replace("precision: auto", "mixed_precision: true"))
    machine.cost = lambda setting: Measurement(1.0 if setting.precision == "fp32" else 2.0)

    assert main(["tune", "tiny.yaml"]) == 0

    training = load_config("tiny.tuned.yaml").training
    assert (training.precision, training.mixed_precision) == ("fp32", False)


def test_no_run_is_left_behind_and_files_are_not_overwritten(machine):
    main(["tune", "tiny.yaml"])
    main(["tune", "tiny.yaml"])
    assert {p.name for p in Path().iterdir()} == {
        "text.txt", "tiny.yaml", "tiny.tuned.yaml", "tiny.tuned-2.yaml"
    }  # fmt: skip


def test_a_file_of_ones_own_is_refused_before_anything_is_measured(machine, capsys):
    assert main(["tune", "tiny.yaml", "--out", "text.txt"]) == 2
    assert "the output file exists already" in capsys.readouterr().err
    assert main(["tune", "tiny.yaml", "--out", "nowhere/new.yaml"]) == 5
    assert machine.configs == []
    assert main(["tune", "tiny.yaml", "--out", "new.yaml"]) == 0
    assert Path("new.yaml").exists()


def test_a_fault_of_the_file_is_told_as_by_run(machine, capsys):
    Path("tiny.yaml").write_text(CONFIG + "seeed: 3\n")
    assert main(["tune", "tiny.yaml"]) == 2
    assert "seeed" in capsys.readouterr().err


def test_where_nothing_works_nothing_is_written(machine, capsys):
    machine.cost = lambda setting: failed("out of memory")
    assert main(["tune", "tiny.yaml"]) == 5
    assert "no setting could be measured" in capsys.readouterr().err
    assert not Path("tiny.tuned.yaml").exists()


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_no_time_is_refused(machine, seconds, capsys):
    assert main(["tune", "tiny.yaml", "--seconds", seconds]) == 2
    assert "--seconds" in capsys.readouterr().err


def test_when_the_time_is_up_the_best_so_far_is_written(machine, monkeypatch, capsys):
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr(tune_module.time, "monotonic", lambda: float(next(now)))
    assert main(["tune", "tiny.yaml", "--seconds", "450"]) == 0
    assert len(machine.configs) == 4
    assert "the time is used up" in capsys.readouterr().out
    assert load_config("tiny.tuned.yaml").training.precision == "bf16"


@pytest.mark.parametrize("after", [0, 3])
def test_ctrl_c_ends_the_search_with_the_best_so_far(machine, after, capsys):
    cost = machine.cost

    def interrupted(setting):
        if len(machine.configs) > after:
            raise KeyboardInterrupt
        return cost(setting)

    machine.cost = interrupted
    assert main(["tune", "tiny.yaml"]) == 130
    assert Path("tiny.tuned.yaml").exists() == (after > 0)
    if after:
        assert "interrupted" in capsys.readouterr().out
        assert load_config("tiny.tuned.yaml").training.precision == "bf16"


def test_ranks_are_refused(machine, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["tune", "tiny.yaml"]) == 5
    assert "without torchrun" in capsys.readouterr().err


# Each waits until a measuring process has started.
@pytest.mark.parametrize(
    "stop",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, marks=pytest.mark.long),
    ],
)
def test_nothing_is_left_of_a_tune_that_was_stopped(stop, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with Path(os.devnull).open("r+") as nothing:
        streams = [nothing.fileno()] * 3
        environment = {**os.environ, "TMPDIR": str(scratch)}
        process = forked.Forked(["tune", "tiny.yaml"], streams, environment)
    try:
        wait_until(lambda: children(process.pid))
        (child,) = children(process.pid)
        process.send_signal(stop)
        process.wait(timeout=forked.SECONDS)
    finally:
        process.kill()
    wait_until(lambda: not Path(f"/proc/{child}").exists())
    if stop != signal.SIGKILL:
        assert process.returncode == 128 + stop
        assert list(scratch.glob("fundamentallm-*")) == []
    assert not Path("tiny.tuned.yaml").exists()


def children(process: int) -> list[int]:
    names = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for name in names for child in name.read_text().split()]


def wait_until(arrived: Callable[[], object], seconds: float = forked.SECONDS) -> None:
    end = time.monotonic() + seconds
    while not arrived():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.long
def test_real_processes_and_a_run_of_what_they_found(capsys):
    keep = ["--keep", "attention", "micro-batch", "threads"]
    if find_compiler() is None:
        keep.append("compile")
    assert main(["tune", "tiny.yaml", "training.threads=1", "--seconds", "60", *keep]) == 0

    table = capsys.readouterr().out
    assert "bf16 autocast" in table
    assert "MiB" in table
    assert torch.get_num_threads() >= 1
    assert main(["run", "tiny.tuned.yaml"]) == 0
