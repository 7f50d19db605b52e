"""From a configuration to the step that it describes: precision, kernel, compilation, ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.models.attention import choose_kernel, use_kernel
from fundamentallm.training.compilation import compiled, resolve_compile, uncompile
from fundamentallm.training.distributed import Ranks
from fundamentallm.training.precision import Precision, resolve_bf16_weights, resolve_precision
from fundamentallm.training.step import TrainStep


def build_precision(config: TrainingConfig, model: nn.Module, device: torch.device) -> Precision:
    """Return the precision that a configuration means for a model on a device.

    Raises:
        ConfigError: as `resolve_precision`.
    """
    if config.compile == "native":  # also where the precision is auto
        return Precision("bf16", device)
    name = resolve_precision(config.precision, config.mixed_precision, device)
    follows = getattr(model, "follows_weight_type", None)
    return Precision(name, device, resolve_bf16_weights(config.bf16_weights, name, device, follows))


def build_step(
    config: TrainingConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[..., Tensor],
    precision: Precision,
    ranks: Ranks,
    notify: Callable[[TrainingEvents], None] = lambda event: None,
    batch_shape: tuple[int | None, int | None] = (None, None),
) -> TrainStep:
    """Return the step of a model that is on its device; the compiler runs at its first call.

    Args:
        config: attention, compilation, gradient checkpointing and clipping.
        model, optimizer, loss_fn, precision, ranks, notify: as for `TrainStep`.
        batch_shape: rows and tokens of a whole micro-batch, as far as they are known; what is
            compiled is compiled for it.

    Raises:
        ConfigError, MachineError: as `resolve_compile` and `compiled`.
    """
    if config.gradient_checkpointing:
        model.gradient_checkpointing = True  # type: ignore[assignment]
    context = getattr(model, "sequence_length", 0)
    device = precision.device
    use_kernel(model, choose_kernel(config.attention, device, precision.bf16_weights, context))
    uncompile(model)  # of a former step, which may have had another precision
    forward = model
    if choice := resolve_compile(config.compile):
        forward = compiled(forward, *batch_shape, native=choice == "native")
    if not ranks.alone:
        forward = DistributedDataParallel(
            forward,
            device_ids=[device.index] if device.type == "cuda" else None,
            **_without_buffer_sync(),
        )
    return TrainStep(
        forward,
        model,
        optimizer,
        loss_fn,
        precision,
        ranks,
        config.max_grad_norm,
        notify,
        config.max_grad_value,
    )


def _without_buffer_sync() -> dict[str, Any]:
    """Return the options that keep DDP from sending buffers: ours are constants on every rank.

    Newer releases of torch warn at the name that older ones need.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}
