"""Steps of generation by our own compiled code: the whole model in one call, weights read once.

The weights are copied when a decoder is made, into panels of sixteen outputs (`decode.cpp`), in
float32, rounded to bfloat16, or in eight bits: each 32 weights of a row are whole numbers from -127
to 127 times a float32 scale, as in the type Q8_0 of llama.cpp. Activations, sums, keys and values
stay float32.

Shapes: R rows, D model width, V vocabulary; N outputs and I inputs of a matrix.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm.errors import ConfigError
from fundamentallm.models.generation.cache import KVCache
from fundamentallm.models.layers.attention import Attention
from fundamentallm.models.layers.block import Block
from fundamentallm.models.layers.feedforward import (
    GELUFeedForward,
    SquaredReLUFeedForward,
    SwiGLUFeedForward,
)
from fundamentallm.models.layers.normalization import RMSNorm
from fundamentallm.models.layers.positions import (
    LearnedPositions,
    RotaryPositions,
    SinusoidalPositions,
)
from fundamentallm.models.native.library import load_decoding
from fundamentallm.models.transformer import Transformer

WeightType = Literal["fp32", "bf16", "int8"]
WEIGHT_TYPES: tuple[WeightType, ...] = ("fp32", "bf16", "int8")

LANES, BLOCK = 16, 32  # outputs of a panel; inputs that share a scale
WIDEST_HEAD = 1024

_FEEDFORWARDS = (SquaredReLUFeedForward, GELUFeedForward, SwiGLUFeedForward)
_POINTER = ctypes.c_void_p


class _Layer(ctypes.Structure):
    """`Layer` of `decode.cpp`, field by field. Pointers do not keep their tensors alive."""

    _fields_: ClassVar = [
        (name, _POINTER)
        for name in (
            *("gain1", "shift1", "raw", "raw_bias", "query_gain", "key_gain"),
            *("output", "output_bias", "gain2", "shift2", "input", "input_bias"),
            *("feed_output", "feed_bias", "mix", "keys", "values"),
        )
    ]


class _Step(ctypes.Structure):
    """`Step` of `decode.cpp`, field by field."""

    _fields_: ClassVar = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("rows", "width", "heads", "kv_heads", "head_width", "hidden", "vocabulary"),
                *("capacity", "num_layers", "threads", "weights", "feedforward", "centred"),
            )
        ),
        *((name, ctypes.c_float) for name in ("eps", "qk_eps", "softcap")),
        ("layers", ctypes.POINTER(_Layer)),
        *(
            (name, _POINTER)
            for name in (
                *("embedding", "added", "cosines", "sines", "embedding_gain", "embedding_shift"),
                *("token_shift", "gain", "shift", "head", "tokens", "lengths", "last", "logits"),
            )
        ),
    ]


def why_not_decoded(model: nn.Module) -> str:
    """Return why a model's steps cannot be computed here; empty if they can."""
    if not isinstance(model, Transformer):
        return f"a model of class {type(model).__name__}: not a transformer"
    config = model.config
    if config.adapter is not None:
        return f"adapter {config.adapter.name}: it changes the block"
    parameters = list(model.parameters())
    if device := next((p.device for p in parameters if p.device.type != "cpu"), None):
        return f"device {device}: it is for CPUs"
    if any(parameter.dtype != torch.float32 for parameter in parameters):
        return "weights that are not float32"
    if config.head_width % BLOCK or config.head_width > WIDEST_HEAD:
        return (
            f"d_model / num_heads {config.head_width}: not a multiple of {BLOCK} up to "
            f"{WIDEST_HEAD}"
        )
    if not isinstance(
        model.positions, LearnedPositions | SinusoidalPositions | RotaryPositions
    ) or not all(map(_is_known, model.blocks)):
        return "a part that is not among those of the package"
    if getattr(model.blocks[0].feedforward, "approximate", "none") != "none":
        return "feedforward gelu with approximate: tanh"
    norms = [
        model.norm,
        *([] if model.embedding_norm is None else [model.embedding_norm]),
        *(
            norm
            for block in model.blocks
            for norm in (block.attention_norm, block.feedforward_norm)
        ),
    ]
    if not all(isinstance(norm, RMSNorm | nn.LayerNorm) for norm in norms):
        return f"normalization {config.normalization.name}: not among those of the package"
    if len({(type(norm), getattr(norm, "eps", None)) for norm in norms}) > 1:
        return "normalizations that differ"
    return ""


class NativeDecoder:
    """Computes the logits of one more token for each row, from a cache and into it.

    It has a copy of the weights: make another one when they have changed. A row's logits depend
    neither on the other rows nor on the number of threads.

    Args:
        model: one of which `why_not_decoded` knows no reason.
        weights: the type of the matrices' copies, the head's among them.

    Raises:
        ConfigError: the model is not supported.
        MachineError: as `load_decoding`.
    """

    def __init__(self, model: nn.Module, weights: WeightType = "fp32") -> None:
        reason = why_not_decoded(model)
        if reason:
            raise ConfigError("native code does not support the steps of this model", got=reason)
        assert isinstance(model, Transformer)
        self.library = load_decoding()
        self.weights = weights
        self._tensors: list[Tensor] = []  # what pointers lead to
        self._keys: list[Tensor] = []
        config, positions, block = model.config, model.positions, model.blocks[0]
        assert isinstance(block, Block)
        self.vocab_size = model.head.out_features
        self._layers = (_Layer * config.num_layers)()
        for layer, one in zip(self._layers, model.blocks, strict=True):
            self._fill_layer(layer, one)
        self._step = _Step(
            width=config.d_model,
            heads=config.num_heads,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            hidden=config.hidden_width,
            vocabulary=self.vocab_size,
            num_layers=config.num_layers,
            weights=WEIGHT_TYPES.index(weights),
            feedforward=_FEEDFORWARDS.index(type(block.feedforward)),
            centred=isinstance(model.norm, nn.LayerNorm),
            eps=model.norm.eps,
            qk_eps=getattr(block.attention.query_norm, "eps", 0.0),
            softcap=config.logit_softcap or 0.0,
            layers=self._layers,
            embedding=self._at(model.token_embedding.weight),
            token_shift=self._at(None if model.token_shift is None else model.token_shift.weight),
            head=self._packed(model.head.weight),
        )
        self._step.gain, self._step.shift = self._norm(model.norm)
        if model.embedding_norm is not None:
            norm = self._norm(model.embedding_norm)
            self._step.embedding_gain, self._step.embedding_shift = norm
        if isinstance(positions, RotaryPositions):
            self._step.cosines = self._at(positions.cosines)
            self._step.sines = self._at(positions.sines)
        else:
            table = positions.table
            self._step.added = self._at(getattr(table, "weight", table))  # type: ignore[arg-type]

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return the logits after one more token in every row, which the cache then holds.

        Args:
            tokens: (R,) int64.
            cache: of the model, with room in every row.

        Returns:
            (R, V) float32.
        """
        keys, values, lengths = cache.advance()
        if keys is not self._keys:
            self._keys = keys
            for layer, key, value in zip(self._layers, keys, values, strict=True):
                layer.keys, layer.values = key.data_ptr(), value.data_ptr()
        rows, step = len(lengths), self._step
        tokens = tokens.to(torch.int64).contiguous()
        before = (ctypes.c_int64 * rows)(*lengths)
        logits = torch.empty(rows, -(-self.vocab_size // LANES) * LANES)
        step.rows, step.capacity, step.threads = rows, cache.capacity, torch.get_num_threads()
        step.tokens, step.lengths = tokens.data_ptr(), ctypes.addressof(before)
        step.logits = logits.data_ptr()
        if step.token_shift:
            step.last = cache.last_embeddings(step.width).data_ptr()
        self.library.fundamentallm_decode(ctypes.byref(step))
        return logits if logits.size(1) == self.vocab_size else logits[:, : self.vocab_size]

    def _fill_layer(self, layer: _Layer, block: nn.Module) -> None:
        assert isinstance(block, Block)
        attention, feedforward = block.attention, block.feedforward
        inputs: list[nn.Linear] = [feedforward.input]  # type: ignore[list-item]
        if isinstance(feedforward, SwiGLUFeedForward):
            inputs.insert(0, feedforward.gate)
        output: nn.Linear = feedforward.output  # type: ignore[assignment]
        marked = (attention.query, attention.key, attention.value)
        layer.gain1, layer.shift1 = self._norm(block.attention_norm)
        layer.gain2, layer.shift2 = self._norm(block.feedforward_norm)
        layer.raw = self._packed(torch.cat([linear.weight for linear in marked]))
        layer.output = self._packed(attention.output.weight)
        layer.input = self._packed(_side_by_side([linear.weight for linear in inputs]))
        layer.feed_output = self._packed(output.weight)
        if attention.output.bias is not None:
            layer.raw_bias = self._at(torch.cat([linear.bias for linear in marked]))
            layer.output_bias = self._at(attention.output.bias)
            layer.input_bias = self._at(_side_by_side([linear.bias for linear in inputs]))
            layer.feed_bias = self._at(output.bias)
        if isinstance(attention.query_norm, RMSNorm) and isinstance(attention.key_norm, RMSNorm):
            layer.query_gain = self._at(attention.query_norm.weight)
            layer.key_gain = self._at(attention.key_norm.weight)
        if block.residual_mix is not None:
            layer.mix = self._at(block.residual_mix.weights)

    def _norm(self, norm: nn.Module) -> tuple[int | None, int | None]:
        bias: Any = getattr(norm, "bias", None)
        return self._at(norm.weight), self._at(bias)  # type: ignore[arg-type]

    def _packed(self, weight: Tensor) -> int | None:
        return self._at(packed(weight.detach(), self.weights))

    def _at(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        # A copy, so that no tensor changes under the decoder.
        self._tensors.append(tensor.detach().clone(memory_format=torch.contiguous_format))
        return self._tensors[-1].data_ptr()


def packed(weight: Tensor, weights: WeightType) -> Tensor:
    """Return a matrix as `decode.cpp` reads it.

    Args:
        weight: (N, I) float32; both are filled up with zeros, to panels and to blocks.
        weights: the type of the copy.

    Returns:
        uint8, (panels of 16 outputs, blocks of 32 inputs, bytes of a block of a panel).
    """
    missing = (-weight.size(1) % BLOCK, -weight.size(0) % LANES)
    filled = F.pad(weight, (0, missing[0], 0, missing[1]))
    panels, blocks = filled.size(0) // LANES, filled.size(1) // BLOCK
    numbers = filled.view(panels, LANES, blocks, BLOCK)
    head: list[Tensor] = []
    if weights == "bf16":
        numbers = numbers.bfloat16()
    elif weights == "int8":
        largest = numbers.abs().amax(dim=-1, keepdim=True)
        scales = largest / 127
        numbers = torch.where(scales > 0, numbers / scales, 0.0).round().to(torch.int8)
        # The code reads a number as 2^24 times itself.
        lowered = (scales.squeeze(-1) * 2.0**-24).transpose(1, 2).contiguous()
        head = [lowered.view(torch.uint8)]
    word = 4 // numbers.element_size()  # inputs of one output that lie beside each other
    numbers = numbers.view(panels, LANES, blocks, BLOCK // word, word).permute(0, 2, 3, 1, 4)
    flat = numbers.contiguous().flatten(2).view(torch.uint8)
    return torch.cat([*head, flat], dim=-1)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Return rows in panels of 16, one of each part and so on, each part filled up with zeros."""
    columns = (0, 0) * (parts[0].ndim - 1)
    filled = [F.pad(part, (*columns, 0, -part.size(0) % LANES)) for part in parts]
    panels = [part.reshape(-1, LANES, *part.shape[1:]) for part in filled]
    return torch.stack(panels, dim=1).flatten(0, 2)


def _is_known(block: nn.Module) -> bool:
    return (
        type(block) is Block
        and type(block.attention) is Attention
        and type(block.feedforward) in _FEEDFORWARDS
    )
