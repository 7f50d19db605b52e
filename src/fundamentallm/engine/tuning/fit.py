"""Refuse a model that this machine cannot hold, before it is built."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from fundamentallm.config import RunConfig, TransformerConfig
from fundamentallm.engine.tuning.fake_step import loss_bytes, optimizer_bytes
from fundamentallm.errors import ConfigError
from fundamentallm.models.build import estimate_model
from fundamentallm.models.estimate import Estimate, logits_bytes
from fundamentallm.models.layers.components import required
from fundamentallm.registry import num_registered

# Float32 numbers a parameter, of an optimizer that cannot be run on fake tensors: Adam's two.
_OPTIMIZER_STATES = 2

# What a run costs at a time does not depend on them.
_NO_SIZES = {
    "learning_rate", "min_learning_rate", "scheduler", "warmup_steps", "num_epochs", "total_steps",
    "max_tokens", "max_seconds", "stop_after_seconds", "eval_steps", "eval_epochs", "log_steps",
    "checkpoint_steps", "checkpoint_dir", "keep_last", "seed",
}  # fmt: skip
_ESTIMATES: dict[tuple[str, int, str, int], Estimate] = {}


def estimate_run(config: RunConfig) -> Estimate:
    """Estimate parameters, FLOPs and memory of a run whose sizes are resolved.

    What the loss and the optimizer hold is theirs: `chunked_cross_entropy` has a chunk's logits.
    Runs of the same sizes, as `plan` trains them, are estimated once in a process.
    """
    training = repr(config.training.model_dump(exclude=_NO_SIZES))
    sizes = (repr(config.model), config.data.batch_size, training, num_registered())
    if sizes not in _ESTIMATES:
        _ESTIMATES[sizes] = _estimated(config)
    return _ESTIMATES[sizes]


def _estimated(config: RunConfig) -> Estimate:
    training, batch_size = config.training, config.data.batch_size
    narrow = training.precision in ("bf16", "fp16")
    cost = estimate_model(
        config.model,
        batch_size=batch_size,
        gradient_checkpointing=training.gradient_checkpointing,
        bytes_per_activation=2 if narrow else 4,
        optimizer_states=_OPTIMIZER_STATES,
    )
    vocab_size = required(config.model, "vocab_size")
    tokens = batch_size * required(config.model, "sequence_length")
    if (held := loss_bytes(config.model, training, tokens)) is not None:
        blocks = cost.activation_bytes - logits_bytes(tokens, vocab_size)
        cost = replace(cost, activation_bytes=blocks + held)
    if (held_twice := optimizer_bytes(config.model, training)) is not None:
        state, update = held_twice
        cost = replace(cost, optimizer_bytes=state, update_bytes=update)
    if training.accumulation_steps == 1 and isinstance(config.model, TransformerConfig):
        cost = replace(cost, early_gradient_bytes=4 * vocab_size * config.model.d_model)
    return cost


def memory_limit(device: torch.device) -> int | None:
    """Return the bytes that the device has, None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def refuse_what_cannot_fit(config: RunConfig, device: torch.device) -> Estimate:
    """Return the cost estimate of a run that fits.

    Raises:
        ConfigError: weights, gradients, optimizer state and activations need more memory than the
            device has.
    """
    cost = estimate_run(config)
    limit = memory_limit(device)
    if limit is not None and cost.total_bytes > limit:
        raise ConfigError(
            "the model does not fit into memory",
            key="d_model",
            got=f"about {gib(cost.total_bytes)} for {cost.parameters:,} parameters and a batch of"
            f" {config.data.batch_size} x {config.model.sequence_length} tokens",
            expected=f"at most {gib(limit)} on {device}",
            fix="lower model.d_model, model.num_layers or data.batch_size"
            " (data.global_batch keeps the step's tokens), or set"
            " training.gradient_checkpointing: true or training.loss: chunked_cross_entropy",
        )
    return cost


def gib(num_bytes: int) -> str:
    """Return a size in GiB or MiB."""
    if num_bytes >= 1 << 30:
        return f"{num_bytes / (1 << 30):,.1f} GiB"
    return f"{num_bytes / (1 << 20):,.0f} MiB"
