"""The whole way on 1,000 characters of Shakespeare: text, tokens, training, checkpoint, back."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch.utils.data import DataLoader

from fundamentallm.config import TrainingConfig, TransformerConfig
from fundamentallm.data.dataset import LanguageModelDataset
from fundamentallm.data.loaders import Batching, TokenWindowLoader, ValidationLoader
from fundamentallm.data.sources import read_source, split_tokens
from fundamentallm.data.tokenizer import CharacterTokenizer, load_tokenizer
from fundamentallm.errors import CheckpointError, DataError
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.checkpoint import CheckpointManager
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.handlers import LossEMA, Perplexity
from fundamentallm.training.losses import LanguageModelingLoss
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.schedulers import (
    CosineAnnealingScheduler,
    ExponentialDecayScheduler,
    LearningRateScheduler,
)
from fundamentallm.training.trainer import Trainer

EXCERPT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
LENGTH = 32
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> CharacterTokenizer:
    return CharacterTokenizer.from_text(read_source(str(EXCERPT)).text)


def model_for(tokenizer: CharacterTokenizer, **fields: Any) -> Transformer:
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"d_model": 32, "num_layers": 2, "num_heads": 2, **fields}
    return Transformer(
        TransformerConfig(vocab_size=tokenizer.vocab_size, sequence_length=LENGTH, **sizes)
    )


def loaders(
    tokenizer: CharacterTokenizer, batch_size: int = 4, accumulation_steps: int = 1
) -> tuple[TokenWindowLoader, ValidationLoader]:
    parts = split_tokens(tokenizer.encode(EXCERPT.read_text()), (0.9, 0.1, 0.0))
    return (
        TokenWindowLoader(parts["train"], Batching(LENGTH, batch_size, accumulation_steps, seed=1)),
        ValidationLoader(parts["val"], Batching(LENGTH, batch_size)),
    )


def trainer_for(
    tokenizer: CharacterTokenizer,
    scheduler: Any = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
    accumulation_steps: int = 1,
    eval_steps: int = 100,
    **model_fields: Any,
) -> Trainer:
    model = model_for(tokenizer, **model_fields).to(dtype)
    optimizer = OptimizerBuilder.build("adamw", model, 1e-2)
    train, val = loaders(tokenizer, batch_size, accumulation_steps)
    return Trainer(
        model,
        train,
        val,
        optimizer,
        scheduler(optimizer, len(train)) if scheduler is not None else None,
        LanguageModelingLoss(),
        device="cpu",
        config=TrainingConfig(eval_steps=eval_steps, checkpoint_dir=f"checkpoints-{next(NUMBERS)}"),
        handlers=(LossEMA(), Perplexity()),
    )


def test_the_excerpt_is_what_the_tests_say_it_is() -> None:
    text = EXCERPT.read_text()
    assert len(text) == 1_000
    assert len(set(text)) <= 50


def test_from_text_to_a_checkpoint_and_back(tokenizer: CharacterTokenizer, tmp_path: Path) -> None:
    text = EXCERPT.read_text()
    assert tokenizer.decode(tokenizer.encode(text)) == text

    trainer = trainer_for(tokenizer)
    history = trainer.train(num_epochs=2, checkpoint_dir=tmp_path / "checkpoints")
    assert history.epoch_train_loss[1] < history.epoch_train_loss[0]
    assert history.val_loss[1] < history.val_loss[0] < math.log(tokenizer.vocab_size)
    assert history.perplexity[1] < history.perplexity[0]

    tokenizer.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint() == tokenizer.fingerprint()
    best = CheckpointStore(tmp_path / "checkpoints").resolve("best")
    assert best is not None
    loaded = trainer_for(tokenizer)
    loaded.resume(best)
    assert loaded.validate()["val/loss"] == history.best_val_loss


def test_a_dataset_in_a_dataloader_trains_too(tokenizer: CharacterTokenizer) -> None:
    dataset = LanguageModelDataset(tokenizer.encode(EXCERPT.read_text()), LENGTH)
    model = model_for(tokenizer)
    trainer = Trainer(
        model,
        DataLoader(dataset, batch_size=4, shuffle=True),
        DataLoader(dataset, batch_size=4),
        OptimizerBuilder.build("adamw", model, 1e-2),
        device="cpu",
    )
    history = trainer.train(num_epochs=2)
    assert history.val_loss[-1] < history.val_loss[0]


def test_accumulation_equals_the_larger_batch(tokenizer: CharacterTokenizer) -> None:
    large = trainer_for(tokenizer, dtype=torch.float64, batch_size=8)
    small = trainer_for(tokenizer, dtype=torch.float64, batch_size=2, accumulation_steps=4)
    assert large.steps_per_epoch == small.steps_per_epoch
    assert large.train_loader.num_sequences % 8 != 0  # the last window is a short one
    a, b = large.train(num_epochs=2), small.train(num_epochs=2)
    assert a.train_loss == pytest.approx(b.train_loss, rel=1e-10)
    for x, y in zip(large.model.parameters(), small.model.parameters(), strict=True):
        assert float((x - y).detach().norm() / x.detach().norm()) < 1e-10


def test_the_loss_goes_on_where_a_checkpoint_left_it(
    tokenizer: CharacterTokenizer, tmp_path: Path
) -> None:
    whole = trainer_for(tokenizer, dropout=0.1)
    expected = whole.train(num_epochs=3, checkpoint_dir=tmp_path / "whole").train_loss
    stop = len(expected) // 2

    first = trainer_for(tokenizer, dropout=0.1)
    first.add_event_handler(Events.ITERATION_COMPLETED(once=stop), lambda t: t.interrupt_run(2))
    first.train(num_epochs=3, checkpoint_dir=tmp_path / "parts")
    second = trainer_for(tokenizer, dropout=0.1)
    second.resume(tmp_path / "parts" / f"step-{stop:08d}")
    second.train(num_epochs=3)
    assert first.history.train_loss + second.history.train_loss == expected
    assert second.epoch == 3


@pytest.mark.parametrize("name", ["directory", "model.pt"])
def test_the_manager_saves_and_loads_by_hand(
    tokenizer: CharacterTokenizer, tmp_path: Path, name: str
) -> None:
    trainer = trainer_for(tokenizer)
    trainer.run(max_iters=3)
    CheckpointManager.save(
        tmp_path / name, trainer.model, trainer.optimizer, metrics={"val_loss": 2.0}, step=3
    )
    other = trainer_for(tokenizer)
    _, _, _, metrics, epoch, step = CheckpointManager.load(
        tmp_path / name, other.model, other.optimizer
    )
    assert (metrics["val_loss"], epoch, step) == (2.0, 0, 3)
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    window = trainer.train_loader.window_at(0, 4)
    assert trainer._train_step(window).loss == other._train_step(window).loss
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def cosine(optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> LearningRateScheduler:
    return CosineAnnealingScheduler(optimizer, 3 * steps_per_epoch, warmup_steps=2, min_lr=1e-4)


def exponential(optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> LearningRateScheduler:
    return ExponentialDecayScheduler(optimizer, steps_per_epoch, decay_rate=0.5)


def test_a_cosine_schedule_spans_the_epochs(tokenizer: CharacterTokenizer) -> None:
    trainer = trainer_for(tokenizer, cosine)
    rates = trainer.train(num_epochs=3).lr
    assert rates[:2] == pytest.approx([5e-3, 1e-2])
    assert rates[-1] == pytest.approx(1e-4)
    assert all(a > b for a, b in itertools.pairwise(rates[1:]))


def test_an_exponential_schedule_falls_once_an_epoch(tokenizer: CharacterTokenizer) -> None:
    trainer = trainer_for(tokenizer, exponential)
    rates = trainer.train(num_epochs=3).lr
    length = trainer.steps_per_epoch
    assert rates == pytest.approx([1e-2] * length + [5e-3] * length + [2.5e-3] * length)


def test_several_validations_an_epoch_leave_the_training_as_it_is(
    tokenizer: CharacterTokenizer,
) -> None:
    often = trainer_for(tokenizer, eval_steps=1, dropout=0.1)
    a = often.train(num_epochs=2)
    seldom = trainer_for(tokenizer, eval_steps=1_000, dropout=0.1)
    b = seldom.train(num_epochs=2)
    assert len(a.val_loss) == often.state.iteration
    assert len(b.val_loss) == 2
    assert a.train_loss == b.train_loss


# ------------------------------------------------------------------ corrupted input


def test_bytes_that_are_no_text_are_refused_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(EXCERPT.read_bytes()[:500] + b"\xff" + EXCERPT.read_bytes()[500:])
    with pytest.raises(DataError, match="byte 500"):
        read_source(str(path))


def test_a_text_of_other_characters_is_refused(tokenizer: CharacterTokenizer) -> None:
    with pytest.raises(DataError, match=r"U\+00E9"):
        tokenizer.encode("caf\u00e9")


def test_a_text_that_is_too_short_is_refused_with_both_counts(
    tokenizer: CharacterTokenizer,
) -> None:
    with pytest.raises(DataError, match=r"(?s)20 tokens.*33"):
        TokenWindowLoader(tokenizer.encode(EXCERPT.read_text()[:20]), Batching(LENGTH, 4))


def test_a_damaged_checkpoint_is_named_and_changes_nothing(
    tokenizer: CharacterTokenizer, tmp_path: Path
) -> None:
    trainer_for(tokenizer).train(num_epochs=1, checkpoint_dir=tmp_path)
    newest = CheckpointStore(tmp_path).resolve("last")
    assert newest is not None
    path = newest / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    other = trainer_for(tokenizer)
    before = [p.detach().clone() for p in other.model.parameters()]
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        other.resume(newest)
    assert all(torch.equal(a, b) for a, b in zip(before, other.model.parameters(), strict=True))
