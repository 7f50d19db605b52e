"""Samples leave no trace in the training, and tell one history."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.copying import CopyingFigures
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.errors import DataError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import SpoiltGradient, tiny_loaders, tiny_model
from fundamentallm.training.handlers import (
    Checkpointing,
    Evaluation,
    NaNRollback,
    Samples,
    WeightEMA,
)
from fundamentallm.training.trainer import Trainer

LETTERS = "\nabcdefghij"  # eleven, as many as tiny_model has tokens


def make_trainer(*handlers: Any, loss_fn: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    train, val = tiny_loaders()
    fields = {"total_steps": 8, "eval_steps": 2, "learning_rate": 1e-2, **options}
    return Trainer(
        tiny_model(dropout=0.2),
        train,
        val,
        loss_fn=loss_fn,
        device="cpu",
        config=TrainingConfig(**fields),
        handlers=[*handlers, Evaluation()],
    )


def samples(directory: Path, tokenizer: Any = None, **options: Any) -> Samples:
    tokenizer = tokenizer or CharacterTokenizer(LETTERS)
    return Samples(tokenizer, directory, **{"num_tokens": 12, **options})


def read(directory: Path) -> list[dict[str, Any]]:
    text = (directory / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_training_is_bitwise_the_same_with_and_without(tmp_path):
    with_it = make_trainer(samples(tmp_path))
    with_it.run()
    assert len(read(tmp_path)) == 4
    state = torch.get_rng_state()
    without = make_trainer()  # seeds dropout as well
    without.run()
    assert with_it.history.train_loss == without.history.train_loss
    assert with_it.history.validations == without.history.validations
    for a, b in zip(weights(with_it), weights(without), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)


def test_writes_one_after_each_validation(tmp_path):
    make_trainer(samples(tmp_path, prompt="ab")).run()
    records = read(tmp_path)
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    for record in records:
        assert record["prompt"] == "ab"
        assert len(record["text"]) == 12
        assert set(record["text"]) <= set(LETTERS)


def test_writes_after_every_nth_validation(tmp_path):
    make_trainer(samples(tmp_path, every=2)).run()
    assert [record["step"] for record in read(tmp_path)] == [4, 8]


def test_a_seed_gives_the_same_text_whatever_torch_drew_before(tmp_path):
    texts = []
    for name, seed, burn in (("a", 1, 0), ("b", 1, 7), ("c", 2, 0)):
        (tmp_path / name).mkdir()
        trainer = make_trainer(
            samples(tmp_path / name, seed=seed, num_tokens=40), learning_rate=1e-9
        )
        trainer.add_event_handler(
            TrainingEvents.FLLM_EVALUATION_STARTED, lambda _, count: torch.rand(count), burn
        )
        trainer.run()
        texts.append([record["text"] for record in read(tmp_path / name)])
    assert texts[0][0] == texts[1][0]
    assert texts[0][0] != texts[2][0]
    assert texts[0][0] != texts[0][1]  # with weights that stand still, the step alone differs


def greedy(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    """The likeliest token, time and again, from the last eight tokens: the model's context."""
    model.eval()
    start = len(ids)
    while len(ids) < start + count:
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids[-8:]]))[0, -1].argmax())]
    return ids[start:]


@pytest.mark.parametrize("averaged", [False, True])
def test_temperature_zero_is_the_likeliest_text_of_the_evaluation_weights(tmp_path, averaged):
    handlers = [WeightEMA(0.9)] if averaged else []
    # Shorter than the context, so that no rule for what lies beyond it matters.
    trainer = make_trainer(
        *handlers, samples(tmp_path, temperature=0.0, num_tokens=6, prompt="a"), learning_rate=0.1
    )
    trainer.run()
    with trainer.evaluation_weights():
        ids = greedy(trainer.model, [LETTERS.index("a")], 6)
    assert read(tmp_path)[-1]["text"] == "".join(LETTERS[i] for i in ids)


@pytest.mark.parametrize("prompt", ["", "Z"])
def test_a_prompt_outside_the_vocabulary_is_no_reason_to_fail(tmp_path, prompt):
    make_trainer(samples(tmp_path, prompt=prompt)).run()
    assert all(len(record["text"]) == 12 for record in read(tmp_path))


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_a_tokenizer_smaller_than_the_model_s_vocabulary(tmp_path, temperature):
    letters = LETTERS[:4]
    tokenizer = CharacterTokenizer(letters)
    make_trainer(samples(tmp_path, tokenizer, num_tokens=40, temperature=temperature)).run()
    for record in read(tmp_path):
        assert len(record["text"]) == 40
        assert set(record["text"]) <= set(letters)


def test_modes_stay_as_they_were(tmp_path):
    trainer = make_trainer(samples(tmp_path))
    modes = []
    for event in (TrainingEvents.FLLM_EVALUATION_DUE, TrainingEvents.FLLM_CHECKPOINT_DUE):
        trainer.add_event_handler(event, lambda engine: modes.append(engine.model.training))
    trainer.run()
    assert set(modes) == {True}


def test_a_rollback_takes_samples_back(tmp_path):
    results = []
    for name, spoilt, ledger in (("broken", 7, set()), ("told", 0, {7})):
        (tmp_path / name).mkdir()
        trainer = make_trainer(
            NaNRollback(),
            SpoiltGradient(spoilt),
            samples(tmp_path / name),
            Checkpointing(tmp_path / name / "checkpoints"),
            checkpoint_steps=4,  # so that the sample of step 6 has to go
        )
        trainer.interventions.skip(ledger)
        trainer.run()
        results.append(read(tmp_path / name))
    assert [record["step"] for record in results[0]] == [2, 4, 6, 8]
    assert results[0] == results[1]


# Line separators of Unicode, which JSON leaves as they are, are no ends of lines.
@pytest.mark.parametrize("letters", [LETTERS, "\nabcdef\x0b\x85\u2028\u2029"])
def test_a_resume_leaves_one_history(tmp_path, letters):
    results = []
    for name in ("whole", "cut"):
        directory = tmp_path / name
        directory.mkdir()

        def trainer(directory: Path = directory) -> Trainer:
            return make_trainer(
                samples(directory, CharacterTokenizer(letters)),
                Checkpointing(directory / "checkpoints"),
                checkpoint_steps=5,
            )

        trainer().run()
        if name == "cut":
            with (directory / "samples.jsonl").open("a") as file:
                file.write('{"step": 9, "pro')
            resumed = trainer()
            resumed.resume(directory / "checkpoints" / "step-00000005")
            resumed.run()
        results.append(read(directory))
    assert [record["step"] for record in results[1]] == [2, 4, 6, 8]
    assert results[0] == results[1]


def test_a_disk_that_fails_is_told_once_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "samples.jsonl").mkdir()
    trainer = make_trainer(samples(tmp_path))
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        trainer.run()
    assert trainer.state.iteration == 8
    warnings = [r for r in caplog.records if "samples.jsonl cannot be written" in r.getMessage()]
    assert len(warnings) == 1


def split_texts(part: str, limit: int) -> list[tuple[str, str]]:
    return [("text.txt", {"train": LETTERS * 20, "val": LETTERS[::-1] * 9}[part][:limit])]


def test_a_sample_tells_what_it_copies(tmp_path):
    trainer = make_trainer(samples(tmp_path, split_texts=split_texts))
    trainer.run()
    figures = CopyingFigures(split_texts("train", 1000), [LETTERS[::-1] * 9])
    for record in read(tmp_path):
        assert record["copying"] == figures.of(record["text"])
        assert record["copying"]["searched"] == 220
    assert trainer.state.sample is not None
    assert set(trainer.state.sample._asdict()) == {"step", "prompt", "text"}


def test_what_a_sample_copies_can_be_left_out(tmp_path):
    make_trainer(samples(tmp_path, split_texts=split_texts, check_copying=False)).run()
    assert all(set(record) == {"step", "prompt", "text"} for record in read(tmp_path))


def test_a_text_that_cannot_be_read_again_is_told_once_and_training_goes_on(tmp_path, caplog):
    def gone(part: str, limit: int) -> list[tuple[str, str]]:
        raise DataError("the text is gone")

    trainer = make_trainer(samples(tmp_path, split_texts=gone))
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        trainer.run()
    assert [set(record) for record in read(tmp_path)] == [{"step", "prompt", "text"}] * 4
    assert len([r for r in caplog.records if "not searched for copies" in r.getMessage()]) == 1
