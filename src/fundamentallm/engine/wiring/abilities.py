"""Refuse a configuration that needs abilities that the model lacks, before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from fundamentallm.config import RunConfig
from fundamentallm.errors import ConfigError
from fundamentallm.models.calling import can_recompute_activations
from fundamentallm.training.losses import takes_hidden_states


def check_abilities(config: RunConfig, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
    """Check that a model has the abilities that the run needs; `models.families` has the table.

    Raises:
        ConfigError: it lacks one; the error names the setting that needs it.
    """
    accepted = inspect.signature(model.forward).parameters
    has_head = "return_hidden" in accepted and hasattr(model, "logits_from_hidden")
    missing = {
        "data.packing": (
            config.data.packing == "document" and "document_ids" not in accepted,
            "the model cannot mask documents from each other: its `forward` has no `document_ids`",
            "set data.packing to continuous",
        ),
        "training.loss": (
            takes_hidden_states(loss_fn) and not has_head,
            "this loss needs a model with `forward(return_hidden=)` and `logits_from_hidden`",
            "set training.loss to cross_entropy",
        ),
        "training.gradient_checkpointing": (
            config.training.gradient_checkpointing and not can_recompute_activations(model),
            "the model cannot recompute activations: it has no `gradient_checkpointing`",
            "set training.gradient_checkpointing to false",
        ),
    }
    for key, (is_missing, what, fix) in missing.items():
        if is_missing:
            with config.locating_errors(key):
                raise ConfigError(what, got=f"model.family {config.model.family}", fix=fix)
