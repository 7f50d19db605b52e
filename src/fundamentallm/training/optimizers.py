"""Optimizers by name, over parameters grouped by whether they decay.

The updates are torch's own. An optimizer of yours is one decorated function whose typed
keyword parameters are its options:

```python
@OPTIMIZERS.register("lion")
def lion(params, lr: float, *, betas: tuple[float, float] = (0.9, 0.99)) -> Optimizer: ...
```

Weight decay shrinks linear weights alone. Biases and normalization gains are no maps between
spaces, and an embedding row would shrink in every step in which its token does not occur.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn, optim
from torch.optim import Optimizer

from fundamentallm.registry import Registry

OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", supplied=("params", "lr"))

_KERNEL_DEVICES = {"cpu", "cuda"}


class OptimizerBuilder:
    """Builds an optimizer for a model by name."""

    @staticmethod
    def build(
        optimizer_name: str,
        model: nn.Module,
        lr: float,
        *,
        defaults: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Optimizer:
        """Build the optimizer over `parameter_groups(model)`.

        Args:
            optimizer_name: a name in `OPTIMIZERS`.
            model: on its final device; every parameter that requires a gradient is optimized.
            lr: base learning rate of both groups, finite and above 0.
            defaults: options that this optimizer takes if it has them (a weight decay means
                nothing to "adam"); kwargs win over them.
            kwargs: the optimizer's own options, each of which it must have.

        Raises:
            ConfigError: an unknown optimizer or option, or an option of the wrong type.
            ValueError: lr or an option is out of range, or nothing in the model is trainable.
        """
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"the learning rate must be finite and above 0, got {lr}")
        context = {**(defaults or {}), "params": parameter_groups(model), "lr": lr}
        return OPTIMIZERS.build(optimizer_name, kwargs, **context)


def parameter_groups(model: nn.Module, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a group that decays and one that does not.

    Linear weights decay: the `weight` of each `nn.Linear`, also where it is tied to an embedding.
    Nothing else does, raw `nn.Parameter`s of unknown meaning included; a module that multiplies
    by such a matrix names it in an attribute, `linear_weights = ("experts_in", "experts_out")`.

    Args:
        model: the model; parameters with `requires_grad=False` are left out.
        weight_decay: the decay of the first group; None leaves it to the optimizer's default.

    Returns:
        Two groups for `torch.optim`, named "decay" and "no_decay", in the order of
        `model.named_parameters()`; each parameter is in one of them, once. One may be empty, so
        that the layout of the optimizer's state does not depend on the model.

    Raises:
        ValueError: no parameter is trainable, or a module names a linear weight that it lacks.
    """
    linear = {id(weight) for module in model.modules() for weight in _linear_weights(module)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    return [
        {
            "name": "decay",
            "params": [parameter for parameter in trainable if id(parameter) in linear],
            **({} if weight_decay is None else {"weight_decay": weight_decay}),
        },
        {
            "name": "no_decay",
            "params": [parameter for parameter in trainable if id(parameter) not in linear],
            "weight_decay": 0.0,
        },
    ]


@OPTIMIZERS.register("adamw")
def adamw(
    params: Iterable[Any],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2).

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: each step multiplies a decaying weight by 1 - lr * weight_decay.
    """
    groups = list(params)
    return optim.AdamW(
        groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=_fused(groups)
    )


@OPTIMIZERS.register("adam")
def adam(
    params: Iterable[Any],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimizer:
    """Adam (Kingma and Ba 2015, algorithm 1), without decay.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
    """
    groups = list(params)
    return optim.Adam(groups, lr=lr, betas=betas, eps=eps, fused=_fused(groups))


@OPTIMIZERS.register("sgd")
def sgd(
    params: Iterable[Any],
    lr: float,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Stochastic gradient descent with momentum.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: share of the last update direction that is kept, >= 0.
        nesterov: look ahead along the momentum (Sutskever et al. 2013).
        weight_decay: times the weight, added to a decaying weight's gradient (L2).
    """
    groups = list(params)
    return optim.SGD(
        groups,
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        fused=_fused(groups),
    )


@OPTIMIZERS.register("rmsprop")
def rmsprop(
    params: Iterable[Any],
    lr: float,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> Optimizer:
    """RMSprop (Hinton 2012, lecture 6e), which has no fused kernel.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        alpha: decay rate of the mean squared gradient.
        eps: added to its root.
        momentum: share of the last update that is kept, >= 0.
        weight_decay: times the weight, added to a decaying weight's gradient (L2).
    """
    groups = list(params)
    return optim.RMSprop(
        groups,
        lr=lr,
        alpha=alpha,
        eps=eps,
        momentum=momentum,
        weight_decay=weight_decay,
        foreach=_on_kernel_devices(groups) or None,
    )


def _linear_weights(module: nn.Module) -> list[nn.Parameter]:
    own = dict(module.named_parameters(recurse=False))
    names = list(getattr(module, "linear_weights", ()))
    if missing := [name for name in names if name not in own]:
        raise ValueError(
            f"linear_weights of {type(module).__name__} names {', '.join(missing)}, "
            f"expected parameters among {', '.join(own) or 'none'}"
        )
    # A linear layer may lack the name: pruning and parametrization put another in its place.
    if isinstance(module, nn.Linear) and "weight" in own:
        names.append("weight")
    return [own[name] for name in names]


def _fused(groups: list[Any]) -> bool | None:
    """Ask for the fused kernel where it exists; None leaves the choice to torch."""
    floating = all(parameter.is_floating_point() for parameter in _parameters(groups))
    return True if floating and _on_kernel_devices(groups) else None


def _on_kernel_devices(groups: list[Any]) -> bool:
    return all(parameter.device.type in _KERNEL_DEVICES for parameter in _parameters(groups))


def _parameters(groups: list[Any]) -> list[nn.Parameter]:
    return [
        parameter
        for group in groups
        for parameter in (group["params"] if isinstance(group, dict) else [group])
    ]
