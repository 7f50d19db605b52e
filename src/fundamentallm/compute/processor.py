"""Of which kind this processor is, and what a kind is fast in: measured once, then kept.

What a processor computes fast depends on its units (bfloat16, AVX-512, AVX2, NEON), and no list of
names says it. So a product of each type is timed, for less than half a second, and the rates are
kept in `$XDG_CACHE_HOME/fundamentallm/rates.json`, or `~/.cache/...`, by kind of processor.
"""

from __future__ import annotations

import math
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fundamentallm.compute.peak import measured_peak
from fundamentallm.files.kept_figures import KeptFigures, cache_file

# Variables that limit the instructions of torch's libraries.
LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)
SECONDS = 0.04  # for the products of a type, not counting what disturbed them
CALLS = 8  # at least: any may be disturbed
# Tokens of a thread and width: a small model's product, and quick where a type is emulated. A
# square one would not tell what several threads do in bfloat16 (`measured_peak`).
ROWS, WIDTH = 256, 256


class Rates(NamedTuple):
    """The FLOP/s of the products of a small model, by all threads."""

    float32: float
    bfloat16: float


def kind_of_processor() -> dict[str, str | int]:
    """Return what the rates depend on, as plain values."""
    return {
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "limits": " ".join(f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def processor_name() -> str:
    """Return the processor's model name as the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_rates() -> Rates:
    """Return the rates of this processor with the threads that torch is set to.

    Measured at most once for a kind of processor: in 0.1 s with bfloat16 units, and in 0.5 s where
    a processor of 1 GFLOP/s emulates them.
    """
    return _rates(torch.get_num_threads())


@cache
def _rates(threads: int) -> Rates:
    kept: KeptFigures[Rates] = KeptFigures(
        cache_file("rates.json"), _parse, Rates._asdict, store_or_warn=False
    )
    rows = ROWS * threads
    kind = {**kind_of_processor(), "product": f"{rows} x {WIDTH}"}
    known = kept.get(kind)
    if known is None:
        cpu = torch.device("cpu")
        known = Rates(
            *(
                measured_peak(cpu, dtype, shapes=((rows, WIDTH),), calls=CALLS, seconds=SECONDS)
                for dtype in (torch.float32, torch.bfloat16)
            )
        )
        kept.put(kind, known)
    return known


def _parse(values: Any) -> Rates:
    rates = Rates(float(values["float32"]), float(values["bfloat16"]))
    if not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"rates of {rates}")
    return rates


def why_not_bf16(device: torch.device) -> str:
    """Return why bfloat16 is no gain on a device, with the rates; empty if it is, or may be."""
    if device.type != "cpu":
        return ""
    wide, narrow = cpu_rates()
    if narrow > wide:
        return ""
    return (
        f"matrix products here do {narrow / 1e9:.3g} GFLOP/s in bfloat16 and {wide / 1e9:.3g} in "
        "float32"
    )
