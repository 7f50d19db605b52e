"""Normalizations: what each branch of a block sees of the residual stream.

Shapes: (..., D) in and out; D model width.

A normalization of yours is one decorated class or function that returns an `nn.Module`:

```python
@NORMALIZATIONS.register("scalenorm")
class ScaleNorm(nn.Module):
    def __init__(self, width: int, *, eps: Positive = 1e-5) -> None: ...
```
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm.config.base import Positive
from fundamentallm.errors import ConfigError
from fundamentallm.registry import Registry

NORMALIZATIONS: Registry[nn.Module] = Registry("normalization", supplied=("width", "bias"))


@NORMALIZATIONS.register("layernorm")
def layer_norm(width: int, bias: bool, *, eps: Positive = 1e-5) -> nn.Module:
    """To mean 0 and variance 1, then gain and bias (Ba, Kiros and Hinton 2016).

    Args:
        width: D; mean and variance are taken over this last dimension.
        bias: whether there is a bias beside the gain.
        eps: added to the variance, > 0.

    Raises:
        ConfigError: eps is not above 0.
    """
    _check_eps(eps)
    return nn.LayerNorm(width, eps=eps, bias=bias)


@NORMALIZATIONS.register("rmsnorm")
class RMSNorm(nn.Module):
    """To root mean square 1, then a gain (Zhang and Sennrich 2019, equation 4).

    It never has a bias: re-centring is what it leaves out.

    Args:
        width: D; the mean square is taken over this last dimension.
        eps: added to the mean square, > 0.

    Attributes:
        kernel: how it is computed; set another function of the form of `rms_norm` at any time.

    Raises:
        ConfigError: eps is not above 0.
    """

    def __init__(self, width: int, *, eps: Positive = 1e-5) -> None:
        super().__init__()
        _check_eps(eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.kernel: Callable[[Tensor, Tensor, float], Tensor] = rms_norm

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) from (..., D), in the type of the gain."""
        # Under autocast a linear layer hands over bfloat16, and the gain is float32.
        x = x.to(self.weight.dtype)
        return self.kernel(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x (..., D) to root mean square 1 along D, times the gain (D,)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def _check_eps(eps: float) -> None:
    # Without it a row of zeros becomes NaN.
    if not eps > 0:
        raise ConfigError("eps must be above 0", key="eps", got=repr(eps), expected="a number > 0")
