"""An optimizer of your own: Lion, without touching the package.

    python examples/own_optimizer.py
    PYTHONPATH=examples python -m fundamentallm.engine run configs/train.yaml \\
        --plugins own_optimizer training.optimizer=lion training.learning_rate=5e-4

What to learn: one decorated function. `params` and `lr` come from the program, every other
parameter is an option that a YAML may write, checked against its annotation. The groups that
decay and those that do not are already separated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from fundamentallm.training.optimizers import OPTIMIZERS


class Lion(Optimizer):
    """Sign of an interpolation between momentum and gradient (Chen et al. 2023, algorithm 2).

    Args:
        params: parameters or groups of them.
        lr: step size; 3 to 10 times smaller than AdamW's.
        betas: interpolation for the update, and for the momentum.
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            update_beta, momentum_beta = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                update = momentum.lerp(parameter.grad, 1 - update_beta).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - momentum_beta)


@OPTIMIZERS.register("lion")
def lion(
    params: Iterable[Any],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.1,
) -> Optimizer:
    """Build Lion with the options of a configuration."""
    return Lion(params, lr, betas, weight_decay)


def main() -> None:
    """Train a tiny model with it."""
    from fundamentallm.testing import tiny_loaders, tiny_model
    from fundamentallm.training.optimizers import OptimizerBuilder
    from fundamentallm.training.trainer import Trainer

    torch.manual_seed(0)
    train_loader, val_loader = tiny_loaders()
    model = tiny_model()
    optimizer = OptimizerBuilder.build("lion", model, lr=3e-3)
    history = Trainer(model, train_loader, val_loader, optimizer, device="cpu").train(num_epochs=5)
    print(f"validation loss {history.val_loss[0]:.3f} -> {history.val_loss[-1]:.3f}")


if __name__ == "__main__":
    main()
