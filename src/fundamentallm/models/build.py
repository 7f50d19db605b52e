"""From a model's configuration to the model: every command builds it here.

A `ConfigError` from here carries the dotted key inside the model's configuration, as
`adapter.rank`, so that the reader of the file can add the line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

# Registers the default family.
import fundamentallm.models.transformer  # noqa: F401
from fundamentallm.config.model import ModelConfig
from fundamentallm.errors import ConfigError
from fundamentallm.models.estimate import FLOAT32_BYTES, Estimate, logits_bytes
from fundamentallm.models.families import ADAPTERS, MODELS
from fundamentallm.models.layers.components import inside, required


def build_model(config: ModelConfig, load: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """Build a model of its family and let its adapter change it.

    The weights are drawn from torch's global generator.

    Args:
        config: with `vocab_size` and `sequence_length` set.
        load: puts the weights to start from into the model, before the adapter changes it.

    Raises:
        ConfigError: an unknown name, an option that is unknown, of a wrong type or out of range, a
            missing size, or an adapter that returns no model or leaves nothing to train.
    """
    model = build_base(config)
    if load is not None:
        load(model)
    if config.adapter is None:
        return model
    with inside("adapter"):
        model = ADAPTERS.build(config.adapter.name, config.adapter.options, model=model)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"adapter '{config.adapter.name}' returned no model",
                got=type(model).__name__,
                fix="end it with: return model",
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                f"adapter '{config.adapter.name}' leaves no parameter to train",
                fix="choose another adapter or other options",
            )
    return model


def build_base(config: ModelConfig) -> nn.Module:
    """Build a model of its family, without its adapter.

    Raises:
        ConfigError: as `build_model`.
    """
    _family(config)
    return MODELS.build(
        config.family,
        config.options,
        config=config,
        vocab_size=required(config, "vocab_size"),
        sequence_length=required(config, "sequence_length"),
    )


def check_model(config: ModelConfig) -> None:
    """Check names and options before the data has told the vocabulary and the context length.

    It takes no memory.

    Raises:
        ConfigError: as `build_model`, or a weight is too large for any machine.
    """
    check = getattr(_family(config), "check", None)
    if config.adapter is not None:
        with inside("adapter"):
            ADAPTERS.check(config.adapter.name, config.adapter.options)
    if check is not None:
        check(config)
        return
    sizes = {"vocab_size": config.vocab_size or 1, "sequence_length": config.sequence_length or 1}
    try:
        with torch.device("meta"):
            build_base(config.model_copy(update=sizes))
    except RuntimeError as error:
        raise ConfigError(
            f"model family '{config.family}' cannot be built on the meta device",
            key="family",
            got=str(error).partition("\n")[0],
            fix="choose smaller sizes; a constructor draws weights with torch.nn.init and reads no"
            " value of a tensor",
        ) from error


def follows_weight_type(config: ModelConfig) -> bool:
    """Whether a model is known to compute with bfloat16 weights, without autocast."""
    known = getattr(_family(config), "can_follow_weight_type", None)
    return known is not None and config.adapter is None and known(config)


def uses_attention(config: ModelConfig) -> bool:
    """Whether `training.attention` changes how a model computes."""
    return bool(getattr(_family(config), "uses_attention", False))


def estimate_model(
    config: ModelConfig, *, batch_size: int, optimizer_states: int, **options: Any
) -> Estimate:
    """Estimate the cost of training a model; no memory is taken.

    For a family without `estimate` the parameters are counted, a token costs 6 FLOPs for each of
    them, and the logits are the only activations that are counted.

    Args:
        config: the model; `vocab_size` and `sequence_length` must be set.
        batch_size, optimizer_states, options: as for `models.estimate.estimate`.

    Raises:
        ConfigError: as `build_model`.
    """
    known = getattr(_family(config), "estimate", None)
    base: Estimate | None = None
    if known is not None:
        base = known(config, batch_size=batch_size, optimizer_states=optimizer_states, **options)
        if config.adapter is None:
            return base
    with torch.device("meta"):
        model = build_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    trained_bytes = FLOAT32_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    if base is None:
        tables = {
            id(table): table
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            for table in module.parameters()
        }
        tokens = batch_size * required(config, "sequence_length")
        base = Estimate(
            parameters=0,
            non_embedding_parameters=-sum(table.numel() for table in tables.values()),
            flops_per_token=0,
            weight_bytes=0,
            gradient_bytes=0,
            optimizer_bytes=0,
            activation_bytes=logits_bytes(tokens, required(config, "vocab_size")),
        )
    added = parameters - base.parameters
    return replace(
        base,
        parameters=parameters,
        non_embedding_parameters=base.non_embedding_parameters + added,
        flops_per_token=base.flops_per_token + 6 * added,
        weight_bytes=FLOAT32_BYTES * parameters,
        gradient_bytes=trained_bytes,
        optimizer_bytes=trained_bytes * optimizer_states,
    )


def _family(config: ModelConfig) -> Callable[..., nn.Module]:
    with inside("family"):
        return MODELS.get(config.family)
