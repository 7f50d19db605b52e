"""The conditions for a resumed run to equal the uninterrupted run bit for bit."""

from __future__ import annotations

import logging
import math
import platform
from dataclasses import dataclass

import ignite
import numpy as np
import torch

import fundamentallm
from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.plan import Machine
from fundamentallm.config import RunConfig
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


@dataclass(frozen=True, slots=True)
class Split:
    """How the rows of a step are split.

    Attributes:
        batch_size: rows of a micro-batch.
        accumulation_steps: micro-batches of one rank.
        ranks: processes.
    """

    batch_size: int
    accumulation_steps: int
    ranks: int

    @classmethod
    def of(cls, config: RunConfig, ranks: Ranks) -> Split:
        """Return the split of a configuration with its accumulation resolved."""
        return cls(config.data.batch_size, config.training.accumulation_steps, ranks.world_size)

    @classmethod
    def saved_in(cls, manifest: Manifest) -> Split | None:
        """Return the split by which a checkpoint's run was trained; None if it does not say."""
        try:
            config, circumstances = manifest.metadata["config"], manifest.metadata["circumstances"]
            found = (
                config["data"]["batch_size"],
                config["training"]["accumulation_steps"],
                circumstances["ranks"],
            )
        except (LookupError, TypeError):
            return None
        return cls(*found) if all(type(number) is int for number in found) else None

    @property
    def rows(self) -> int:
        """Rows of a step over all ranks."""
        return math.prod((self.batch_size, self.accumulation_steps, self.ranks))

    def __str__(self) -> str:
        """Return the split in words."""
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks} x {self.accumulation_steps} micro-batches x {self.batch_size} rows"


def refuse_other_rows(manifest: Manifest, config: RunConfig, ranks: Ranks) -> None:
    """Refuse to go on with another number of rows a step.

    Raises:
        CheckpointError: the number of ranks is another one, and no `data.global_batch` makes the
            rows as many as they were.
    """
    saved, now = Split.saved_in(manifest), Split.of(config, ranks)
    if saved is None or saved.rows == now.rows:
        return
    raise CheckpointError(
        "on another number of ranks a step would have other rows than the run's",
        where=manifest.name,
        got=f"{now} = {now.rows}",
        expected=f"{saved} = {saved.rows}",
        fix=f"start {saved.ranks} ranks, or set data.global_batch: {saved.rows}",
    )


def tell_other_split(manifest: Manifest, config: RunConfig, ranks: Ranks) -> None:
    """Say what holds for a run that goes on with the same rows a step, split in another way."""
    saved, now = Split.saved_in(manifest), Split.of(config, ranks)
    if saved is not None and saved != now and ranks.is_writer:
        logger.info(
            "a step was %s and is now %s: the restored state is bitwise what was saved, and the"
            " run goes on equal to rounding (dropout draws other numbers)",
            saved,
            now,
        )


def tell_other_circumstances(manifest: Manifest, machine: Machine) -> None:
    """Warn if another device or number of threads will round differently."""
    saved, now = manifest.metadata.get("circumstances", {}), machine.circumstances()
    del now["ranks"]
    for name, value in now.items():
        if name in saved and saved[name] != value and machine.ranks.is_writer:
            logger.warning(
                "the run continues equal up to rounding, not bit for bit: %s was %s and is now %s",
                name,
                saved[name],
                value,
            )
