"""The shape of a model."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar, Literal

from pydantic import (
    ConfigDict,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from fundamentallm.config.base import BaseConfig, Count, Positive, Share, Text
from fundamentallm.config.component import Component, plain_options
from fundamentallm.config.yaml.problems import problem

TRANSFORMER = "transformer"
"""The default family."""

_NOT_IN_A_FOLDER = frozenset({"family", "dropout", "adapter", "size"})
SIZES = ("d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff")
"""The fields of a transformer that `size: auto` chooses."""


class TransformerConfig(BaseConfig):
    """A decoder-only transformer. Widths are in features, lengths in tokens.

    `family`, and an unset `adapter` or `size`, are never written: a stored configuration without
    them is a transformer as it was built.
    """

    family: Text = TRANSFORMER
    """The model family: transformer, or a name that a plugin registers, with options of its own."""

    init_from: Text | None = None
    """A folder of the transformers library, of the Llama or GPT-2 family, or a run of this program:
    its name below runs/, its directory or a checkpoint. The run starts from its weights, and it
    decides the keys left unset here. null: random weights."""

    vocab_size: Count | None = None
    """Number of different tokens; null: the tokenizer's."""

    size: Literal["auto"] | None = None
    """auto: a new run chooses d_model, num_layers and num_heads for what this machine can train in
    training.max_seconds, and for the length of the text. null: as those keys say."""

    d_model: Count = 128
    """Width of the residual stream."""

    num_layers: Count = 4
    """Number of blocks."""

    num_heads: Count = 4
    """Number of query heads; divides d_model."""

    num_kv_heads: Count | None = None
    """Number of key and value heads, a divisor of num_heads; null: as many as num_heads."""

    d_ff: Count | None = None
    """Width inside the feed-forward; null: 4 d_model, and for swiglu, whose third matrix would
    make it half as large again, 8/3 d_model rounded up to a multiple of 8."""

    sequence_length: Count | None = None
    """Context length in tokens; null: the data's."""

    normalization: Component = Component(name="rmsnorm")
    """Normalization before each sub-layer and at the end: rmsnorm, layernorm."""

    positions: Component = Component(name="rotary")
    """How positions are encoded: rotary, learned, sinusoidal."""

    feedforward: Component = Component(name="swiglu")
    """The feed-forward: swiglu, gelu, relu_squared."""

    dropout: Share = 0.0
    """Fraction of activations set to zero in training."""

    bias: bool = False
    """Whether linear layers and layernorm have biases."""

    qk_norm: bool = False
    """Whether queries and keys are normalized per head before their product."""

    tie_embeddings: bool = True
    """Whether the output head and the token embedding are one matrix."""

    logit_softcap: Positive | None = None
    """Logits are bounded to (-c, c) as c tanh(logits / c); null: they are not."""

    embedding_norm: bool = False
    """Whether the embeddings are normalized before the first block."""

    token_shift: bool = False
    """Whether each embedding is mixed with a trained share of the previous one, at first 0."""

    residual_mix: bool = False
    """Whether each block reads a trained mixture of the residual stream and the embeddings. At the
    start it reads only the stream."""

    zero_init: bool = False
    """Whether the linear layers that write into the residual stream start at 0, and the head too
    where it is not tied: each block begins as the identity."""

    adapter: Component | None = None
    """A registered change to the built model; null: no change."""

    options: ClassVar[dict[str, Any]] = {}
    """The fields are all the options of the model."""

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
        """The fields that the folder of `init_from` still has to decide; empty without a folder."""
        if self.init_from is None:
            return frozenset()
        return frozenset(type(self).model_fields) - self.model_fields_set - _NOT_IN_A_FOLDER

    def _unwritten(self) -> Collection[str]:
        # Written as their defaults, they would contradict the folder.
        return self.open_fields | self._unsaid()

    def _unsaid(self) -> frozenset[str]:
        unset = {name for name in ("adapter", "size") if getattr(self, name) is None}
        return frozenset({"family", *unset, *(SIZES if self.size is not None else ())})

    @model_serializer(mode="wrap")
    def _without_the_unsaid(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: item for key, item in serialize(self).items() if key not in self._unsaid()}

    def with_random_weights(self) -> TransformerConfig:
        """Return the same model without `init_from`."""
        return self.model_copy(update={"init_from": None})

    @field_validator("family")
    @classmethod
    def _this_family(cls, family: str) -> str:
        if family != TRANSFORMER:
            raise problem("", "these fields belong to family transformer", got=family)
        return family

    @model_validator(mode="after")
    def _one_size(self) -> TransformerConfig:
        given = [name for name in (*SIZES, "init_from") if name in self.model_fields_set]
        given = [name for name in given if getattr(self, name) is not None]
        if self.size is not None and given:
            raise problem(
                "size",
                f"size: {self.size} and {given[0]} both say how large the model is",
                expected="one of them",
                fix=f"remove {given[0]}, or set size to null",
            )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> TransformerConfig:
        width, heads = self.d_model, self.num_heads
        if self.open_fields & {"d_model", "num_heads", "num_kv_heads"}:
            return self  # checked again after the folder is read
        if width % heads:
            # Rotary positions want heads of an even width.
            unit = heads * (2 if self.positions.name == "rotary" else 1)
            widths = [near for near in (width - width % unit, width + -width % unit) if near]
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
                f"rotary positions turn pairs of features, but a head is {self.head_width} wide "
                f"(d_model {width} / num_heads {heads})",
                expected="an even head width",
                fix=f"set d_model to {width + heads}, or positions to learned",
            )
        return self


class FamilyConfig(BaseConfig):
    """A model of another family, registered in `fundamentallm.models.families.MODELS`.

    The options of its factory stand beside the name, as `model: {family: gru, hidden_size: 256}`.
    The registry knows which names and options exist; here they are plain values.
    """

    model_config = ConfigDict(extra="allow")

    family: Text
    """The registered name."""

    vocab_size: Count | None = None
    """Number of different tokens; null: the tokenizer's."""

    sequence_length: Count | None = None
    """Context length in tokens; null: the data's."""

    adapter: Component | None = None
    """A registered change to the built model; null: no change."""

    init_from: ClassVar[None] = None
    """Only the transformer can start from a folder."""

    @property
    def options(self) -> dict[str, Any]:
        """The options of the family's factory as written."""
        return dict(self.model_extra or {})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and then the options as plain values."""
        return {**super().to_dict(), **self.options}

    def with_random_weights(self) -> FamilyConfig:
        """Return the same model."""
        return self

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: item if key in cls.model_fields else plain_options(item, str(key))
            for key, item in value.items()
        }


ModelConfig = TransformerConfig | FamilyConfig


def model_class(plain: Any) -> type[TransformerConfig] | type[FamilyConfig]:
    """Return the configuration class for a model's plain values."""
    other = isinstance(plain, dict) and plain.get("family", TRANSFORMER) != TRANSFORMER
    return FamilyConfig if other else TransformerConfig


def _nearest_divisor(number: int, near: int) -> int:
    """Return the divisor of `number` nearest to `near`, looking no further than 1,000 away."""
    candidates = range(max(1, near - 1000), min(number, near + 1000) + 1)
    divisors = [candidate for candidate in candidates if number % candidate == 0]
    if not divisors:
        return math.gcd(number, near)
    return min(divisors, key=lambda divisor: abs(divisor - near))
