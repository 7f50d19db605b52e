"""A schedule of your own: a warm restart at every epoch, without touching the package.

    python examples/own_schedule.py
    PYTHONPATH=examples fundamentallm run train \\
        --plugins own_schedule 'training.scheduler={name: restarts, depth: 0.2}'

What to learn: a schedule is a pure function from the number of the update to a multiplier of the
base learning rate. It holds no state, so stop, resume and rollback cannot break it.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer

from fundamentallm.training.schedulers import SCHEDULERS, LearningRateScheduler


@SCHEDULERS.register("restarts")
class Restarts(LearningRateScheduler):
    """Half a cosine in each epoch, from 1 down to `depth` (Loshchilov and Hutter 2017).

    Args:
        optimizer: supplied by the program.
        steps_per_epoch: supplied by the program.
        depth: multiplier at an epoch's end.
    """

    def __init__(self, optimizer: Optimizer, steps_per_epoch: int, depth: float = 0.1) -> None:
        super().__init__(optimizer)
        self.steps_per_epoch = steps_per_epoch
        self.depth = depth

    def multiplier(self, step: int, progress: float | None = None) -> float:
        """Return the multiplier of update number `step`, counted from 1."""
        within = (step - 1) % self.steps_per_epoch / self.steps_per_epoch
        return self.depth + (1 - self.depth) * 0.5 * (1 + math.cos(math.pi * within))


def main() -> None:
    """Print two epochs of the schedule as bars, then train with it."""
    from fundamentallm.testing import tiny_loaders, tiny_model
    from fundamentallm.training.optimizers import OptimizerBuilder
    from fundamentallm.training.trainer import Trainer

    train_loader, val_loader = tiny_loaders()
    model = tiny_model()
    optimizer = OptimizerBuilder.build("adamw", model, lr=1e-2)
    scheduler = Restarts(optimizer, steps_per_epoch=len(train_loader))
    for step in range(1, 2 * len(train_loader) + 1):
        print(f"{step:3d} {'#' * round(40 * scheduler.multiplier(step))}")
    trainer = Trainer(model, train_loader, val_loader, optimizer, scheduler, device="cpu")
    history = trainer.train(num_epochs=2)
    print(f"learning rates {history.lr[0]:.4f} ... {history.lr[-1]:.4f}")


if __name__ == "__main__":
    main()
