"""On what a benchmark ran, and commands of the package limited to an older instruction set.

    python benchmarks/machine.py avx2 run shakespeare_cpu
    python benchmarks/machine.py avx512 generate runs/shakespeare_cpu

torch, its libraries and the native code are limited; the clock, the caches and the memory stay
those of this processor, so such a figure is an emulated one. Time counts from the start of this
process, as in the command itself.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

# Instruction sets below the processor's own: torch's, MKL's and oneDNN's names, the compiler's.
ISAS = {"avx2": ("avx2", "AVX2", "x86-64-v3"), "avx512": ("avx512", "AVX512_CORE", "x86-64-v4")}


def limited(isa: str | None) -> dict[str, str]:
    """Return the environment variables that limit torch, and MKL, to an instruction set."""
    if isa is None:
        return {}
    torch_name, library_name, _ = ISAS[isa]
    return {
        "ATEN_CPU_CAPABILITY": torch_name,
        "ONEDNN_MAX_CPU_ISA": library_name,
        "MKL_ENABLE_INSTRUCTIONS": library_name.partition("_")[0],
    }


def limit_this_process(isa: str | None) -> None:
    """Begin again with these variables if they are not set; limit the native code."""
    if isa is None:
        return
    limits = limited(isa)
    if any(os.environ.get(name) != value for name, value in limits.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **limits})
    from fundamentallm.models.native import library

    library.OWN_PROCESSOR = f"-march={ISAS[isa][2]}"


def memory_bandwidth() -> float:
    """Return the bytes a second of a copy that no cache holds, read and written."""
    import torch

    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        target.copy_(source)
        taken.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(taken)


def fastest_tenth(taken: list[float]) -> float:
    """Return the time that one step in ten stays below: what one takes undisturbed."""
    return sorted(taken)[len(taken) // 10]


def machine_report(isa: str | None) -> dict[str, Any]:
    """Return on what the figures were measured."""
    import torch

    lines = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    )
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    known = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
    siblings, cores = (int(fields.get(name, 0)) for name in ("siblings", "cpu cores"))
    return {
        "processor": fields.get("model name", platform.machine()),
        "hardware threads": os.cpu_count(),
        "threads of a core": siblings // cores if cores else None,
        "instruction sets": [flag for flag in known if flag in flags],
        "limited to": f"{isa} (emulated)" if isa else None,
        "torch": torch.__version__,
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "copying, GB/s": round(memory_bandwidth() / 1e9, 1),
    }


def main() -> int:
    """Limit this process, then give the command."""
    isa, *words = sys.argv[1:] or [""]
    if isa not in ISAS or not words:
        sys.exit(f"usage: python {sys.argv[0]} {{{','.join(ISAS)}}} COMMAND ...")
    limit_this_process(isa)
    from fundamentallm.engine.cli import main as command

    return command(words)


if __name__ == "__main__":
    sys.exit(main())
