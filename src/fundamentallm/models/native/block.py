"""The model's block by our own compiled code, in one call forwards and one backwards.

Products are of bfloat16 or of float32, with float32 sums. All else is float32: the residual stream,
which general code in bfloat16 would narrow too, normalizations, softmax, and the sums of the
weights' gradients.

Shapes: B rows, T tokens, D model width, H heads of width K, G key and value heads, E = G K.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fundamentallm.config.model import ModelConfig, TransformerConfig
from fundamentallm.errors import ConfigError
from fundamentallm.models.layers.block import Block
from fundamentallm.models.layers.feedforward import (
    GELUFeedForward,
    SquaredReLUFeedForward,
    SwiGLUFeedForward,
)
from fundamentallm.models.layers.normalization import RMSNorm
from fundamentallm.models.layers.positions import RotaryPositions
from fundamentallm.models.native.library import load_library

SIDE = 32  # of a block of a product: widths and lengths are multiples of it
LONGEST = 4096  # tokens: a thread holds the scores of one head, which grow with their square
LARGEST = 16 << 20  # weights of a block: each thread sums up all of their gradients

_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FEEDFORWARDS = (SquaredReLUFeedForward, GELUFeedForward, SwiGLUFeedForward)
_WEIGHTS = (
    *("mix", "gain1", "query", "key", "value", "query_gain", "key_gain", "output"),
    *("gain2", "gate", "input", "feed_output"),
)
_INPUTS = ("x", "embedded", "cosines", "sines", *_WEIGHTS)
_KEPT = ("packed", "raw", "read", "lse", "middle", "before")
_GRADIENTS = ("d_x", "d_embedded", *(f"d_{name}" for name in _WEIGHTS))


Kept = tuple[Tensor | None, ...]
"""Buffers in the order of `_KEPT`."""


class _Sizes(NamedTuple):
    batch: int
    time: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    feedforward: int
    threads: int
    eps: float
    qk_eps: float
    keep: float


class _Arguments(ctypes.Structure):
    """`Block` of `block.cpp`, field by field. Pointers do not keep their tensors alive."""

    _fields_: ClassVar = [
        *(
            (name, ctypes.c_int64 if kind is int else ctypes.c_float)
            for name, kind in get_type_hints(_Sizes).items()
        ),
        ("seed", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (*_WEIGHTS, "cosines", "sines", "packed", "x", "embedded", "y")
        ),
        *((name, ctypes.c_void_p) for name in (*_KEPT[1:], "d_y", *_GRADIENTS)),
    ]

    def point(self, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
        """Set pointers to tensors; a name without a tensor stays null."""
        for name, tensor in zip(names, tensors, strict=False):
            if tensor is not None:
                setattr(self, name, tensor.data_ptr())


def why_not(config: ModelConfig, device: torch.device) -> str:
    """Return why a model's blocks cannot be computed here; empty if they can."""
    if device.type != "cpu":
        return f"device {device}: it is for CPUs"
    if not isinstance(config, TransformerConfig):
        return f"family {config.family}: not a transformer"
    if config.adapter is not None:
        return f"adapter {config.adapter.name}: it changes the block"
    length = config.sequence_length
    sizes = {
        "d_model": config.d_model,
        "d_model / num_heads": config.head_width,
        **({} if length is None else {"sequence_length": length}),
    }
    if wrong := [f"{name} {size}" for name, size in sizes.items() if size % SIDE]:
        return f"{', '.join(wrong)}: not a multiple of {SIDE}"
    if length is not None and length > LONGEST:
        return f"sequence_length {length}: above {LONGEST}"
    width, kv_width = config.d_model, config.kv_heads * config.head_width
    inputs = 2 if config.feedforward.name == "swiglu" else 1
    weights = width * (2 * width + 2 * kv_width + (inputs + 1) * config.hidden_width)
    if weights > LARGEST:
        return f"{weights:,} weights a block: above {LARGEST:,}"
    if config.normalization.name != "rmsnorm":
        return f"normalization {config.normalization.name}: not rmsnorm"
    if config.positions.name not in ("rotary", "learned", "sinusoidal"):
        return f"positions {config.positions.name}: not among those of the package"
    if config.feedforward.name not in ("relu_squared", "gelu", "swiglu"):
        return f"feedforward {config.feedforward.name}: not among those of the package"
    if config.feedforward.options.get("approximate", "none") != "none":
        return "feedforward gelu with approximate: tanh"
    if config.bias:
        return "bias: true"
    return ""


def require_native(config: ModelConfig, device: torch.device) -> None:
    """Check that a model's blocks can be computed here.

    Raises:
        ConfigError: they cannot.
    """
    reason = why_not(config, device)
    if reason:
        raise ConfigError(
            "compile: native does not support this model's block",
            key="compile",
            got=reason,
            fix="change that, or set training.compile to auto or true",
        )


class NativeBlocks:
    """Calls blocks through the compiled code where it supports them, in place of `run_block`.

    This depends only on shapes and types, so that a resumed run continues with the
    code that it began with. The model must be one of which `why_not` knows no reason.

    Args:
        plain: `plain(block, x, positions, embedded)`, for all other calls: without autocast to
            bfloat16, or with it for float32, lengths that are not multiples of 32 tokens (a
            growing sample), weights of another type.
        precision: "bf16" or "fp32", the type of the products.

    Raises:
        MachineError: as `load_library`.
    """

    def __init__(self, plain: Callable[..., Tensor], precision: str = "bf16") -> None:
        self.plain = plain
        self.precision = precision
        self.library = load_library(precision)
        self._sizes: _Sizes | None = None
        self._free: list[Kept] = []
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeBlocks:
        return NativeBlocks(self.plain, self.precision)  # a library has no copies

    def __call__(self, block: nn.Module, x: Tensor, positions: nn.Module, embedded: Tensor) -> Any:
        """Return `plain(block, x, positions, embedded)` up to rounding."""
        weights = _weights_of(block) if isinstance(block, Block) else None
        if weights is None or not _serves(self.precision, x, weights):
            return self.plain(block, x, positions, embedded)
        assert isinstance(block, Block)
        angles: tuple[Tensor | None, Tensor | None] = (None, None)
        if isinstance(positions, RotaryPositions):
            angles = positions.cosines, positions.sines
        inputs = (x.contiguous(), embedded.contiguous(), *angles, *weights)
        sizes = _sizes_of(block, x)
        seed = int(torch.randint(2**62, ())) if sizes.keep < 1 else 0
        if torch.is_grad_enabled():
            return _NativeBlock.apply(self, sizes, seed, *inputs)  # type: ignore[no-untyped-call]
        y, kept = self.forward(sizes, seed, inputs, trains=False)
        self.give_back(sizes, kept)
        return y

    def forward(
        self, sizes: _Sizes, seed: int, inputs: Sequence[Tensor | None], trains: bool
    ) -> tuple[Tensor, Kept]:
        """Return the output and, where it `trains`, what else the backward pass reads."""
        x = inputs[0]
        assert x is not None
        y = torch.empty_like(x)
        arguments = _Arguments(**sizes._asdict(), seed=seed)
        with self._lock:
            known = sizes == self._sizes and self._free
            kept = self._free.pop() if known else None
        if kept is None:
            packed = self.library.fundamentallm_packed_size(ctypes.byref(arguments))
            kept = _buffers(sizes, packed, _TYPES[self.precision])
        arguments.point(_INPUTS, inputs)
        arguments.point(_KEPT if trains else _KEPT[:1], kept)
        arguments.y = y.data_ptr()
        self.library.fundamentallm_forward(ctypes.byref(arguments))
        return y, kept

    def backward(
        self,
        sizes: _Sizes,
        seed: int,
        inputs: Sequence[Tensor | None],
        kept: Kept,
        d_y: Tensor,
    ) -> list[Tensor | None]:
        """Return the gradients of x, the embeddings and the weights, from that of the output."""
        x, embedded, _, _, *weights = inputs
        assert x is not None
        mixes = weights[0] is not None
        gradients = [
            None if tensor is None else torch.empty_like(tensor)
            for tensor in (x, embedded if mixes else None, *weights)
        ]
        arguments = _Arguments(**sizes._asdict(), seed=seed)
        arguments.point(_INPUTS, inputs)
        arguments.point(_KEPT, kept)
        arguments.point(_GRADIENTS, gradients)
        d_y = d_y.contiguous()
        arguments.d_y = d_y.data_ptr()
        self.library.fundamentallm_backward(ctypes.byref(arguments))
        return gradients

    def give_back(self, sizes: _Sizes, kept: Kept) -> None:
        """Take back buffers that are no longer read, for the next call of the same shape."""
        if any(tensor is not None and tensor.is_inference() for tensor in kept):
            return  # no training step could save them
        with self._lock:
            if sizes != self._sizes:
                self._sizes, self._free = sizes, []
            self._free.append(kept)


def _sizes_of(block: Block, x: Tensor) -> _Sizes:
    batch, time, width = x.shape
    attention, feedforward = block.attention, block.feedforward
    return _Sizes(
        batch=batch,
        time=time,
        width=width,
        heads=width // attention.head_width,
        kv_heads=attention.key.weight.size(0) // attention.head_width,
        hidden=-(-feedforward.output.weight.size(1) // SIDE) * SIDE,  # type: ignore[union-attr, operator]
        feedforward=_FEEDFORWARDS.index(type(feedforward)),
        threads=torch.get_num_threads(),
        eps=block.attention_norm.eps,  # type: ignore[arg-type]
        qk_eps=getattr(attention.query_norm, "eps", 0.0),
        keep=1 - attention.dropout if block.training else 1.0,
    )


def _buffers(sizes: _Sizes, packed: int, operands: torch.dtype) -> Kept:
    """Return new buffers; `operands`: the type of those that products read."""
    batch, time, width, heads = sizes.batch, sizes.time, sizes.width, sizes.heads
    raw_width = width + 2 * sizes.kv_heads * (width // heads)
    gated = _FEEDFORWARDS[sizes.feedforward] is SwiGLUFeedForward
    keeps = operands == torch.float32  # products in bfloat16 are faster than memory
    return (
        torch.empty(packed, dtype=operands),
        torch.empty(batch, time, raw_width, dtype=operands),
        torch.empty(batch, time, width, dtype=operands),
        torch.empty(batch, heads, time),
        torch.empty(batch, time, width),
        torch.empty(batch, time, (1 + gated) * sizes.hidden) if keeps else None,
    )


def _weights_of(block: Block) -> list[Tensor | None] | None:
    """Return the weights in the order of `_WEIGHTS`; None for an unknown kind of block."""
    attention, feedforward = block.attention, block.feedforward
    if not isinstance(feedforward, _FEEDFORWARDS):
        return None
    if not all(isinstance(n, RMSNorm) for n in (block.attention_norm, block.feedforward_norm)):
        return None
    if getattr(block.dropout, "p", 0.0) != attention.dropout:
        return None
    gated = isinstance(feedforward, SwiGLUFeedForward)
    normed = isinstance(attention.query_norm, RMSNorm)
    first = feedforward.gate if isinstance(feedforward, SwiGLUFeedForward) else feedforward.input
    return [
        None if block.residual_mix is None else block.residual_mix.weights,
        block.attention_norm.weight,  # type: ignore[list-item]
        attention.query.weight,
        attention.key.weight,
        attention.value.weight,
        attention.query_norm.weight if normed else None,  # type: ignore[list-item]
        attention.key_norm.weight if normed else None,  # type: ignore[list-item]
        attention.output.weight,
        block.feedforward_norm.weight,  # type: ignore[list-item]
        _filled(first.weight, 0),
        _filled(feedforward.input.weight, 0) if gated else None,
        _filled(feedforward.output.weight, 1),
    ]


def _filled(weight: Tensor, dimension: int) -> Tensor:
    """Round a dimension, the hidden width, up to a multiple of `SIDE`.

    The zeros stay zero through all feed-forwards, and their gradients are cut off again.
    """
    missing = -weight.size(dimension) % SIDE
    if not missing:
        return weight
    return F.pad(weight, (0, 0, 0, missing) if dimension == 0 else (0, missing))


def _serves(precision: str, x: Tensor, weights: list[Tensor | None]) -> bool:
    """Whether this precision is requested, and the code supports the shapes and types."""
    narrow = torch.is_autocast_enabled("cpu")
    requested = torch.get_autocast_dtype("cpu") if narrow else torch.float32
    if requested != _TYPES[precision]:
        return False
    if not x.numel() or x.size(1) % SIDE or x.size(1) > LONGEST:
        return False
    floats = [x, *(weight for weight in weights if weight is not None)]
    return all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in floats
    ) and all(tensor.is_contiguous() for tensor in floats[1:])


class _NativeBlock(torch.autograd.Function):
    """The compiled code as an operation with a gradient."""

    @staticmethod
    def forward(
        ctx: Any, runner: NativeBlocks, sizes: _Sizes, seed: int, *inputs: Tensor | None
    ) -> Tensor:
        y, kept = runner.forward(sizes, seed, inputs, trains=True)
        # As saved tensors, so that checkpointed activations can let go of them.
        ctx.save_for_backward(*inputs, *kept)
        ctx.runner, ctx.sizes, ctx.seed, ctx.over = runner, sizes, seed, False
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Any:
        if ctx.over:  # the buffers are another step's by now
            raise RuntimeError("a native block's graph cannot be gone through twice")
        saved = ctx.saved_tensors
        inputs, kept = saved[: len(_INPUTS)], saved[len(_INPUTS) :]
        d_x, d_embedded, *gradients = ctx.runner.backward(ctx.sizes, ctx.seed, inputs, kept, d_y)
        ctx.runner.give_back(ctx.sizes, kept)
        ctx.over = True
        return None, None, None, d_x, d_embedded, None, None, *gradients
