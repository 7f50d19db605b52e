"""What a resumed run needs to be bit for bit the run that was not interrupted."""

from __future__ import annotations

import logging
import platform

import ignite
import numpy as np
import torch

import fundamentallm
from fundamentallm.compute.plan import Machine
from fundamentallm.errors import CheckpointError
from fundamentallm.training.checkpoint.manifest import Manifest

logger = logging.getLogger(__name__)

# The libraries whose arithmetic or order of random numbers makes the course of a run.
DECISIVE = ("fundamentallm", "torch")


def versions() -> dict[str, str]:
    """Return the versions that every checkpoint carries."""
    return {
        "fundamentallm": fundamentallm.__version__,
        "torch": torch.__version__,
        "ignite": ignite.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def refuse_other_versions(manifest: Manifest, allow: bool) -> None:
    """Compare the libraries with those that the checkpoint was saved by.

    Args:
        manifest: the checkpoint's.
        allow: say so and go on.

    Raises:
        CheckpointError: one that decides the course differs.
    """
    saved, now = manifest.metadata.get("versions", {}), versions()
    differences = [
        f"{name}: {saved[name]} there, {now[name]} here"
        for name in DECISIVE
        if name in saved and saved[name] != now[name]
    ]
    if differences and not allow:
        raise CheckpointError(
            "the run was trained with other versions, so that it would not go on exactly:\n    "
            + "\n    ".join(differences),
            where=manifest.name,
            fix="install those versions, or accept another course with --allow-inexact",
        )
    for difference in differences:
        logger.warning("not bit for bit the same run: %s", difference)


def tell_other_circumstances(manifest: Manifest, machine: Machine) -> None:
    """Warn where the same numbers will be rounded in another way from here on."""
    saved, now = manifest.metadata.get("circumstances", {}), machine.circumstances()
    for name, value in now.items():
        if name in saved and saved[name] != value and machine.ranks.is_writer:
            logger.warning(
                "equal to rounding, not bit for bit: %s was %s and is %s", name, saved[name], value
            )
