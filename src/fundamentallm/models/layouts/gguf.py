"""A model as llama.cpp names and shapes it: the architectures `llama` and `gpt2` of GGUF.

The names are those of `llama-arch.cpp`, the shapes those that `models/llama.cpp` and
`models/gpt2.cpp` ask for. A linear weight is (out, in), as here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fundamentallm.config.model import TransformerConfig
from fundamentallm.errors import ConfigError
from fundamentallm.models.layers.feedforward import FEEDFORWARDS
from fundamentallm.models.layers.normalization import NORMALIZATIONS
from fundamentallm.models.layers.positions import POSITIONS
from fundamentallm.models.layouts.base import layout_for, option
from fundamentallm.models.layouts.gpt2 import GPT2Layout

_ENDS = {
    "token_embd": "token_embedding",
    "position_embd": "positions.table",
    "output_norm": "norm",
    "output": "head",
}
_BLOCK = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.query",
    "attn_k": "attention.key",
    "attn_v": "attention.value",
    "attn_output": "attention.output",
    "ffn_norm": "feedforward_norm",
    "ffn_gate": "feedforward.gate",
    "ffn_up": "feedforward.input",
    "ffn_down": "feedforward.output",
}
_JOINED = ("attn_q", "attn_k", "attn_v")  # one tensor, attn_qkv, in gpt2


def gguf_metadata(config: TransformerConfig) -> tuple[str, dict[str, int | float]]:
    """Return the architecture of a model and its sizes, by llama.cpp's keys.

    Raises:
        ConfigError: no layout expresses the model, or llama.cpp does not compute it.
    """
    sizes: dict[str, int | float] = {
        "context_length": config.sequence_length or 0,
        "embedding_length": config.d_model,
        "block_count": config.num_layers,
        "feed_forward_length": config.hidden_width,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.kv_heads,
    }
    eps = option(NORMALIZATIONS, config.normalization, "eps")
    if isinstance(layout_for(config), GPT2Layout):
        if option(FEEDFORWARDS, config.feedforward, "approximate") != "tanh":
            raise ConfigError(
                "llama.cpp computes GELU by the approximation with tanh alone",
                key="model.feedforward.approximate",
                got="none",
                expected="tanh",
                fix="train with model.feedforward: {name: gelu, approximate: tanh}, or use --format"
                " hf",
            )
        return "gpt2", {**sizes, "attention.layer_norm_epsilon": eps}
    return "llama", {
        **sizes,
        "attention.layer_norm_rms_epsilon": eps,
        "rope.freq_base": option(POSITIONS, config.positions, "base"),
        "rope.dimension_count": config.head_width,
        "vocab_size": config.vocab_size or 0,
    }


def gguf_tensors(
    config: TransformerConfig, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model that `gguf_metadata` accepts, by llama.cpp's names.

    Args:
        config: the model's.
        state: its `state_dict`. Biases that `gpt2` has and it lacks are zeros.
    """
    layout = layout_for(config)
    joined = isinstance(layout, GPT2Layout)
    shapes = layout.state_shapes(config)

    def tensors(theirs: str, *ours: str) -> Iterator[tuple[str, Tensor]]:
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in ours]
            if names[0] in shapes:
                parts = [
                    state[name] if name in state else torch.zeros(shapes[name]) for name in names
                ]
                yield f"{theirs}.{kind}", parts[0] if len(parts) == 1 else torch.cat(parts)

    for theirs, ours in _ENDS.items():
        if ours != "head" or not config.tie_embeddings:
            yield from tensors(theirs, ours)
    for number in range(config.num_layers):
        for theirs, ours in _BLOCK.items():
            place = f"blocks.{number}.{ours}"
            if not joined:
                heads = {"attn_q": config.num_heads, "attn_k": config.kv_heads}.get(theirs)
                for name, tensor in tensors(f"blk.{number}.{theirs}", place):
                    yield name, tensor if heads is None else _neighbours(tensor, heads)
            elif theirs not in _JOINED:
                yield from tensors(f"blk.{number}.{theirs}", place)
        if joined:
            parts = (f"blocks.{number}.{_BLOCK[name]}" for name in _JOINED)
            yield from tensors(f"blk.{number}.attn_qkv", *parts)


def _neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Return a query or key matrix, or its bias, in the order of llama.cpp's rotary pairs.

    It turns rows 2i and 2i + 1 of a head together where the layout turns i and i + K/2.
    """
    halves = tensor.reshape(heads, 2, tensor.size(0) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
