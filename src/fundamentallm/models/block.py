"""The transformer block: two branches that read the residual stream and add to it.

```
x ----+-- norm -- attention ----- dropout --(+)--+-- norm -- feed-forward -- dropout --(+)---- y
      |                                      ^   |                                      ^
      +--------------------------------------+   +--------------------------------------+
```

Shapes: B batch, T time, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from fundamentallm.models.attention import Attend, Attention
from fundamentallm.models.positions import Marks


class Block(nn.Module):
    """A pre-norm transformer block (Xiong et al. 2020, figure 1b).

    Args:
        attention_norm: (B, T, D) -> (B, T, D), before the attention.
        attention: mixes positions.
        feedforward_norm: (B, T, D) -> (B, T, D), before the feed-forward.
        feedforward: (B, T, D) -> (B, T, D), at each position by itself.
        dropout: probability of dropping an element of what a branch adds, in training only.
    """

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: Attention,
        feedforward_norm: nn.Module,
        feedforward: nn.Module,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feedforward_norm = feedforward_norm
        self.feedforward = feedforward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Marks, attend: Attend | None = None) -> Tensor:
        """Return the residual stream (B, T, D) after this block, from the one before it.

        Args:
            x: (B, T, D).
            positions, attend: as in `Attention.forward`.
        """
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, attend))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))  # type: ignore[no-any-return]
