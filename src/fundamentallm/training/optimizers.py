"""Optimizers by name, over parameters grouped by whether they decay.

The updates are torch's, except Lion and Muon, which have separate files. Your own
optimizer is one decorated function whose typed keyword parameters are its options:

```python
@OPTIMIZERS.register("signsgd")
def sign_sgd(params, lr: float, *, momentum: float = 0.9) -> Optimizer: ...
```

One that treats layers by their kind takes a parameter `model` as well. Each group has its own
learning rate, and a schedule multiplies them all by the same number.

Weight decay shrinks only linear weights. Biases and normalization gains are not maps between
spaces, and an embedding row would shrink in every step in which its token does not occur.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn, optim
from torch.optim import Optimizer

from fundamentallm.compute.plan import Machine
from fundamentallm.compute.precision import has_bf16
from fundamentallm.config.base import Count, NonNegative, Positive, Share
from fundamentallm.config.component import Component
from fundamentallm.config.training import TrainingConfig
from fundamentallm.registry import Registry
from fundamentallm.training.optim.lion import Lion
from fundamentallm.training.optim.muon import Muon, Scale, hidden_matrices

OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", supplied=("params", "lr", "model"))

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
            lr: base learning rate, finite and above 0.
            defaults: options that apply if the optimizer has them (weight decay means
                nothing to "adam"); kwargs win over them.
            kwargs: the optimizer's own options, which must exist.

        Raises:
            ConfigError: an unknown optimizer or option, or an option of the wrong type.
            ValueError: lr or an option is out of range, or nothing in the model is trainable.
        """
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"the learning rate must be finite and above 0, got {lr}")
        groups = parameter_groups(model)
        context = {**(defaults or {}), "params": groups, "lr": lr, "model": model}
        return OPTIMIZERS.build(optimizer_name, kwargs, **context)

    @staticmethod
    def from_config(config: TrainingConfig, model: nn.Module) -> Optimizer:
        """Build the optimizer that a configuration names.

        Raises:
            ConfigError, ValueError: as `build`.
        """
        return OptimizerBuilder.build(
            config.optimizer.name,
            model,
            config.learning_rate,
            defaults={
                "eps": config.optimizer_eps,
                "weight_decay": config.optimizer_weight_decay,
            },
            **config.optimizer.options,
        )


def with_plain_dtype(optimizer: Component, machine: Machine) -> Component:
    """Return an optimizer's choice with the type that its `dtype: auto` means on a machine.

    On a CPU that is the type of the faster products. A run resolves it once, before its first step,
    and stores the result. Without a written `dtype: auto` nothing changes.

    Args:
        optimizer: as a configuration has it.
        machine: every one of its ranks must call this.
    """
    if optimizer.options.get("dtype") != "auto":
        return optimizer
    narrow = machine.device.type in ("cpu", "cuda") and not machine.is_slow_in_bf16()
    narrow = narrow and has_bf16(machine.device)
    dtype = "bfloat16" if narrow else "float32"
    return optimizer.model_copy(update={"options": {**optimizer.options, "dtype": dtype}})


def parameter_groups(model: nn.Module, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a group that decays and one that does not.

    Linear weights decay: the `weight` of each `nn.Linear` (and of the `Conv1D` of `transformers`,
    which is one), also where it is tied to an embedding.
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
    betas: tuple[Share, Share] = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0.01,
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
    betas: tuple[Share, Share] = (0.9, 0.999),
    eps: NonNegative = 1e-8,
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
    momentum: NonNegative = 0.9,
    nesterov: bool = False,
    weight_decay: NonNegative = 0.0,
) -> Optimizer:
    """Stochastic gradient descent with momentum.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: share of the last update direction that is kept, >= 0.
        nesterov: look ahead along the momentum (Sutskever et al. 2013).
        weight_decay: this times a decaying weight is added to its gradient (L2).
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
    alpha: Share = 0.99,
    eps: NonNegative = 1e-8,
    momentum: NonNegative = 0.0,
    weight_decay: NonNegative = 0.0,
) -> Optimizer:
    """RMSprop (Hinton 2012, lecture 6e), which has no fused kernel.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        alpha: decay rate of the mean squared gradient.
        eps: added to the root of the mean squared gradient.
        momentum: share of the last update that is kept, >= 0.
        weight_decay: this times a decaying weight is added to its gradient (L2).
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


@OPTIMIZERS.register("lion")
def lion(
    params: Iterable[Any],
    lr: float,
    *,
    betas: tuple[Share, Share] = (0.9, 0.99),
    weight_decay: NonNegative = 0.01,
) -> Optimizer:
    """The sign of a momentum (Chen et al. 2023, algorithm 2): see `Lion`.

    Args:
        params: parameters or groups of them.
        lr: learning rate, by which every weight moves in each step.
        betas: share of the momentum in the direction, and its decay rate, each in [0, 1).
        weight_decay: each step multiplies a decaying weight by 1 - lr * weight_decay.
    """
    return Lion(list(params), lr, betas, weight_decay)


@OPTIMIZERS.register("muon")
def muon(
    params: Iterable[Any],
    lr: float,
    model: nn.Module,
    *,
    momentum: Share = 0.95,
    nesterov: bool = True,
    num_steps: Count = 5,
    scale: Scale = "spectral",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    row_beta: Annotated[Share | None, Field(examples=[0.95])] = None,
    weight_decay: NonNegative = 0.01,
    adamw_lr: Positive = 3e-3,
    head_lr: Annotated[Positive | None, Field(examples=[1e-3])] = None,
    embedding_lr: Annotated[Positive | None, Field(examples=[1e-3])] = None,
    vector_lr: Annotated[Positive | None, Field(examples=[1e-3])] = None,
    betas: tuple[Share, Share] = (0.9, 0.95),
    eps: NonNegative = 1e-8,
) -> Optimizer:
    """Orthogonalized momentum for hidden matrices (see `Muon`), AdamW for the rest.

    Its groups are "matrices", "head" (other linear weights, a tied head among them),
    "embeddings" and "vectors"; the first two decay.

    Args:
        params: the groups of `parameter_groups`.
        lr: learning rate of the matrices.
        model: tells an embedding and the head from other layers.
        momentum: share of the past in the momentum of a matrix, in [0, 1).
        nesterov: look ahead along the momentum.
        num_steps: Newton-Schulz iterations, >= 1.
        scale: how a matrix's learning rate follows its shape: "spectral" or "adamw".
        dtype: type of the iterations; auto: bfloat16 on a GPU that has it, else float32; where a
            configuration says auto, the faster of both on a CPU, chosen when a run begins.
        row_beta: share of the past in the mean square of a row, by whose root the row of an update
            is divided (NorMuon), in [0, 1); None: rows stay as they are.
        weight_decay: each step multiplies a decaying weight by 1 - (its lr) * weight_decay.
        adamw_lr: learning rate of all that is no hidden matrix.
        head_lr, embedding_lr, vector_lr: learning rate of the head, of the embeddings, or of biases
            and gains; None: `adamw_lr`.
        betas: decay rates of AdamW's moments, each in [0, 1).
        eps: added to the root of AdamW's second moment.

    Raises:
        ValueError: a number is out of range.
    """
    # AdamW checks its arguments, but not its groups.
    optim.AdamW([nn.Parameter(torch.empty(0))], adamw_lr, betas, eps, weight_decay)
    decaying, others = (group["params"] for group in params)
    matrices = hidden_matrices(model, decaying)
    hidden = {id(weight) for weight in matrices}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    adamw_groups = [
        ("head", [p for p in decaying if id(p) not in hidden], head_lr, weight_decay),
        ("embeddings", [p for p in others if id(p) in tables], embedding_lr, 0.0),
        ("vectors", [p for p in others if id(p) not in tables], vector_lr, 0.0),
    ]
    groups: list[dict[str, Any]] = []
    for name, weights, own_lr, decay in adamw_groups:
        rate = adamw_lr if own_lr is None else own_lr
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"the learning rate of the {name} must be above 0, got {rate}")
        options = {"betas": betas, "eps": eps, "weight_decay": decay, "fused": _fused(weights)}
        groups.append({"name": name, "params": weights, "lr": rate, **options})
    return Muon(
        {"name": "matrices", "params": matrices, "lr": lr, "weight_decay": weight_decay},
        groups,
        momentum=momentum,
        nesterov=nesterov,
        num_steps=num_steps,
        scale=scale,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        row_beta=row_beta,
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
    if isinstance(module, _linear_kinds()) and "weight" in own:
        names.append("weight")
    return [own[name] for name in names]


def _linear_kinds() -> tuple[type[nn.Module], ...]:
    """Return the linear layers: torch's, and that of GPT-2 in `transformers`, if it is imported."""
    theirs = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear,) if theirs is None else (nn.Linear, theirs.Conv1D)


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
