"""Earlier measurements on this machine, kept in the user's cache directory.

`$XDG_CACHE_HOME/fundamentallm/speed.json`, or `~/.cache/...`. An entry belongs to a machine, a
shape and the versions that computed it, and holds a measurement for each setting.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fundamentallm
from fundamentallm.compute.plan import Machine
from fundamentallm.compute.processor import kind_of_processor
from fundamentallm.config import RunConfig
from fundamentallm.engine.tuning.measuring import Measurement
from fundamentallm.files.kept_figures import KeptFigures, cache_file, canonical

Measurements = dict[str, Measurement]
"""Measurements by the name of their setting."""


class SpeedCache:
    """The cache file, which is optional and may be missing.

    Args:
        path: None for the user's cache; without a home directory nothing is kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_file("speed.json")
        self._kept: KeptFigures[Measurements] = KeptFigures(self.path, _parse, _plain)

    def get(self, circumstances: Mapping[str, Any]) -> Measurements:
        """Return the measurements for these circumstances; empty if the file is damaged."""
        return self._kept.get(circumstances) or {}

    def put(self, circumstances: Mapping[str, Any], measured: Measurements) -> None:
        """Store measurements; a disk error is only a warning."""
        self._kept.put(circumstances, measured)


def circumstances_of(config: RunConfig, machine: Machine) -> dict[str, str | int | None]:
    """Return everything that the time of a micro-batch depends on, as plain values.

    Args:
        config: with everything resolved; the fields to choose are ignored.
        machine: where the run computes.
    """
    training = config.training
    shape = {
        "model": config.model.with_random_weights().model_dump(mode="json"),
        "optimizer": training.optimizer.to_plain(),
        "loss": training.loss.to_plain(),
        "gradient_checkpointing": training.gradient_checkpointing,
        "packing": config.data.packing,
    }
    return {
        **machine.circumstances(),
        **kind_of_processor(),
        "fundamentallm": fundamentallm.__version__,
        "micro_batch": f"{config.data.batch_size} x {config.data.sequence_length}",
        "shape": hashlib.sha256(canonical(shape)).hexdigest(),
    }


def _plain(measured: Measurements) -> dict[str, Any]:
    return {
        name: {"step_seconds": m.step_seconds, "compile_seconds": m.compile_seconds}
        for name, m in measured.items()
    }


def _parse(plain: Any) -> Measurements:
    return {str(name): _measurement(values) for name, values in plain.items()}


def _measurement(values: Mapping[str, Any]) -> Measurement:
    seconds, compiling = float(values["step_seconds"]), float(values["compile_seconds"])
    if not (0 < seconds < math.inf and 0 <= compiling < math.inf):
        raise ValueError(f"{seconds} seconds a step")
    return Measurement(seconds, compiling)
