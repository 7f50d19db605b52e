"""The configuration and the model that a checkpoint describes, however it was damaged or made.

A checkpoint may come from another version, a broken disk or a stranger. Its hashes prove that it is
whole, not that it means well: a few bytes of JSON can ask for a billion layers. So the model is
built without memory first, and compared with the tensors that are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from fundamentallm.config import RunConfig
from fundamentallm.config.model import ModelConfig
from fundamentallm.config.yaml.key_path import dotted
from fundamentallm.config.yaml.problems import to_config_error
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.models.build import build_model
from fundamentallm.training.checkpoint.manager import check_model_state

MOST_COMPUTED_BYTES = 256 << 20
"""What tables that are computed from a configuration may take beside as much as the weights do."""

# A constructor may make a parameter and put another in its place, and modules without any.
PARAMETERS_A_TENSOR, MODULES_A_TENSOR = 4, 64
_FIX = "use the version of fundamentallm that wrote it, or another checkpoint"


class _TooManyPartsError(Exception):
    pass


def stored_config(values: Any, where: str) -> RunConfig:
    """Return the configuration that a checkpoint or a report carries.

    Args:
        values: what `RunConfig.model_dump(mode="json")` returned, of any version.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: it has a key that this version does not know, or a value that it refuses.
    """
    what = "the stored configuration is not one of this version"
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        found = to_config_error(error, RunConfig, values, dotted)
        raise CheckpointError(
            f"{what}: {found.key}: {found.what}" if found.key else f"{what}: {found.what}",
            where=where,
            got=found.got,
            expected=found.expected,
            fix=_FIX,
        ) from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            what, where=where, got=f"{type(error).__name__}: {error}", fix=_FIX
        ) from error


def stored_shapes(config: ModelConfig, weights: Any, where: str) -> nn.Module:
    """Build the model on the meta device and hold it to the weights; it takes no memory.

    Args:
        config: the model's configuration.
        weights: the checkpoint's `state["model"]`.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: the configuration cannot be built, the weights are of another model, or
            tables that are computed would take far more than the weights.
        ConfigError: a part is not registered (a plugin's), or an option is not known.
    """
    if not isinstance(weights, Mapping):
        raise CheckpointError("the checkpoint holds no model", where=where)
    try:
        with torch.device("meta"), _at_most(len(weights)):
            model = build_model(config)
    except ConfigError as error:
        error.where = error.where or f"{where}: model.{error.key}".removesuffix(".")
        raise
    except _TooManyPartsError as error:
        raise CheckpointError(
            "the stored configuration describes a larger model than the weights are of",
            where=where,
            got=f"weights of {len(weights):,} tensors",
            fix=_FIX,
        ) from error
    except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            "the stored configuration cannot be built",
            where=where,
            got=str(error).partition("\n")[0] or type(error).__name__,
            fix=_FIX,
        ) from error
    check_model_state(model, weights, where)
    computed = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in weights)
    allowed = MOST_COMPUTED_BYTES + sum(
        value.nbytes for value in weights.values() if isinstance(value, Tensor)
    )
    if computed > allowed:
        raise CheckpointError(
            "the stored configuration asks for tables that are far larger than the weights",
            where=where,
            got=f"{computed:,} bytes, for a context of {config.sequence_length} tokens",
            expected=f"at most {allowed:,} bytes",
            fix=_FIX,
        )
    return model


def stored_model(config: ModelConfig, weights: Any, where: str) -> nn.Module:
    """Build the model of a checkpoint, with its weights, once it is known to fit them.

    Args:
        config, weights, where: as for `stored_shapes`.

    Raises:
        CheckpointError, ConfigError: as `stored_shapes`.
    """
    stored_shapes(config, weights, where)
    model = build_model(config)
    model.load_state_dict(weights)
    return model


@contextmanager
def _at_most(num_tensors: int) -> Iterator[None]:
    """Stop a constructor that makes far more parameters or modules than there are tensors."""
    left = {
        "parameters": 256 + PARAMETERS_A_TENSOR * num_tensors,
        "modules": 4096 + MODULES_A_TENSOR * num_tensors,
    }

    def count(kind: str) -> None:
        left[kind] -= 1
        if left[kind] < 0:
            raise _TooManyPartsError

    with ExitStack() as hooks:
        for register, kind in (
            (register_module_parameter_registration_hook, "parameters"),
            (register_module_module_registration_hook, "modules"),
        ):
            handle = register(lambda *_, kind=kind: count(kind))
            hooks.callback(handle.remove)
        yield
