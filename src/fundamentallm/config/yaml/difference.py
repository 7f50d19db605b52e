"""The differences between two configurations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fundamentallm.config.base import BaseConfig, in_yaml
from fundamentallm.config.model import ModelConfig, TransformerConfig, model_class

ABSENT = "(absent)"
"""Stands for the value of a key that one side lacks."""


def value_in_words(value: Any) -> str:
    """Return a side of a difference as a file has it; `unset` for ABSENT."""
    return "unset" if value == ABSENT else in_yaml(value)


RESUME_MAY_DIFFER = frozenset(
    {
        "name",
        "plugins",
        "evaluation",
        "parallel",
        "training.num_epochs",
        "training.total_steps",
        "training.max_tokens",
        "training.max_seconds",
        "training.stop_after_seconds",
        "training.log_steps",
        "training.keep_last",
        "training.checkpoint_dir",
        "training.checkpoint_steps",
        "handlers.checkpointing.score_name",  # an option that is no longer there
        "handlers.progress",
        "handlers.logs",
        "handlers.tensorboard",
        "handlers.samples",
        "handlers.usage",
        "handlers.mlflow",
        "handlers.wandb",
        "handlers.clearml",
        "handlers.trackio",
        "handlers.neptune",
        "handlers.visdom",
        "handlers.polyaxon",
    }
)
"""Keys, with all below them, that may change when a run is resumed: budgets, metrics, logging,
retention, the place of the checkpoints."""


BUDGETS = ("num_epochs", "total_steps", "max_tokens", "max_seconds")
"""The fields of `training` that end a run."""

CHANGEABLE = frozenset(
    {
        "training.learning_rate",
        "training.min_learning_rate",
        "training.scheduler",
        "training.warmup_steps",
        "training.optimizer",
        "training.optimizer_eps",
        "training.optimizer_weight_decay",
        "training.loss",
        "training.max_grad_norm",
        "training.max_grad_value",
        "training.accumulation_steps",
        "training.gradient_checkpointing",
        "training.eval_steps",
        "training.eval_epochs",
        "training.device",
        "training.threads",
        "training.deterministic",
        "data.batch_size",
        "data.global_batch",
        "handlers",
    }
)
"""Keys, with all below them, with which a run may go on if the user says so, but for the name of
the optimizer."""


def may_differ_on_resume(key: str) -> bool:
    """Return whether a dotted key is in RESUME_MAY_DIFFER or below a key in it."""
    return _is_at_or_below(key, RESUME_MAY_DIFFER)


def may_be_changed(key: str) -> bool:
    """Return whether a dotted key is in CHANGEABLE or below a key in it."""
    return _is_at_or_below(key, CHANGEABLE) and key != "training.optimizer.name"


def _is_at_or_below(key: str, keys: Collection[str]) -> bool:
    return any(key == one or key.startswith(one + ".") for one in keys)


def config_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Compare two configurations as `to_dict` returns them.

    Args:
        a, b: nested plain values.

    Returns:
        (dotted key, value in a, value in b) for each value that differs, in the order of a and
        then b; ABSENT for a key that one side lacks. 1 and 1.0 are the same, 1 and true are not.
    """
    differences: list[tuple[str, Any, Any]] = []
    for key in [*a, *(key for key in b if key not in a)]:
        left, right = a.get(key, ABSENT), b.get(key, ABSENT)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            differences += [
                (f"{key}.{below}", *values) for below, *values in config_differences(left, right)
            ]
        elif left != right or isinstance(left, bool) != isinstance(right, bool):
            differences.append((key, left, right))
    return differences


def with_defaults(stored: Mapping[str, Any], kind: type[BaseConfig]) -> dict[str, Any]:
    """Return a stored description with the present default for each field that it lacks.

    A field added after the description was written had its default behaviour then, so
    a missing field and the default mean the same.

    Args:
        stored: what `model_dump(mode="json")` of the class returned when it was stored.
        kind: the class, all of whose fields have defaults.
    """
    # What `size: auto` chooses is no default.
    size = stored.get("size") if kind is TransformerConfig else None
    plain = kind() if size is None else kind.model_validate({"size": size})
    completed = {**plain.model_dump(mode="json"), **stored}
    for name, field in kind.model_fields.items():
        section: Any = field.annotation
        if section == ModelConfig and model_class(completed[name]) is TransformerConfig:
            section = TransformerConfig  # other families have no defaults here
        is_section = isinstance(section, type) and issubclass(section, BaseConfig)
        if is_section and isinstance(completed[name], Mapping):
            completed[name] = with_defaults(completed[name], section)
    return completed
