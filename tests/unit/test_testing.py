"""The fakes that users test their own parts with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ignite.engine import Events

from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import (
    TINY_TEXT,
    RecordingHandler,
    UniformModel,
    tiny_loaders,
    tiny_model,
    tiny_tokens,
)
from fundamentallm.training.handlers import Evaluation
from fundamentallm.training.trainer import Trainer


def test_the_uniform_model_gives_every_token_the_same_probability():
    model = UniformModel(7)
    ids = torch.randint(7, (2, 5))
    logits = model(ids)
    assert logits.shape == (2, 5, 7)
    assert torch.equal(logits.softmax(-1), torch.full((2, 5, 7), 1 / 7))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert float(loss.detach()) == pytest.approx(math.log(7), rel=1e-6)


def test_the_tiny_model_has_the_shape_that_it_is_told():
    model = tiny_model(vocab_size=5, sequence_length=6, d_model=8, num_layers=1)
    assert model(torch.zeros(3, 6, dtype=torch.int64)).shape == (3, 6, 5)
    assert sum(p.numel() for p in model.parameters()) < sum(
        p.numel() for p in tiny_model().parameters()
    )


def test_tiny_tokens_move_by_one_or_two():
    tokens = tiny_tokens(500, vocab_size=11, seed=3)
    assert len(tokens) == 500
    assert set(np.unique(np.diff(tokens.astype(int)) % 11)) == {1, 2}
    assert np.array_equal(tokens, tiny_tokens(500, vocab_size=11, seed=3))
    assert not np.array_equal(tokens, tiny_tokens(500, vocab_size=11, seed=4))


def test_tiny_loaders_do_not_share_tokens():
    train, val = tiny_loaders(sequence_length=8, batch_size=4, accumulation_steps=2)
    window = next(iter(train))
    assert [tuple(b["input_ids"].shape) for b in window.micro_batches] == [(4, 8), (4, 8)]
    assert window.num_tokens == 64
    targets = torch.cat([batch["target_ids"].flatten() for batch in val])
    assert targets[targets >= 0].tolist() == tiny_tokens()[321:].tolist()


def test_a_tiny_model_learns_the_structure_of_tiny_tokens():
    torch.manual_seed(0)
    train, val = tiny_loaders()
    config = TrainingConfig(num_epochs=12, learning_rate=1e-2, eval_steps=10**6)
    trainer = Trainer(
        tiny_model(), train, val, device="cpu", config=config, handlers=[Evaluation()]
    )
    trainer.run()
    # Two tokens are possible after each: log 2 is the best, log 11 is no knowledge at all.
    assert trainer.history.best_val_loss < 1.2
    assert trainer.history.best_val_loss > math.log(2) - 0.1


def test_the_recording_handler_writes_events_in_their_order():
    recording = RecordingHandler()
    train, _ = tiny_loaders()
    trainer = Trainer(
        tiny_model(),
        train,
        device="cpu",
        config=TrainingConfig(total_steps=2),
        handlers=[recording],
    )
    trainer.run()
    assert recording.names() == [name for name, _ in recording.events]
    assert recording.events[0] == ("FLLM_RUN_STARTED", 0)
    steps = [step for name, step in recording.events if name == "FLLM_OPTIMIZER_STEPPED"]
    assert steps == [1, 2]
    names = recording.names()
    assert names.index(Events.STARTED.name) < names.index(Events.ITERATION_STARTED.name)
    assert names[-1] == TrainingEvents.FLLM_RUN_ENDED.name


def test_the_recording_handler_lets_errors_through():
    train, _ = tiny_loaders()
    trainer = Trainer(tiny_model(), train, device="cpu", handlers=[RecordingHandler()])

    def fail() -> None:
        raise RuntimeError("by the test")

    trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, fail)
    with pytest.raises(RuntimeError, match="by the test"):
        trainer.run()


def test_the_tiny_text_is_plain():
    assert TINY_TEXT.isascii()
    assert TINY_TEXT.endswith("\n")
