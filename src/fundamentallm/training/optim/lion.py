"""Lion: the sign of a momentum (Chen et al. 2023, "Symbolic Discovery of Optimization...")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """Moves every weight by the same amount, by the sign of a momentum (algorithm 2).

    With gradient g and momentum m: w <- w - lr (sign(b1 m + (1 - b1) g) + decay w), then
    m <- b2 m + (1 - b2) g. It stores one number per weight, Adam two. A good learning rate is 3 to
    10 times smaller than Adam's, a good weight decay 3 to 10 times larger (section 5).

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: (b1, b2), each in [0, 1).
        weight_decay: decoupled; multiplied by lr.

    Raises:
        ValueError: a beta or the decay is out of range.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what the closure does."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            momenta = [self._momentum(weight) for weight in weights]
            b1, b2 = group["betas"]
            directions = torch._foreach_lerp(momenta, gradients, 1 - b1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, directions, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - b2)
        return loss

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        momentum: Tensor = state["momentum"]
        return momentum


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
