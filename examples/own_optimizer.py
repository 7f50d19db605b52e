"""An optimizer of your own: AdaBelief, without touching the package.

    python examples/own_optimizer.py
    PYTHONPATH=examples fundamentallm run train \\
        --plugins own_optimizer training.optimizer=adabelief training.learning_rate=2e-3

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


class AdaBelief(Optimizer):
    """Adam that divides by how far gradients stray from their mean (Zhuang et al. 2020, alg. 2).

    A gradient as expected gets a long step, a surprising one a short one.

    Args:
        params: parameters or groups of them.
        lr: step size, as for AdamW.
        betas: decay of the mean, and of the squared distance to it.
        eps: added to that square in each step, and to its root.
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            (beta1, beta2), eps = group["betas"], group["eps"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["mean"] = torch.zeros_like(parameter)
                    state["surprise"] = torch.zeros_like(parameter)
                state["step"] += 1
                mean, surprise = state["mean"], state["surprise"]
                mean.lerp_(parameter.grad, 1 - beta1)
                stray = parameter.grad - mean
                surprise.mul_(beta2).addcmul_(stray, stray, value=1 - beta2).add_(eps)
                # Both averages begin at 0; this makes up for it.
                mean_scale = 1 - beta1 ** state["step"]
                surprise_scale = 1 - beta2 ** state["step"]
                distance = (surprise / surprise_scale).sqrt_().add_(eps)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(mean, distance, value=-group["lr"] / mean_scale)


@OPTIMIZERS.register("adabelief")
def adabelief(
    params: Iterable[Any],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-12,
    weight_decay: float = 0.01,
) -> Optimizer:
    """Build AdaBelief with the options of a configuration."""
    return AdaBelief(params, lr, betas, eps, weight_decay)


def main() -> None:
    """Train a tiny model with it."""
    from fundamentallm.testing import tiny_loaders, tiny_model
    from fundamentallm.training.optimizers import OptimizerBuilder
    from fundamentallm.training.trainer import Trainer

    torch.manual_seed(0)
    train_loader, val_loader = tiny_loaders()
    model = tiny_model()
    optimizer = OptimizerBuilder.build("adabelief", model, lr=1e-2)
    history = Trainer(model, train_loader, val_loader, optimizer, device="cpu").train(num_epochs=5)
    print(f"validation loss {history.val_loss[0]:.3f} -> {history.val_loss[-1]:.3f}")


if __name__ == "__main__":
    main()
