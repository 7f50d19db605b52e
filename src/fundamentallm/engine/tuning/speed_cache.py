"""Earlier measurements on this machine: one small JSON file in the user's cache directory.

`$XDG_CACHE_HOME/fundamentallm/speed.json`, or `~/.cache/...`. An entry belongs to a machine, a
shape and the versions that computed it, and holds a measurement for each setting. The file is
replaced as a whole, so a reader never meets half of one; if two runs write at once, one entry
is lost.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fundamentallm
from fundamentallm.compute.plan import Machine
from fundamentallm.config import RunConfig
from fundamentallm.engine.tuning.measuring import Measurement
from fundamentallm.errors import DataError
from fundamentallm.files.cache_directory import default_cache_dir
from fundamentallm.files.filesystem import Filesystem, make_directories, replace_file

logger = logging.getLogger(__name__)

LARGEST_FILE = 4 << 20  # bytes
MOST_ENTRIES = 500  # the oldest go first

Measurements = dict[str, Measurement]
"""Measurements by the name of their setting."""


class SpeedCache:
    """The cache file, which is optional and may be missing.

    Args:
        path: None for the user's cache; without a home directory nothing is kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            try:
                path = default_cache_dir() / "speed.json"
            except DataError:
                path = None
        self.path = path

    def get(self, circumstances: Mapping[str, Any]) -> Measurements:
        """Return the measurements for these circumstances; empty if the file is damaged."""
        entry = self._entries().get(_key(circumstances))
        return dict(entry["measured"]) if entry else {}

    def put(self, circumstances: Mapping[str, Any], measured: Measurements) -> None:
        """Store measurements; a disk error is only a warning."""
        if self.path is None:
            return
        entries = self._entries(warn=False)
        key = _key(circumstances)
        entries.pop(key, None)
        entries[key] = {"of": dict(circumstances), "measured": measured}
        kept = dict(list(entries.items())[-MOST_ENTRIES:])
        plain = {
            key: {
                "of": entry["of"],
                "measured": {
                    name: {"step_seconds": m.step_seconds, "compile_seconds": m.compile_seconds}
                    for name, m in entry["measured"].items()
                },
            }
            for key, entry in kept.items()
        }
        try:
            text = json.dumps({"version": 1, "entries": plain}, indent=1, allow_nan=False)
            filesystem = Filesystem()
            make_directories(filesystem, self.path.parent)
            replace_file(filesystem, self.path, [text.encode()])
        except OSError as error:
            logger.warning("the measurements cannot be stored in %s: %s", self.path, error)

    def _entries(self, warn: bool = True) -> dict[str, dict[str, Any]]:
        if self.path is None:
            return {}
        try:
            if self.path.stat().st_size > LARGEST_FILE:
                raise ValueError("it is too large")
            read = json.loads(self.path.read_text(encoding="utf-8"))
            if read["version"] != 1:
                raise ValueError(f"version {read['version']}")
            return {
                str(key): {
                    "of": dict(entry["of"]),
                    "measured": {
                        str(name): _measurement(values)
                        for name, values in entry["measured"].items()
                    },
                }
                for key, entry in read["entries"].items()
            }
        except FileNotFoundError:
            return {}
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            if warn:
                logger.warning("%s is damaged and will be rewritten: %s", self.path, error)
            return {}


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
        "processor": _processor(),
        "torch": torch.__version__,
        "fundamentallm": fundamentallm.__version__,
        "micro_batch": f"{config.data.batch_size} x {config.data.sequence_length}",
        "shape": hashlib.sha256(_canonical(shape)).hexdigest(),
    }


def _measurement(values: Mapping[str, Any]) -> Measurement:
    seconds, compiling = float(values["step_seconds"]), float(values["compile_seconds"])
    if not (0 < seconds < math.inf and 0 <= compiling < math.inf):
        raise ValueError(f"{seconds} seconds a step")
    return Measurement(seconds, compiling)


def _key(circumstances: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(circumstances)).hexdigest()


def _canonical(plain: Any) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str).encode()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
