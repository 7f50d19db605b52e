"""How many CPU threads an operation may use."""

from __future__ import annotations

import torch


def use_threads(threads: int | None) -> None:
    """Set the number of threads for CPU operations.

    Call it before anything is computed or compiled: sums over another number of parts round
    differently, and compiled code contains the number.

    Args:
        threads: of this process; None keeps torch's choice, the physical cores or
            OMP_NUM_THREADS.
    """
    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
