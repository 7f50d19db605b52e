"""The peak rate of floating-point operations of a device in matrix products."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence

import torch

# Dense products with tensor cores, FLOP/s, of NVIDIA's data sheets (which also quote twice as much,
# for matrices of which half is zero).
_BF16_DATA_SHEETS = {
    "H200": 989.4e12,
    "H100 NVL": 835.0e12,
    "H100 PCIe": 756.0e12,
    "H100": 989.4e12,
    "A100": 312.0e12,
    "L40S": 362.0e12,
    "L4": 121.0e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71.0e12,
}


def device_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return a device's peak in FLOP/s: from the data sheet for a known GPU, else measured.

    Args:
        device: a GPU or CPU.
        dtype: float32, bfloat16 or float16.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for model, peak in _BF16_DATA_SHEETS.items():
            # The name of a GPU slice does not tell its share of the peak, and a card that is called
            # after another (Laptop, Ti, D) has one of its own.
            if re.search(rf"\b{model}\b(?! (?:Laptop|Ti|D)\b)", name) and "MIG" not in name:
                return peak
    return measured_peak(device, dtype)


def measured_peak(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]] = (),
    calls: int = 5,
    seconds: float = 0.0,
) -> float:
    """Return the highest FLOP/s measured for products (R, N) by (N, N).

    It takes 0.2 s on two CPU cores. There one product has many more rows than columns: oneDNN
    computes a square one in bfloat16 by a single thread, up to 2,048 rows (docs/lab.md).

    Args:
        device: a GPU or CPU, with the threads that torch is set to.
        dtype: of both factors and the product.
        shapes: (R, N) of the products; unset for those that show the peak.
        calls: of each shape, at least.
        seconds: of each shape, at least, if every call took as long as the fastest.
    """
    if not shapes:
        shapes = ((4096, 4096), (8192, 8192))
        if device.type == "cpu":
            shapes = ((512, 512), (1024, 1024), (512 * max(8, torch.get_num_threads()), 512))
    best = 0.0
    for rows, size in shapes:
        # No random numbers are drawn: measuring must not change a run's random numbers.
        a = torch.linspace(-1, 1, rows * size, device=device).view(rows, size).to(dtype)
        b = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
        made, fastest = 0, math.inf
        while made < calls or made * fastest < seconds:  # disturbed calls buy others
            _wait(device)
            began = time.perf_counter()
            a @ b
            _wait(device)
            made, fastest = made + 1, min(fastest, time.perf_counter() - began)
        best = max(best, 2 * rows * size**2 / fastest)
    return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
