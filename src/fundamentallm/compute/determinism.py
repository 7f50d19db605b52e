"""Kernels that add in a fixed order: on a GPU a run can then be repeated bit for bit."""

from __future__ import annotations

import os

import torch

# cuBLAS reads the first at its first product, torch's compiler the second when it is imported.
_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1"}


def use_deterministic_kernels() -> None:
    """Have torch choose such kernels for the rest of this process.

    Call it before anything is computed or compiled. What has no such kernel raises a RuntimeError
    when it is computed. Torch's kernels for a CPU add in a fixed order anyway.
    """
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
