"""The training loop as a script has it: arguments with defaults, and the handlers of every run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fundamentallm.compute.plan import Machine, ModelFacts, Plan
from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.loaders import as_window_loader
from fundamentallm.models.calling import check_model
from fundamentallm.training.checkpoint.catalogue import Survey
from fundamentallm.training.dispatch import timeline
from fundamentallm.training.handlers.base import Handler
from fundamentallm.training.handlers.defaults import default_handlers
from fundamentallm.training.history import History as History
from fundamentallm.training.limits import Limits
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.losses import LanguageModelingLoss, takes_hidden_states
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.schedulers import ConstantLRScheduler, LearningRateScheduler


class Trainer(TrainingLoop):
    """An event-driven trainer for language models.

    Args:
        model: takes `input_ids` (B, T) int64, returns logits (B, T, V) or, as the causal language
            models of `transformers`, an object with `.logits`. It is moved to `device`.
        train_loader: a loader of windows (`TokenWindowLoader`), or a DataLoader whose batches are
            `{"input_ids", "target_ids"}`, `(inputs, targets)`, or, as of a collator of
            `transformers`, `{"input_ids", "labels", "attention_mask"}`, whose labels are shifted
            here. It is gathered into windows of `config.accumulation_steps` batches.
        val_loader: batches of the same form; None or empty for no validation.
        optimizer: over the model's parameters; the config's optimizer if None.
        scheduler: a schedule of this package on that optimizer; a constant rate if None. Torch's
            own schedulers are refused: they have state that a rollback cannot take back.
        loss_fn: `loss_fn(logits, targets, reduction="sum")`; cross-entropy if None.
        device: "auto", "cpu", "cuda", "cuda:0", "mps", a torch device, or a plan that was resolved
            already: it says how to compute in place of the config.
        config: budgets, cadence, clipping and precision; the defaults if None.
        handlers: attached in this order.
        limits: when the run ends; from the config and the training data if None.

    Raises:
        ConfigError: a model of `transformers` for another task than the next token, or one that
            lacks what the loss takes (`models.calling.check_model`).

    Further methods for scripts and handlers are in `TrainingLoop`.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Any,
        val_loader: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: LearningRateScheduler | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
        device: str | torch.device | Plan = "auto",
        config: TrainingConfig | None = None,
        handlers: Sequence[Handler] = (),
        limits: Limits | None = None,
    ) -> None:
        self._checkpoint_dir = Path(config.checkpoint_dir) if config is not None else None
        config = config if config is not None else TrainingConfig()
        if not isinstance(device, Plan):
            machine = Machine.open(device, config.threads, deterministic=config.deterministic)
            device = Plan.resolve(config, ModelFacts.of(model), machine)
        check_model(model, takes_hidden_states(loss_fn))
        model = device.place(model)
        if optimizer is None:
            optimizer = OptimizerBuilder.from_config(config, model)
        if scheduler is not None and not isinstance(scheduler, LearningRateScheduler):
            raise TypeError(
                f"scheduler must be one of this package's schedules, not {type(scheduler).__name__}"
                ": torch's schedulers hold state that a rollback cannot take back"
            )
        train_loader = as_window_loader(train_loader, config.accumulation_steps, config.seed)
        if limits is None:
            steps_for_tokens = getattr(train_loader, "steps_for_tokens", None)
            limits = Limits.resolve(config, len(train_loader), steps_for_tokens)
        super().__init__(
            model,
            train_loader,
            val_loader,
            optimizer,
            scheduler if scheduler is not None else ConstantLRScheduler(optimizer),
            loss_fn if loss_fn is not None else LanguageModelingLoss(),
            device,
            config,
            limits,
        )
        for handler in handlers:
            handler.attach(self)

    def train(
        self, num_epochs: int | None = None, checkpoint_dir: str | Path | None = None
    ) -> History:
        """Train to the first limit and return the history.

        Args:
            num_epochs: passes over the data in total, in place of the config's budgets.
            checkpoint_dir: where checkpoints go; without it, the config's directory if the
                trainer was given a config, else none are written.

        Raises:
            ValueError: less than one epoch, or checkpoints go elsewhere already.
        """
        if checkpoint_dir is not None:
            self._keep_checkpoints_in(Path(checkpoint_dir))
        if num_epochs is not None:
            if num_epochs < 1:
                raise ValueError(f"num_epochs must be at least 1, got {num_epochs}")
            self.budget.limits = Limits(num_epochs * self.steps_per_epoch, num_epochs=num_epochs)
        self.attach_defaults()
        self.run()
        return self.history

    def resume(self, path: str | Path, survey: Survey | None = None) -> None:
        """Stand where a checkpoint left off; `train` then goes on from its step.

        Attach handlers first: those with state take theirs back.

        Args:
            path: a checkpoint directory; new checkpoints go beside it.
            survey: what was read of the directory that it lies in; None reads it.

        Raises:
            CheckpointError: it is damaged, or of another model, optimizer or data.
        """
        path = Path(path)
        if self.restore_point is None:
            self._checkpoint_dir = path.parent
        self.attach_defaults()
        assert self.restore_point is not None  # attached just now, unless there was one
        self.restore_point.restore(self, path, survey)

    def train_epoch(self) -> float:
        """Train to the end of the current epoch; return its mean loss in nats per token."""
        epoch = self.epochs.position(self.state.iteration)[0] + 1
        end = self.epochs.last_step(epoch)
        limits, self.budget.limits = self.budget.limits, Limits(end, num_epochs=epoch)
        try:
            self.attach_defaults()
            self.run()
        finally:
            self.budget.limits = limits
        return float(self.state.metrics.get("train/epoch_loss", math.nan))

    def attach_defaults(self) -> None:
        """Attach schedule, evaluation and checkpointing from the arguments, unless they are."""
        for handler in default_handlers(self, self._checkpoint_dir):
            handler.attach(self)

    def timeline(self) -> list[tuple[str, list[str]]]:
        """Return the events that have handlers, in the order of the loop, and who hears them."""
        return timeline(self)

    def _keep_checkpoints_in(self, directory: Path) -> None:
        if self.restore_point is not None and self.restore_point.directory != directory:
            raise ValueError(
                f"checkpoints of this trainer go to {self.restore_point.directory} already, so"
                f" checkpoint_dir={directory} would have no effect"
            )
        self._checkpoint_dir = directory
