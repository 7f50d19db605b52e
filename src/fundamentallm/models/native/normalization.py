"""RMSNorm by our own compiled code: one pass each way, where torch takes a dozen backwards.

Shapes: (..., D) in and out; D model width.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fundamentallm.models.layers.normalization import rms_norm
from fundamentallm.models.native.library import any_library

LANES = 16  # numbers in a vector; D is a multiple of it


def native_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return what `rms_norm` does, up to the rounding of float32.

    Tensors that the code does not know, as of another type, go to that.

    Args:
        x: (..., D).
        weight: the gain, (D,).
        eps: added to the mean square.
    """
    floats = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, weight))
    if not floats or weight.size(0) % LANES or not weight.is_contiguous():
        return rms_norm(x, weight, eps)
    out: Tensor = _RMSNorm.apply(x.contiguous(), weight, eps)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(x)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        any_library().fundamentallm_normalize(*_sizes(x), ctypes.c_float(eps), *_at(x, weight, y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        d_y, d_x = d_y.contiguous(), torch.empty_like(x)
        sizes = _sizes(x)
        d_gain = torch.empty(sizes[-1].value, x.size(-1))
        any_library().fundamentallm_normalize_backward(
            *sizes, ctypes.c_float(ctx.eps), *_at(x, weight, d_y, d_x, d_gain)
        )
        return d_x, d_gain.sum(0), None


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ...]:
    width = x.size(-1)
    sizes = (x.numel() // width, width, torch.get_num_threads())
    return tuple(ctypes.c_int64(size) for size in sizes)


def _at(*tensors: Tensor) -> tuple[ctypes.c_void_p, ...]:
    return tuple(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
