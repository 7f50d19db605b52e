"""A share of the token before, added to each embedding.

Which token came last decides much of what comes next, above all among characters. Attention has to
learn to look one place back, which takes the first layer; this is there from the first step, for D
parameters and next to no time. After the token shift of Peng et al. 2023, "RWKV", section 3.1, here
of the embeddings only, as in the speed runs of modded-nanogpt ("smear").

Shapes: B batch, T time, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenShift(nn.Module):
    """x_t + w x_(t-1), channel by channel, w from 0: at the start nothing is added.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Return the sum (B, T, D) from the embeddings and those one place before, (B, T, D)."""
        return x + self.weight * before


def one_before(x: Tensor) -> Tensor:
    """Return (B, T, D) of which row t is row t - 1 of x; row 0 is 0."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1]
