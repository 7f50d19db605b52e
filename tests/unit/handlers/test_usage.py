"""What a run spends is counted once, phase by phase."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import Checkpointing, Evaluation, Samples, Usage
from fundamentallm.training.trainer import Trainer

TAKES = {
    TrainingEvents.FLLM_OPTIMIZER_STEPPED: 2.0,
    TrainingEvents.FLLM_CHECKPOINT_DUE: 10.0,
    TrainingEvents.FLLM_EVALUATION_STARTED: 100.0,
    TrainingEvents.FLLM_TEXT_SAMPLED: 1000.0,
}


def make_trainer(directory: Path, seconds: float = 1e9, start: float = 0.5) -> Trainer:
    """Four steps and two evaluations, in which each event takes its own time."""
    train, val = tiny_loaders()
    now = start
    trainer = Trainer(
        tiny_model(),
        train,
        val,
        device="cpu",
        config=TrainingConfig(total_steps=4, eval_steps=2, log_steps=1, learning_rate=1e-2),
        handlers=[
            Usage(directory, seconds),
            Evaluation(),
            Samples(CharacterTokenizer("\nabcdefghij"), directory, num_tokens=2),
            Checkpointing(directory / "checkpoints"),
        ],
    )

    def pass_time(engine: Trainer, takes: float) -> None:
        nonlocal now
        now += takes

    for event, takes in TAKES.items():
        trainer.add_event_handler(event, pass_time, takes)
    trainer.budget.clock = lambda: now
    return trainer


def read(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "usage.jsonl").read_text().splitlines()]


def test_the_time_of_each_phase(tmp_path: Path) -> None:
    make_trainer(tmp_path).run()
    (record,) = read(tmp_path)
    assert record["step"] == 4
    assert record["seconds"] == {
        "start": 0.5,
        "training": 4 * 2.0,
        "evaluation": 2 * 100.0,
        "sampling": 2 * 1000.0,
        "saving": 3 * 10.0,  # at step 0 too
    }
    assert isinstance(record["joules"], dict)


def test_a_line_is_written_when_it_is_time_and_at_the_end(tmp_path: Path) -> None:
    make_trainer(tmp_path, seconds=50.0).run()
    # Steps 1 and 2 come before the evaluation, 3 after it; the last line is of the end.
    assert [record["step"] for record in read(tmp_path)] == [3, 4]


def test_a_resume_begins_with_lines_of_its_own(tmp_path: Path) -> None:
    make_trainer(tmp_path).run()
    (first,) = read(tmp_path)
    with (tmp_path / "usage.jsonl").open("a") as file:
        file.write('{"process": 1.0, "st')
    trainer = make_trainer(tmp_path, start=7.0)
    trainer.resume(tmp_path / "checkpoints" / "step-00000002")
    trainer.run()
    kept, second = read(tmp_path)
    assert kept == first
    assert second["seconds"]["start"] == 7.0
    assert second["seconds"]["training"] == 2 * 2.0
