"""Losses that fail where a test asks for it."""

from __future__ import annotations

import math

from torch import Tensor

from fundamentallm.training.losses import compute_loss


class NaNAt:
    """Cross-entropy, but NaN at its calls of these numbers, from 1."""

    is_nll = True

    def __init__(self, *calls: int) -> None:
        self.calls = calls
        self.count = 0

    def __call__(self, logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        self.count += 1
        loss = compute_loss(logits, targets, reduction)
        return loss * math.nan if self.count in self.calls else loss
