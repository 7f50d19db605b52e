"""What `check` measures: the step that `run` would take, and nothing of the run is changed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fundamentallm.compute import compilation
from fundamentallm.engine.cli import main
from fundamentallm.engine.tuning import measuring
from fundamentallm.engine.wiring import assemble
from fundamentallm.training.step import TrainStep

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2}
training: {total_steps: 12}
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fundamentallm.engine.check._SECONDS", 0.1)  # of steps that it times
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG)


@pytest.fixture
def steps(monkeypatch) -> list[tuple[int, TrainStep]]:
    """Each step that is taken: its micro-batches, and what takes it."""
    taken = []
    real = TrainStep.__call__

    def noting(self, window, num_tokens, num_sequences):
        taken.append((len(window.micro_batches), self))
        return real(self, window, num_tokens, num_sequences)

    monkeypatch.setattr(TrainStep, "__call__", noting)
    return taken


def test_it_is_the_step_of_the_run(steps, capsys):
    words = [
        "training.optimizer=lion",
        "training.precision=bf16",
        "training.attention=flash",
        "training.accumulation_steps=2",
        "training.max_grad_value=0.5",
        "training.loss={name: cross_entropy, label_smoothing: 0.1}",
    ]
    assert main(["check", "tiny.yaml", *words]) == 0

    step = steps[-1][1]
    assert type(step.optimizer).__name__ == "Lion"
    assert (step.precision.name, step.precision.bf16_weights) == ("bf16", True)
    assert (step.max_grad_norm, step.max_grad_value) == (1.0, 0.5)
    assert step.loss_fn.label_smoothing == 0.1
    assert {block.attention.kernel for block in step.model.blocks} == {"flash"}
    numbers = [number for number, _ in steps]
    assert numbers[:5] == [1, 1, 2, 2, 2]  # two to warm up, whole steps then
    assert set(numbers[5:]) <= {2}
    out = capsys.readouterr().out
    assert re.search(r"tokens per step  128\n", out)
    assert re.search(r"time             about .* \([\d,]+ ms a step, [\d,]+ tokens/s\)\n", out)
    assert not Path("runs").exists()


@pytest.mark.parametrize(("choice", "compiled"), [("auto", False), ("true", True)])
def test_what_a_run_would_choose_by_measuring_begins_without_compiled_code(
    steps, monkeypatch, choice, compiled
):
    monkeypatch.setattr(compilation, "find_compiler", lambda: "g++")
    # In place of the compiler, which takes long: the code as it is.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert main(["check", "tiny.yaml", f"training.compile={choice}"]) == 0
    runner = steps[-1][1].model.run_block
    assert isinstance(runner, compilation.CompiledBlocks) is compiled


def test_the_first_steps_of_a_busy_machine_are_not_the_figure(monkeypatch, capsys):
    real, whole, now = TrainStep.__call__, [], [0.0]

    def on_a_busy_machine(self, window, num_tokens, num_sequences):
        now[0] += 0.01
        if len(window.micro_batches) == 2:
            whole.append(window)
            if len(whole) <= 2:  # another process has the processor
                now[0] += 0.3
        return real(self, window, num_tokens, num_sequences)

    monkeypatch.setattr("fundamentallm.engine.check._SECONDS", 1.0)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(TrainStep, "__call__", on_a_busy_machine)
    assert main(["check", "tiny.yaml", "training.accumulation_steps=2"]) == 0
    assert "(10 ms a step, " in capsys.readouterr().out
    assert len(whole) == 40  # which take the second


def test_a_clock_that_ends_the_run_bounds_its_time(capsys):
    words = ["training.total_steps=1000000000", "training.max_seconds=120"]
    assert main(["check", "tiny.yaml", *words]) == 0
    assert re.search(r"time +(0:)?0?2:00 \(", capsys.readouterr().out)


def test_a_run_that_only_the_clock_ends_is_told_the_steps_that_it_has_time_for(capsys):
    words = ["training.total_steps=null", "training.max_seconds=120"]
    assert main(["check", "tiny.yaml", *words]) == 0
    out = capsys.readouterr().out
    steps, tokens = re.search(r"steps +at most about ([\d,]+) \(([\d,]+) tokens\)\n", out).groups()
    per_second = re.search(r"ms a step, ([\d,]+) tokens/s", out)[1]
    steps, tokens, per_second = (int(word.replace(",", "")) for word in (steps, tokens, per_second))
    assert tokens == 64 * steps
    assert tokens == pytest.approx(120 * per_second, rel=0.01)


def test_it_times_what_auto_chooses(steps, monkeypatch, capsys):
    def choose(written, resolved, plan, loader):
        assert written.training.precision == "auto"
        return dataclasses.replace(plan, precision="bf16"), ["chosen here"]

    monkeypatch.setattr(assemble, "choose_auto", choose)
    words = ["training.precision=auto", "training.total_steps=1000"]
    assert main(["check", "tiny.yaml", *words]) == 0
    assert steps[-1][1].precision.name == "bf16"
    said = capsys.readouterr()
    assert "chosen here" in said.out + said.err
    assert re.search(r"device +cpu, bf16\n", said.out)


def test_the_flops_of_examples_are_those_of_all_tokens_that_are_computed(capsys):
    rows = [{"prompt": "a" * 14, "response": "b"}] * 40
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["data.source=rows.jsonl", "data.sequence_length=32", "training.total_steps=10"]
    assert main(["check", "tiny.yaml", *words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"tokens per step  8 that count, 128 computed\n", out)
    per_step = float(re.search(r"FLOPs +(\S+)", out)[1]) / 10
    text = ["data.sequence_length=32", "training.total_steps=10", "data.tokenizer=byte"]
    assert main(["check", "tiny.yaml", *text, "model.vocab_size=300"]) == 0
    assert main(["check", "tiny.yaml", *words, "data.tokenizer=byte", "model.vocab_size=300"]) == 0
    of_text, of_rows = re.findall(r"FLOPs +(\S+)", capsys.readouterr().out)
    assert of_text == of_rows  # the same shape costs the same
    assert per_step > 0
