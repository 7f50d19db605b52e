"""Feed-forwards: what a block computes at each position separately.

Shapes: (..., D) in and out; D model width, F hidden width.

A feed-forward of yours is one decorated class:

```python
@FEEDFORWARDS.register("relu")
class ReLU(nn.Module):
    def __init__(self, width: int, hidden_width: int, bias: bool) -> None: ...
```

The linear layer that writes into the residual stream is called `output` in each of them; the
initialisation knows it by that name. Dropout on what leaves the feed-forward is the block's work;
a feed-forward that wants it elsewhere takes a parameter `dropout`.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm.registry import Registry

FEEDFORWARDS: Registry[nn.Module] = Registry(
    "feed-forward", supplied=("width", "hidden_width", "bias", "dropout")
)


@FEEDFORWARDS.register("gelu")
class GELUFeedForward(nn.Module):
    """output(GELU(input(x))) (Hendrycks and Gimpel 2016), as in GPT-2.

    Args:
        width: D.
        hidden_width: F.
        bias: whether the linear layers have biases.
        approximate: "none" for x * Phi(x), "tanh" for the approximation that GPT-2 was trained
            with (section 2 of the paper); they differ by up to 0.0005.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        bias: bool,
        *,
        approximate: Literal["none", "tanh"] = "none",
    ) -> None:
        super().__init__()
        self.input = nn.Linear(width, hidden_width, bias=bias)
        self.output = nn.Linear(hidden_width, width, bias=bias)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) from (..., D)."""
        hidden: Tensor = F.gelu(self.input(x), approximate=self.approximate)
        return self.output(hidden)  # type: ignore[no-any-return]


@FEEDFORWARDS.register("swiglu")
class SwiGLUFeedForward(nn.Module):
    """output(SiLU(gate(x)) * input(x)) (Shazeer 2020, equation 6), as in Llama.

    It has three matrices where the others have two, hence the narrower default hidden width.

    Args:
        width: D.
        hidden_width: F.
        bias: whether the linear layers have biases.
    """

    def __init__(self, width: int, hidden_width: int, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden_width, bias=bias)
        self.input = nn.Linear(width, hidden_width, bias=bias)
        self.output = nn.Linear(hidden_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) from (..., D)."""
        return self.output(F.silu(self.gate(x)) * self.input(x))  # type: ignore[no-any-return]


@FEEDFORWARDS.register("relu_squared")
class SquaredReLUFeedForward(nn.Module):
    """output(ReLU(input(x))^2) (So et al. 2021, "Primer", section 3.1).

    Args:
        width: D.
        hidden_width: F.
        bias: whether the linear layers have biases.
    """

    def __init__(self, width: int, hidden_width: int, bias: bool) -> None:
        super().__init__()
        self.input = nn.Linear(width, hidden_width, bias=bias)
        self.output = nn.Linear(hidden_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) from (..., D)."""
        return self.output(F.relu(self.input(x)).square())  # type: ignore[no-any-return]
