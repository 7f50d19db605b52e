"""The conditions for a resumed run to equal the uninterrupted run bit for bit."""

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

# The libraries whose arithmetic or random numbers determine the results of a run.
DECISIVE = ("fundamentallm", "torch")


RULES = 1
"""The number of the rules that an existing run sees: the order of the data, the split, the list of
files, the schedule under a clock, and the limits."""

RULES_KEY = "rules"
FIRST_REVISION = "e09519b"
"""What trains a run without a number further."""


def refuse_other_rules(manifest: Manifest) -> None:
    """Refuse to train a run further that began under other rules; it can still be read.

    Raises:
        CheckpointError: it did.
    """
    began_with = manifest.metadata.get(RULES_KEY)
    if began_with != RULES:
        raise CheckpointError(
            "the run began under other rules for the order of its data, its split and its limits,"
            " so it would not go on as it was",
            where=manifest.name,
            got="rules of revision " + FIRST_REVISION
            if began_with is None
            else f"rules {began_with!r:.20}, which this version does not know",
            expected=f"rules {RULES}",
            fix=f"go on with revision {FIRST_REVISION}, start a fresh run with --resume never, or"
            " export it and begin a run from its weights (model.init_from)",
        )


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
        allow: only warn.

    Raises:
        CheckpointError: a library that determines the results differs.
    """
    saved, now = manifest.metadata.get("versions", {}), versions()
    differences = [
        f"{name}: {saved[name]} then, {now[name]} now"
        for name in DECISIVE
        if name in saved and saved[name] != now[name]
    ]
    if differences and not allow:
        raise CheckpointError(
            "the run was trained with other library versions, so it cannot continue exactly:\n    "
            + "\n    ".join(differences),
            where=manifest.name,
            fix="install those versions, or accept different results with --allow-inexact",
        )
    for difference in differences:
        logger.warning("the run is not continued bit for bit: %s", difference)


def tell_other_circumstances(manifest: Manifest, machine: Machine) -> None:
    """Warn if numbers will be rounded differently from now on."""
    saved, now = manifest.metadata.get("circumstances", {}), machine.circumstances()
    for name, value in now.items():
        if name in saved and saved[name] != value and machine.ranks.is_writer:
            logger.warning(
                "the run continues equal up to rounding, not bit for bit: %s was %s and is now %s",
                name,
                saved[name],
                value,
            )
