"""How a model is called: ours and those of `transformers`, which is never imported for it.

A model takes ids (B, T) and returns logits (B, T, V), or an object with `.logits`, as the causal
language models of `transformers` do. Logits at position t predict token t + 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fundamentallm.errors import ConfigError, DataError

_IF_ACCEPTED = ("attention_mask", "position_ids", "token_type_ids")


def logits_of(output: Any) -> Tensor:
    """Return a model's output if it is a tensor, else its `.logits`.

    Raises:
        ConfigError: it has none.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise ConfigError(
        "the model returned no logits",
        got=type(output).__name__,
        expected="a tensor (B, T, V), or an object with `.logits`",
        fix="take the model with its head (AutoModelForCausalLM), or return the logits of every"
        " position from `forward`",
    )


def inputs_for(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a model is called with beside `input_ids`.

    `attention_mask`, `position_ids` and `token_type_ids` go to a model whose `forward` has them. A
    model that can keep a cache of keys and values keeps none.

    Args:
        model: without a wrapper for ranks or compilation, which would hide its parameters.
        batch: a micro-batch.

    Raises:
        DataError: the model lacks what the batch needs: it would not see the same tokens.
    """
    given: dict[str, Any] = {}
    if "use_cache" in _parameters(type(model).forward):
        given["use_cache"] = False
    for key, value in needed_by(model, batch).items():
        if key == "document_ids" or key in _IF_ACCEPTED:
            given[key] = value
    return given


def needed_by(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch without the masks and positions that a model does not take.

    Call it before the batch goes to a GPU: whether they are needed is read on the host, which would
    wait for a GPU.

    Args:
        model, batch: as for `inputs_for`.

    Raises:
        DataError: as `inputs_for`.
    """
    needed = dict(batch)
    for key in _IF_ACCEPTED:
        if key in batch:
            accepted = _parameters(type(model).forward)
            if key in accepted or "**" in accepted:
                continue
            if key != "token_type_ids":
                _check_dispensable(model, key, batch[key])
            del needed[key]
    return needed


def context_of(model: nn.Module) -> int | None:
    """Return the longest input in tokens; None without a limit.

    It is `sequence_length`, or `config.max_position_embeddings` of a model of `transformers`.
    """
    own = getattr(model, "sequence_length", None)
    return own or getattr(getattr(model, "config", None), "max_position_embeddings", None)


def recompute_activations(model: nn.Module) -> None:
    """Have a model keep only the inputs of its blocks in training, and compute the rest again.

    Raises:
        ConfigError: it cannot.
    """
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    elif hasattr(model, "gradient_checkpointing"):
        model.gradient_checkpointing = True  # type: ignore[assignment]
    else:
        raise ConfigError(
            "the model cannot recompute activations: it has no `gradient_checkpointing`",
            key="training.gradient_checkpointing",
            got=type(model).__name__,
            fix="set training.gradient_checkpointing to false",
        )


def can_recompute_activations(model: nn.Module) -> bool:
    """Whether `recompute_activations` works."""
    return hasattr(model, "gradient_checkpointing_enable") or hasattr(
        model, "gradient_checkpointing"
    )


def check_model(model: nn.Module, hidden_states: bool = False) -> None:
    """Check that a model predicts the next token, and offers what the loss takes.

    Args:
        model: the model.
        hidden_states: whether the loss is called with hidden states and the model.

    Raises:
        ConfigError: it is a model of `transformers` for another task or with a loss of its own, or
            it has no `logits_from_hidden` for the loss.
    """
    config = getattr(model, "config", None)
    of_transformers = hasattr(config, "is_encoder_decoder")
    task = getattr(model, "loss_type", None) if of_transformers else None
    if task not in (None, "ForCausalLM"):
        what = f"a model {task} does not predict the next token"
    elif getattr(config, "is_encoder_decoder", False):
        what = "an encoder with a decoder takes two texts"
    elif getattr(config, "output_router_logits", False):
        raise ConfigError(
            "the model adds a loss of its own for its routers, which would be left out",
            got=f"output_router_logits of {type(model).__name__}",
            fix="set model.config.output_router_logits = False",
        )
    elif hidden_states and not hasattr(model, "logits_from_hidden"):
        raise ConfigError(
            "this loss needs a model with `forward(return_hidden=)` and `logits_from_hidden`",
            got=type(model).__name__,
            fix="use LanguageModelingLoss",
        )
    else:
        return
    raise ConfigError(
        what,
        got=type(model).__name__,
        expected="a causal language model",
        fix="use AutoModelForCausalLM",
    )


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the parameters of `forward`, and "**" if it takes any."""
    parameters = inspect.signature(forward).parameters.values()
    names = {parameter.name for parameter in parameters}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return frozenset(names | {"**"} if takes_any else names)


def _check_dispensable(model: nn.Module, key: str, values: Tensor) -> None:
    """Check that a causal model computes the same without a mask or positions.

    Padding at the right is behind every token that counts.
    """
    if key == "attention_mask":
        dispensable, expected = values.long().diff(dim=-1) <= 0, "padding at the right"
    else:
        count = torch.arange(values.size(-1), device=values.device)
        dispensable, expected = values == count, "positions that count from 0 in each row"
    if not bool(dispensable.all()):
        raise DataError(
            f"the batch has an `{key}` that the model does not take",
            got=f"{type(model).__name__}, whose `forward` has no such parameter",
            expected=f"{expected}, or a model that takes it",
            fix="pad at the right: tokenizer.padding_side = 'right'"
            if key == "attention_mask"
            else "batch the texts without packing them",
        )
