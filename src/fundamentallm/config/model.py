"""The shape of a model."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated

from pydantic import Field, model_validator

from fundamentallm.config.base import BaseConfig, Count, Positive, Text
from fundamentallm.config.component import Component
from fundamentallm.config.problems import problem


class TransformerConfig(BaseConfig):
    """A decoder-only transformer. Widths are in features, lengths in tokens."""

    init_from: Text | None = None
    """A folder in the form of the transformers library, of the Llama or GPT-2 family, whose weights
    a run starts from; what is left unset here it decides. None: random weights."""

    vocab_size: Count | None = None
    """Number of different tokens; None: the tokenizer's."""

    d_model: Count = 128
    """Width of the residual stream."""

    num_layers: Count = 4
    """Number of blocks."""

    num_heads: Count = 4
    """Number of query heads; divides d_model."""

    num_kv_heads: Count | None = None
    """Number of key and value heads, a divisor of num_heads; None: as many as num_heads."""

    d_ff: Count | None = None
    """Width inside the feed-forward; None: 4 d_model, and for swiglu, whose third matrix would
    make it half as large again, 8/3 d_model rounded up to a multiple of 8."""

    sequence_length: Count | None = None
    """Context length in tokens; None: the data's."""

    normalization: Component = Component(name="rmsnorm")
    """Normalization before each sub-layer and at the end: rmsnorm, layernorm."""

    positions: Component = Component(name="rotary")
    """How a token knows its place: rotary, learned, sinusoidal."""

    feedforward: Component = Component(name="swiglu")
    """The feed-forward: swiglu, gelu, relu_squared."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of activations set to zero in training."""

    bias: bool = False
    """Whether linear layers and layernorm have biases."""

    qk_norm: bool = False
    """Whether queries and keys are normalized per head before their product."""

    tie_embeddings: bool = True
    """Whether the output head and the token embedding are one matrix."""

    logit_softcap: Positive | None = None
    """Logits are bounded to (-c, c) as c tanh(logits / c); None: they are not."""

    embedding_norm: bool = False
    """Whether the embeddings are normalized before the first block."""

    token_shift: bool = False
    """Whether each embedding gets a trained share of the one before it, none at the start."""

    residual_mix: bool = False
    """Whether each block reads a trained mixture of the residual stream and the embeddings, from
    the stream alone at the start."""

    zero_init: bool = False
    """Whether the linear layers that write into the residual stream start at 0, and the head too
    where it is not tied: each block begins as the identity."""

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, `num_kv_heads` or what None means."""
        return self.num_kv_heads or self.num_heads

    @property
    def hidden_width(self) -> int:
        """Width inside the feed-forward, `d_ff` or what None means."""
        if self.d_ff is not None:
            return self.d_ff
        if self.feedforward.name == "swiglu":
            return 8 * -(-self.d_model // 3)  # 8/3 d_model, up to a multiple of 8
        return 4 * self.d_model

    @property
    def open_fields(self) -> frozenset[str]:
        """The fields that the folder of `init_from` still has to decide; without one, none."""
        if self.init_from is None:
            return frozenset()
        return frozenset(type(self).model_fields) - self.model_fields_set - {"dropout"}

    def _unwritten(self) -> Collection[str]:
        # Written as their defaults, they would contradict the folder.
        return self.open_fields

    @model_validator(mode="after")
    def _heads_fit(self) -> TransformerConfig:
        width, heads = self.d_model, self.num_heads
        if self.open_fields & {"d_model", "num_heads", "num_kv_heads"}:
            return self  # checked again once the folder has spoken
        if width % heads:
            widths = [near for near in (width - width % heads, width + -width % heads) if near]
            raise problem(
                "num_heads",
                f"d_model {width} is not divisible by num_heads {heads}",
                expected="a number of heads that divides d_model",
                fix=f"set num_heads to {_nearest_divisor(width, heads)}, "
                f"or d_model to {' or '.join(map(str, widths))}",
            )
        if heads % self.kv_heads:
            raise problem(
                "num_kv_heads",
                f"num_heads {heads} is not divisible by num_kv_heads {self.kv_heads}",
                expected="a number of key and value heads that divides num_heads",
                fix=f"set num_kv_heads to {_nearest_divisor(heads, self.kv_heads)}",
            )
        return self

    @model_validator(mode="after")
    def _rotary_pairs(self) -> TransformerConfig:
        if self.open_fields & {"d_model", "num_heads", "positions"}:
            return self
        if self.positions.name == "rotary" and self.head_width % 2:
            heads, width = self.num_heads, self.d_model
            raise problem(
                "d_model",
                f"rotary positions turn pairs of features, and a head is {self.head_width} wide "
                f"(d_model {width} / num_heads {heads})",
                expected="an even head width",
                fix=f"set d_model to {width + heads}, or positions to learned",
            )
        return self


def _nearest_divisor(number: int, near: int) -> int:
    """Return the divisor of `number` nearest to `near`, looking no further than 1,000 away."""
    candidates = range(max(1, near - 1000), min(number, near + 1000) + 1)
    divisors = [candidate for candidate in candidates if number % candidate == 0]
    if not divisors:
        return math.gcd(number, near)
    return min(divisors, key=lambda divisor: abs(divisor - near))
