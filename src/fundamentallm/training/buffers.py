"""Buffers that a forward pass may change, such as the running statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StateBuffers:
    """The buffers that belong to a model's state; the others are constants.

    Args:
        model: on its device already.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            buffer
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]

    def copied(self) -> list[Tensor]:
        """Return copies of their values."""
        return [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def put_back(self, values: Sequence[Tensor]) -> None:
        """Restore the values that `copied` returned."""
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer.copy_(value)
