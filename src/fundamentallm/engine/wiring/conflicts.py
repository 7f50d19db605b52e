"""Settings that contradict each other, and settings without effect."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from fundamentallm.config import RunConfig
from fundamentallm.config.training import TrainingConfig
from fundamentallm.config.yaml.problems import shown
from fundamentallm.errors import ConfigError
from fundamentallm.training.optimizers import OPTIMIZERS
from fundamentallm.training.schedulers import SCHEDULERS

KEEP_LAST = "training.keep_last"
N_SAVED = "handlers.checkpointing.n_saved"

# Fields of `training` that only one handler reads, and handlers that listen to its events.
READ_BY_HANDLER = {
    "schedule": ("training.scheduler", "training.warmup_steps", "training.min_learning_rate"),
    "evaluation": (
        "training.eval_steps",
        "training.eval_epochs",
        "evaluation.metrics",
        "handlers.early_stopping",
        "handlers.pruning",
        "handlers.samples",
    ),
    "checkpointing": (KEEP_LAST, "training.checkpoint_steps"),
}


def settle_kept_checkpoints(config: RunConfig, *, begins: bool) -> RunConfig:
    """Make `training.keep_last` and the option `n_saved` of `checkpointing` agree.

    Args:
        config: as written.
        begins: whether the run is new. A continued run keeps its value of `n_saved`, which was once
            used without comparing the two.

    Raises:
        ConfigError: both are set in a new run, and they differ.
    """
    n_saved = _n_saved(config)
    if n_saved is None or n_saved == config.training.keep_last:
        return config
    if begins and "keep_last" in config.training.model_fields_set:
        raise ConfigError(
            f"{KEEP_LAST} {config.training.keep_last} and {N_SAVED} {n_saved} disagree",
            where=f"{config.locate(KEEP_LAST)} and {config.locate(N_SAVED)}",
            fix="keep one of them, or make them equal",
        )
    training = config.training.model_copy(update={"keep_last": n_saved})
    return config.model_copy(update={"training": training})


def unread_settings(written: RunConfig) -> list[str]:
    """Return a note for each written setting that no part of the run reads."""
    return [f"{key} has no effect: {reason}" for key, reason in _unread(written)]


def _n_saved(config: RunConfig) -> int | None:
    options = config.handlers.get("checkpointing")
    return options.get("n_saved") if isinstance(options, dict) else None


def _unread(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield each written key that nothing reads, with the reason."""
    training = config.training
    n_saved = _n_saved(config)
    if n_saved is not None and n_saved != training.keep_last and _is_written(config, KEEP_LAST):
        yield KEEP_LAST, f"the run keeps {n_saved} checkpoints, the n_saved that it started with"
    for handler, keys in READ_BY_HANDLER.items():
        if config.handlers.get(handler) is False:
            for key in filter(lambda key: _is_written(config, key), keys):
                yield key, f"the handler {handler} is switched off"
    optimizer = training.optimizer.name
    for option in ("eps", "weight_decay"):
        key = f"training.optimizer_{option}"
        if option not in OPTIMIZERS.options(optimizer) and _is_written(config, key):
            yield key, f"the optimizer {optimizer} has no such option"
    schedule = training.scheduler.name
    parameters = inspect.signature(SCHEDULERS.get(schedule)).parameters
    for key, parameter in (("warmup_steps", "warmup_steps"), ("min_learning_rate", "min_lr")):
        if parameter not in parameters and _is_written(config, f"training.{key}"):
            yield f"training.{key}", f"the schedule {schedule} does not use it"


def _is_written(config: RunConfig, key: str) -> bool:
    """Return whether a key is set to a non-default value, or a handler is switched on."""
    section, name = key.split(".")
    if section == "evaluation":
        return bool(config.evaluation.metrics)
    if section == "handlers":
        return config.handlers.get(name, False) is not False
    written = name in config.training.model_fields_set
    default = TrainingConfig.model_fields[name].default
    return written and getattr(config.training, name) != default


def require_validation_text(config: RunConfig, what: str) -> None:
    """Refuse a configuration without validation text for something that compares its losses.

    Args:
        config: as written.
        what: what compares them, with its article.

    Raises:
        ConfigError: the second fraction of `data.split` is 0.
    """
    if not config.data.split[1]:
        raise ConfigError(
            f"{what} compares validation losses, and there is no validation text",
            where=config.locate("data.split"),
            got=shown(list(config.data.split)),
            fix="raise the second fraction",
        )
