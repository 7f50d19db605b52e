"""A run that is stopped and resumed on another number of ranks each time, against one on one rank.

Real processes over gloo, started by the command as a launcher starts them; all in float64.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests import forked

STEPS = 12
# An epoch is 4 steps of 12 rows and one of 5: ranks have unequal rows there, or none.
CONFIG = """
name: elastic
data: {source: text.txt, tokenizer: byte, sequence_length: 16, batch_size: 1, global_batch: 12}
model: {d_model: 16, num_layers: 1, num_heads: 2, dropout: 0.0}
training: {total_steps: 12, warmup_steps: 2, learning_rate: 0.01, log_steps: 1, eval_steps: 4}
handlers: {course: true, weight_ema: {decay: 0.9}, samples: false, tensorboard: false}
parallel: {patience: {step: 30, save: 60}}
plugins: [course]
"""
COURSE = '''
"""Computes in float64, writes down what each rank reads and learns, and stops at a step."""
import json, os, signal
from pathlib import Path

import torch
from ignite.engine import Events

from fundamentallm.training.handlers import HANDLERS

torch.set_default_dtype(torch.float64)


@HANDLERS.register("course")
class Course:
    def __init__(self, run_dir):
        self.run_dir = run_dir

    def attach(self, trainer):
        trainer.add_event_handler(Events.STARTED, self.begin)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.note)

    def begin(self, trainer):
        if trainer.state.iteration == 0 and "SKIP" in os.environ:
            trainer.interventions.skip([int(os.environ["SKIP"])])

    def note(self, trainer):
        step, rank = trainer.state.iteration, trainer.ranks.rank
        line = {
            "step": step,
            "ranks": trainer.ranks.world_size,
            "rejection": trainer.state.output.rejection,
            "loss": trainer.state.output.loss,
            "norm": trainer.state.output.grad_norm,
            "rows": [
                [ids for ids, targets in zip(m["input_ids"].tolist(), m["target_ids"].tolist())
                 if max(targets) >= 0]
                for m in trainer.window.micro_batches
            ],
        }
        path = Path(str(self.run_dir) + f".rank-{rank}.jsonl")
        with path.open("a") as file:
            file.write(json.dumps(line) + "\\n")
        if str(step) == os.environ.get("STOP_AT"):
            os.kill(os.getpid(), signal.SIGTERM)
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    chance = random.Random(3)
    words = ("alpha", "beta", "gamma", "delta", "once", "upon")
    text = " ".join(chance.choice(words) for _ in range(400))
    (tmp_path / "text.txt").write_text(text[: 16 * 53 * 10 // 9 + 20])
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "course.py").write_text(COURSE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


def start(ranks: int, *words: str, **variables: str) -> tuple[set[int], str]:
    """Run the command on so many ranks; return their exit codes and what the first one said."""
    places = forked.rank_environments(ranks) if ranks > 1 else [{}]
    commands = [(["run", "c.yaml", *words], {**place, **variables}) for place in places]
    results = forked.run_all(commands, Path())
    return {result.returncode for result in results}, results[0].stderr


@dataclass
class Course:
    """What a run did, step by step.

    Attributes:
        order: a hash over the sequences of all steps, in order.
        steps: by step, the lines of its ranks.
        validation: losses by step.
    """

    order: str
    steps: list[list[dict[str, Any]]]
    validation: dict[int, float]

    @property
    def ranks(self) -> list[int]:
        return [len(lines) for lines in self.steps]

    def of_first_rank(self, name: str) -> list[Any]:
        return [lines[0][name] for lines in self.steps]


def course(run: str) -> Course:
    by_step: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(Path().glob(f"{run}.rank-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            by_step.setdefault(line["step"], []).append(line)
    assert sorted(by_step) == list(range(1, STEPS + 1))
    digest = hashlib.sha256()
    for step in sorted(by_step):
        lines = by_step[step]
        assert {line["ranks"] for line in lines} == {len(lines)}  # no step was taken twice
        for together in zip(*(line["rows"] for line in lines), strict=True):
            for row in (row for rows in together for row in rows):
                digest.update(json.dumps(row).encode())
        digest.update(b"step")
    metrics = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    validation = {line["step"]: line["val/loss"] for line in metrics if "val/loss" in line}
    return Course(digest.hexdigest(), [by_step[s] for s in sorted(by_step)], validation)


def agree(found: Course, whole: Course) -> None:
    """Check that a run read what another one did, and learned the same."""
    assert found.order == whole.order
    assert found.of_first_rank("rejection") == whole.of_first_rank("rejection")
    for name in ("loss", "norm"):
        assert found.of_first_rank(name) == pytest.approx(
            whole.of_first_rank(name), rel=1e-12, abs=0, nan_ok=True
        ), name
    assert found.validation == pytest.approx(whole.validation, rel=1e-12, abs=0)
    assert list(found.validation) == list(whole.validation)


def go_through(stages: list[tuple[int, int, int]], **variables: str) -> Course:
    """Run (ranks, last step, rows of a micro-batch) in turn, each resuming what the last left."""
    for number, (ranks, last, batch_size) in enumerate(stages):
        # Several ranks agree on a signal in the step after it.
        stop = {"STOP_AT": str(last - (ranks > 1))} if last < STEPS else {}
        words = (f"data.batch_size={batch_size}", "--run-dir", "split")
        codes, said = start(ranks, *words, **stop, **(variables if number == 0 else {}))
        assert codes == {143 if stop else 0}, said
        if number:
            before = stages[number - 1]
            assert f"continuing split from step {before[1]}" in said
            assert (before[0] != ranks) == (
                f"a step was {before[0]} rank" in said and "equal to rounding" in said
            )
    return course("split")


def test_one_rank_then_two(place: Path) -> None:
    assert start(1, "--run-dir", "whole")[0] == {0}
    found = go_through([(1, 2, 4), (2, 12, 3)])
    assert found.ranks == [1] * 2 + [2] * 10
    agree(found, course("whole"))


@pytest.mark.long
def test_one_rank_then_two_then_four_then_one(place: Path) -> None:
    """A step batch that is to be left out is left out on any number of ranks."""
    assert start(1, "--run-dir", "whole", SKIP="8")[0] == {0}
    found = go_through([(1, 3, 2), (2, 6, 2), (4, 9, 1), (1, 12, 6)], SKIP="8")
    whole = course("whole")
    assert found.ranks == [1] * 3 + [2] * 3 + [4] * 3 + [1] * 3
    assert whole.of_first_rank("rejection") == [""] * 7 + ["ledger"] + [""] * 4
    agree(found, whole)
