"""The transformer block: two branches that read the residual stream and add to it.

With a residual mix, x is first a x + b x0, where x0 is the input of the first block.

```
x ----+-- norm -- attention ----- dropout --(+)--+-- norm -- feed-forward -- dropout --(+)---- y
      |                                      ^   |                                      ^
      +--------------------------------------+   +--------------------------------------+
```

Shapes: B batch, T time, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fundamentallm.models.layers.attention import Attend, Attention
from fundamentallm.models.layers.positions import Marks


class ResidualMix(nn.Module):
    """a x + b x0 with trained scalars, from (1, 0): the embedding stays within reach at any depth.

    From the speed runs of modded-nanogpt (Jordan et al. 2024, "x = lambda_0 x + lambda_1 x_0").
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Return the mixture (B, T, D) of the stream and the embeddings, both (B, T, D)."""
        return self.weights[0] * x + self.weights[1] * embedded


class Block(nn.Module):
    """A pre-norm transformer block (Xiong et al. 2020, figure 1b).

    Args:
        attention_norm: (B, T, D) -> (B, T, D), before the attention.
        attention: mixes positions.
        feedforward_norm: (B, T, D) -> (B, T, D), before the feed-forward.
        feedforward: (B, T, D) -> (B, T, D), at each position separately.
        dropout: probability of dropping an element of what a branch adds, in training only.
        residual_mix: whether the block reads a trained mixture of stream and embeddings.
    """

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: Attention,
        feedforward_norm: nn.Module,
        feedforward: nn.Module,
        dropout: float = 0.0,
        residual_mix: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feedforward_norm = feedforward_norm
        self.feedforward = feedforward
        # Without dropout nothing here depends on the mode, which compiled code would have to ask.
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.residual_mix = ResidualMix() if residual_mix else None

    def forward(
        self, x: Tensor, positions: Marks, embedded: Tensor, attend: Attend | None = None
    ) -> Tensor:
        """Return the residual stream (B, T, D) after this block, from the one before it.

        Args:
            x: (B, T, D).
            positions, attend: as in `Attention.forward`.
            embedded: (B, T, D), the input of the first block; read only by a residual mix.
        """
        if self.residual_mix is not None:
            x = self.residual_mix(x, embedded)
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, attend))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))  # type: ignore[no-any-return]
