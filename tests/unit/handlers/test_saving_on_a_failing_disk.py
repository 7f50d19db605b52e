"""A disk that fails in a save costs that save at most: neither the training nor earlier ones."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path

import pytest
import torch
from fault_injection.faults import Crash, FaultyFilesystem

from fundamentallm.config import TrainingConfig
from fundamentallm.errors import CheckpointError
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.handlers import Checkpointing
from fundamentallm.training.trainer import Trainer

CODES = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES]
SAVES = 4  # steps 0, 2, 4, 6


def make_trainer(checkpointing: Checkpointing | None) -> Trainer:
    torch.manual_seed(1)
    train, val = tiny_loaders()
    trainer = Trainer(
        tiny_model(dropout=0.1),
        train,
        val,
        device="cpu",
        config=TrainingConfig(total_steps=6, eval_steps=2, learning_rate=1e-2),
        handlers=(checkpointing,) if checkpointing is not None else (),
    )
    trainer._checkpoint_dir = None
    return trainer


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.fixture(scope="module")
def without_saves() -> list[torch.Tensor]:
    trainer = make_trainer(None)
    trainer.train()
    return weights(trainer)


def operations(tmp_path: Path) -> int:
    checkpointing = Checkpointing(tmp_path / "count", n_saved=2)
    filesystem = FaultyFilesystem(None, Crash)
    checkpointing.store.filesystem = filesystem
    make_trainer(checkpointing).train()
    return len(filesystem.log)


def fail(directory: Path, at: int, code: int, on_error: str, expected: list[torch.Tensor]) -> bool:
    """Train on a disk that fails once; return whether that was told as an error."""
    checkpointing = Checkpointing(directory, n_saved=2, on_error=on_error)  # type: ignore[arg-type]
    checkpointing.store.filesystem = FaultyFilesystem(at, lambda: OSError(code, "fault"))
    trainer = make_trainer(checkpointing)
    told = ""
    try:
        trainer.train()
    except CheckpointError as error:
        told = str(error)
    stopped = bool(told)
    assert not stopped or ("could not be saved" in told and "untouched" in told)
    store = CheckpointStore(directory)
    store.recover()
    whole, damaged = store.scan()
    assert not damaged
    if not stopped:
        assert all(torch.equal(a, b) for a, b in zip(weights(trainer), expected, strict=True))
        assert whole
    # What was reported as saved is there, but for what a later save has retired.
    if trainer.state.last_checkpoint is not None:
        assert store.newest() is not None
        assert trainer.state.last_checkpoint.name in {manifest.name for manifest in whole}
    return stopped


OFTEN = [(errno.ENOSPC, "stop"), (errno.EIO, "continue")]


@pytest.mark.parametrize(
    ("code", "on_error"),
    [
        pytest.param(*case, marks=() if case in OFTEN else pytest.mark.long)
        for case in itertools.product(CODES, ["stop", "continue"])
    ],
)
def test_a_failing_operation_costs_a_save_at_most(
    tmp_path: Path, without_saves: list[torch.Tensor], code: int, on_error: str
) -> None:
    # Every 59th of about 150, others for each code; all of them in the long run.
    points = range(code % 59, operations(tmp_path), 59)
    stops = [fail(tmp_path / str(at), at, code, on_error, without_saves) for at in points]
    assert any(stops) == (on_error == "stop")


@pytest.mark.long
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_at_every_operation(
    tmp_path: Path, without_saves: list[torch.Tensor], on_error: str
) -> None:
    for at in range(operations(tmp_path)):
        code = CODES[at % len(CODES)]  # one each: the operations of the four saves are the same
        fail(tmp_path / str(at), at, code, on_error, without_saves)
