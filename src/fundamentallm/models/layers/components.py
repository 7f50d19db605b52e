"""From the names in a `TransformerConfig` to modules.

A `ConfigError` from here carries the dotted key inside the model's configuration, as
`positions.base`, so that the reader of the file can add the line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from fundamentallm.config.model import ModelConfig, TransformerConfig
from fundamentallm.errors import ConfigError
from fundamentallm.models.layers.attention import Attention
from fundamentallm.models.layers.block import Block
from fundamentallm.models.layers.feedforward import FEEDFORWARDS
from fundamentallm.models.layers.normalization import NORMALIZATIONS
from fundamentallm.models.layers.positions import POSITIONS, Positions
from fundamentallm.registry import Registry

T = TypeVar("T")

_CHOICES: tuple[tuple[Registry[Any], str], ...] = (
    (NORMALIZATIONS, "normalization"),
    (POSITIONS, "positions"),
    (FEEDFORWARDS, "feedforward"),
)


def build_normalization(config: TransformerConfig) -> nn.Module:
    """Build one normalization over the model width.

    Raises:
        ConfigError: an unknown name, or an option that is unknown or out of range.
    """
    return _build(NORMALIZATIONS, config, "normalization", width=config.d_model, bias=config.bias)


def build_positions(config: TransformerConfig) -> Positions:
    """Build the position encoding that all layers share.

    Raises:
        ConfigError: as in `build_normalization`; no sequence length.
    """
    return _build(
        POSITIONS,
        config,
        "positions",
        width=config.d_model,
        head_width=config.head_width,
        sequence_length=required(config, "sequence_length"),
    )


def build_feedforward(config: TransformerConfig) -> nn.Module:
    """Build one feed-forward.

    Raises:
        ConfigError: as in `build_normalization`.
    """
    return _build(
        FEEDFORWARDS,
        config,
        "feedforward",
        width=config.d_model,
        hidden_width=config.hidden_width,
        bias=config.bias,
        dropout=config.dropout,
    )


def build_block(config: TransformerConfig) -> Block:
    """Build one block.

    Raises:
        ConfigError: as in `build_normalization`.
    """
    attention = Attention(
        config.d_model,
        config.num_heads,
        config.kv_heads,
        bias=config.bias,
        qk_norm=config.qk_norm,
        dropout=config.dropout,
    )
    return Block(
        attention_norm=build_normalization(config),
        attention=attention,
        feedforward_norm=build_normalization(config),
        feedforward=build_feedforward(config),
        dropout=config.dropout,
        residual_mix=config.residual_mix,
    )


def check_components(config: TransformerConfig) -> None:
    """Check names and options before the data has told the vocabulary and the context length.

    It takes no memory and draws no random number.

    Raises:
        ConfigError: as in `build_normalization`, or a weight is too large for any machine.
    """
    if config.open_fields:
        # The sizes are in the init_from folder, which is opened later, or never on resume.
        for registry, field in _CHOICES:
            component = getattr(config, field)
            with inside(field):
                registry.check(component.name, component.options)
        return
    if config.sequence_length is None:
        config = config.model_copy(update={"sequence_length": 1})
    with torch.device("meta"), addressable(config):
        build_positions(config)
        build_block(config)


def follows_weight_type(config: TransformerConfig) -> bool:
    """Whether a block with bfloat16 weights maps bfloat16 to bfloat16.

    A component from elsewhere may hold a float32 tensor that is not a parameter: mixed with
    activations it widens them, and the next linear layer refuses two types. It takes no memory.
    """
    x = torch.empty(1, 2, config.d_model, dtype=torch.bfloat16, device="meta")
    with torch.device("meta"):
        positions = build_positions(config.model_copy(update={"sequence_length": 2}))
        block = build_block(config)
    for parameter in (*positions.parameters(), *block.parameters()):
        parameter.data = parameter.data.to(torch.bfloat16)
    try:
        with torch.no_grad():
            embedded = positions.embed(x)
            out: torch.Tensor = block(embedded, positions, embedded)
    except RuntimeError:
        return False
    return out.dtype == torch.bfloat16


@contextmanager
def addressable(config: TransformerConfig) -> Iterator[None]:
    """Turn torch's error about a tensor beyond all addresses into a `ConfigError`."""
    try:
        yield
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ConfigError(
            "the model has a tensor that is too large for any machine",
            key="d_model",
            got=f"d_model {config.d_model}, hidden width {config.hidden_width}, "
            f"sequence length {config.sequence_length}",
            fix="make the model smaller",
        ) from error


def required(config: ModelConfig, field: Literal["vocab_size", "sequence_length"]) -> int:
    """Return a size that a run takes from its tokenizer or data, and a script must set.

    Raises:
        ConfigError: it is None.
    """
    size: int | None = getattr(config, field)
    if size is None:
        raise ConfigError(
            f"the model needs a {field}",
            key=field,
            got="None",
            expected="a whole number above 0",
            fix=f"set {field} in the model's configuration",
        )
    return size


def _build(registry: Registry[T], config: TransformerConfig, field: str, **supplied: Any) -> T:
    component = getattr(config, field)
    with inside(field):
        return registry.build(component.name, component.options, **supplied)


@contextmanager
def inside(field: str) -> Iterator[None]:
    """Let a ConfigError of the block name its key below a field."""
    try:
        yield
    except ConfigError as error:
        error.key = f"{field}.{error.key}" if error.key else field
        raise
