"""Refuse a model that this machine cannot hold, before it is built."""

from __future__ import annotations

import os

import torch

from fundamentallm.config import RunConfig
from fundamentallm.errors import ConfigError
from fundamentallm.models.build import estimate_model
from fundamentallm.models.estimate import Estimate

# Float32 numbers a parameter; Adam's two otherwise.
OPTIMIZER_STATES = {"sgd": 1, "rmsprop": 1, "lion": 1, "muon": 1}


def estimate_run(config: RunConfig) -> Estimate:
    """Estimate parameters, FLOPs and memory of a run whose sizes are resolved."""
    narrow = config.training.precision in ("bf16", "fp16")
    return estimate_model(
        config.model,
        batch_size=config.data.batch_size,
        gradient_checkpointing=config.training.gradient_checkpointing,
        bytes_per_activation=2 if narrow else 4,
        optimizer_states=OPTIMIZER_STATES.get(config.training.optimizer.name, 2),
    )


def memory_limit(device: torch.device) -> int | None:
    """Return the bytes that the device has, None where it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def refuse_what_cannot_fit(config: RunConfig, device: torch.device) -> Estimate:
    """Return the estimate of a run that fits.

    Raises:
        ConfigError: weights, gradients, optimizer state and activations need more memory than the
            device has.
    """
    cost = estimate_run(config)
    limit = memory_limit(device)
    if limit is not None and cost.total_bytes > limit:
        raise ConfigError(
            "the model cannot fit into memory",
            key="d_model",
            got=f"about {gib(cost.total_bytes)} for {cost.parameters:,} parameters and a batch of"
            f" {config.data.batch_size} x {config.model.sequence_length} tokens",
            expected=f"at most {gib(limit)} on {device}",
            fix="lower model.d_model, model.num_layers or data.batch_size"
            " (training.accumulation_steps keeps the step's tokens)",
        )
    return cost


def gib(num_bytes: int) -> str:
    """Return a size in GiB or MiB."""
    if num_bytes >= 1 << 30:
        return f"{num_bytes / (1 << 30):,.1f} GiB"
    return f"{num_bytes / (1 << 20):,.0f} MiB"
