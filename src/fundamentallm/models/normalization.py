"""Normalizations: what each branch of a block sees of the residual stream.

Shapes: (..., D) in and out; D model width.

A normalization of yours is one decorated class or function that returns an `nn.Module`:

```python
@NORMALIZATIONS.register("scalenorm")
class ScaleNorm(nn.Module):
    def __init__(self, width: int, *, eps: float = 1e-5) -> None: ...
```
"""

from __future__ import annotations

from torch import nn

from fundamentallm.errors import ConfigError
from fundamentallm.registry import Registry

NORMALIZATIONS: Registry[nn.Module] = Registry("normalization", supplied=("width", "bias"))


@NORMALIZATIONS.register("layernorm")
def layer_norm(width: int, bias: bool, *, eps: float = 1e-5) -> nn.Module:
    """Return a module to mean 0 and variance 1, then gain and bias (Ba, Kiros and Hinton 2016).

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
def rms_norm(width: int, *, eps: float = 1e-5) -> nn.Module:
    """Return a module to root mean square 1, then a gain (Zhang and Sennrich 2019, equation 4).

    It never has a bias: re-centring is what it leaves out.

    Args:
        width: D; the mean square is taken over this last dimension.
        eps: added to the mean square, > 0.

    Raises:
        ConfigError: eps is not above 0.
    """
    _check_eps(eps)
    return nn.RMSNorm(width, eps=eps)


def _check_eps(eps: float) -> None:
    # Without it a row of zeros becomes NaN.
    if not eps > 0:
        raise ConfigError("eps must be above 0", key="eps", got=repr(eps), expected="a number > 0")
