"""Buffers that a forward pass may write to, as BatchNorm does to its running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def kept_buffers(model: nn.Module) -> list[Tensor]:
    """Return copies of the buffers that belong to the model's state; the others are constants."""
    return [buffer.clone() for buffer in _of_state(model)]


@torch.no_grad()
def put_back(model: nn.Module, kept: Sequence[Tensor]) -> None:
    """Give the buffers the values that `kept_buffers` returned."""
    for buffer, value in zip(_of_state(model), kept, strict=True):
        buffer.copy_(value)


def _of_state(model: nn.Module) -> list[Tensor]:
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
