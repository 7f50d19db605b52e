"""Refuse what a configuration asks of a model that cannot do it, before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from fundamentallm.config import RunConfig
from fundamentallm.errors import ConfigError
from fundamentallm.training.losses import takes_hidden_states


def check_abilities(config: RunConfig, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
    """Check that a model offers what the run needs; `models.families` has the table.

    Raises:
        ConfigError: it does not; the error names the setting that asks for it.
    """
    accepted = inspect.signature(model.forward).parameters
    has_head = "return_hidden" in accepted and hasattr(model, "logits_from_hidden")
    missing = {
        "data.packing": (
            config.data.packing == "document" and "document_ids" not in accepted,
            "documents cannot be masked from each other: its `forward` has no `document_ids`",
            "set data.packing to continuous",
        ),
        "training.loss": (
            takes_hidden_states(loss_fn) and not has_head,
            "this loss needs the head on its own: `forward(return_hidden=)`, `logits_from_hidden`",
            "set training.loss to cross_entropy",
        ),
        "training.gradient_checkpointing": (
            config.training.gradient_checkpointing and not hasattr(model, "gradient_checkpointing"),
            "activations cannot be computed again: it has no `gradient_checkpointing`",
            "set training.gradient_checkpointing to false",
        ),
    }
    for key, (is_missing, what, fix) in missing.items():
        if is_missing:
            with config.locating_errors(key):
                raise ConfigError(what, got=f"model.family {config.model.family}", fix=fix)
