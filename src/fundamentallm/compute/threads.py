"""How many CPU threads an operation may use."""

from __future__ import annotations

import torch


def use_threads(threads: int | None) -> None:
    """Let operations on the CPU run on that many threads from now on.

    Call it before anything is computed or compiled: sums over another number of parts round
    otherwise, and compiled code has the number written into it.

    Args:
        threads: of this process; None leaves what torch chose, the physical cores or
            OMP_NUM_THREADS.
    """
    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
