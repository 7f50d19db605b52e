"""The default handlers of a script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fundamentallm.training.handlers.base import Handler
from fundamentallm.training.handlers.checkpointing import Checkpointing
from fundamentallm.training.handlers.evaluation import Evaluation
from fundamentallm.training.handlers.schedule import Schedule
from fundamentallm.training.loop import TrainingLoop


def default_handlers(trainer: TrainingLoop, checkpoint_dir: Path | None) -> Iterator[Handler]:
    """Yield a handler for each role that no attached handler has.

    Args:
        trainer: has the schedule and the configuration.
        checkpoint_dir: where checkpoints go; None: no checkpoints.
    """
    if not trainer.has_role("schedule") and not trainer.rate_is_foreign:
        yield Schedule(trainer.scheduler)
    if not trainer.has_role("evaluation"):
        yield Evaluation()
    if checkpoint_dir is not None and trainer.restore_point is None:
        yield Checkpointing(checkpoint_dir, n_saved=trainer.config.keep_last)
