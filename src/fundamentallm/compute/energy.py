"""Energy that this machine says it has used, where it can be read.

Linux tells that of processors and their memory in /sys/class/powercap (RAPL), which many systems
let only the administrator read; NVML that of an NVIDIA GPU, if `pynvml` is installed. Both are of
the whole processor or GPU: what other programs use there is in the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

POWERCAP = Path("/sys/class/powercap")


class Counter(NamedTuple):
    """A counter of energy.

    Attributes:
        joules: since some time.
        wraps_at: joules at which it begins again at 0; 0: never.
    """

    joules: float
    wraps_at: float


class EnergyMeter:
    """Adds up what counters say, between the reads of this object.

    Args:
        device: where the run computes.
        powercap: the directory of the processors' counters.
    """

    def __init__(self, device: torch.device, powercap: Path = POWERCAP) -> None:
        self._device, self._powercap = device, powercap
        self._joules: dict[str, float] = {}
        self._last = self._counters()

    def read(self) -> dict[str, float]:
        """Return the joules since this object was made, by counter; empty where none is readable.

        A processor's counter wraps about every twenty minutes of full load, and must be read more
        often than that.
        """
        now = self._counters()
        for name, counter in now.items():
            if (last := self._last.get(name)) is not None:
                used = counter.joules - last.joules
                if used < 0:
                    used += counter.wraps_at
                self._joules[name] = self._joules.get(name, 0.0) + max(0.0, used)
        self._last = {**self._last, **now}
        return dict(self._joules)

    def _counters(self) -> dict[str, Counter]:
        return {**dict(_of_processors(self._powercap)), **dict(_of_gpu(self._device))}


def _of_processors(powercap: Path) -> Iterator[tuple[str, Counter]]:
    """Yield the packages and their memory; cores and graphics are inside a package."""
    for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's too have this name
        try:
            name = (zone / "name").read_text().strip()
            used, largest = (
                int((zone / file).read_text()) / 1e6
                for file in ("energy_uj", "max_energy_range_uj")
            )
        except (OSError, ValueError):
            continue
        if name.startswith("package"):
            yield f"cpu {name}", Counter(used, largest)
        elif name == "dram":
            yield f"memory {zone.name.removeprefix('intel-rapl:')}", Counter(used, largest)


def _of_gpu(device: torch.device) -> Iterator[tuple[str, Counter]]:
    if device.type != "cuda":
        return
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        number = torch.cuda.current_device() if device.index is None else device.index
        uuid = torch.cuda.get_device_properties(number).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        millijoules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # the library's own errors, of another driver or a GPU without a counter
        return
    yield f"gpu {number}", Counter(millijoules / 1e3, 0.0)
