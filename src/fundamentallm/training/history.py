"""The history of a run, as lists to plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fundamentallm.training.metrics import numbers_in


@dataclass
class History:
    """The course of a run.

    Per step, in step order; losses in nats per token. After a rollback or a resume the lists hold
    one history: rolled-back steps are removed.

    Attributes:
        steps: step numbers, the x-axis of the next four.
        train_loss: training loss of each step.
        loss_ema: smooth training loss; empty without the `loss_ema` handler.
        lr: learning rate of the first parameter group.
        throughput_tokens_per_sec: empty without the `throughput` handler.
        epochs: per epoch `{"epoch", "step", "train_loss"}`.
        validations: per validation `{"step", "val_loss", "perplexity"}`, and each further metric
            that is a number, by its name.
    """

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    loss_ema: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    throughput_tokens_per_sec: list[float] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def val_loss(self) -> list[float]:
        """The validation losses, in order."""
        return [entry["val_loss"] for entry in self.validations]

    @property
    def perplexity(self) -> list[float]:
        """The validation perplexities, in order."""
        return [entry["perplexity"] for entry in self.validations]

    @property
    def epoch_train_loss(self) -> list[float]:
        """The token-weighted mean training loss of each epoch."""
        return [entry["train_loss"] for entry in self.epochs]

    @property
    def best_val_loss(self) -> float | None:
        """The lowest validation loss; a NaN is never the lowest."""
        finite = [loss for loss in self.val_loss if loss == loss]
        return min(finite) if finite else None

    def record_step(self, step: int, metrics: dict[str, float]) -> None:
        """Add a step from the trainer's metrics."""
        self.steps.append(step)
        for key, values in (
            ("train/loss", self.train_loss),
            ("train/loss_ema", self.loss_ema),
            ("train/lr", self.lr),
            ("train/tokens_per_second", self.throughput_tokens_per_sec),
        ):
            if key in metrics:
                values.append(metrics[key])

    def record_epoch(self, epoch: int, step: int, train_loss: float) -> None:
        """Add the mean training loss of an epoch that ended at `step`."""
        self.epochs.append({"epoch": epoch, "step": step, "train_loss": train_loss})

    def record_validation(self, step: int, metrics: dict[str, Any]) -> None:
        """Add a validation from its metrics."""
        numbers = {name.removeprefix("val/"): value for name, value in numbers_in(metrics).items()}
        self.validations.append({"step": step, "val_loss": numbers.pop("loss"), **numbers})

    def cut_back(self, step: int, evaluation_pending: bool = False) -> None:
        """Remove everything after `step`, and its validation if that will run again."""
        kept = sum(1 for known in self.steps if known <= step)
        for values in (
            self.steps,
            self.train_loss,
            self.loss_ema,
            self.lr,
            self.throughput_tokens_per_sec,
        ):
            del values[kept:]
        self.epochs = [entry for entry in self.epochs if entry["step"] <= step]
        last = step - evaluation_pending
        self.validations = [entry for entry in self.validations if entry["step"] <= last]
