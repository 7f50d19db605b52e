"""Out of memory, on a GPU or on a CPU: one error that says what to lower."""

from __future__ import annotations

import re

import torch

from fundamentallm.errors import MachineError

# On a CPU torch raises a plain RuntimeError; so does cuBLAS, where no memory is left for its own.
_WORDS = re.compile(
    "out of memory|can't allocate memory|not enough memory|MemoryError|CUBLAS_STATUS_ALLOC_FAILED"
)

FIX = (
    "lower data.batch_size (data.global_batch, or training.accumulation_steps raised by as much,"
    " keeps the gradient), or set training.gradient_checkpointing: true, training.precision: bf16"
    " or training.loss: chunked_cross_entropy, or take a smaller model"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))


def says_out_of_memory(text: str) -> bool:
    """Whether a message, such as the last line of a process, says that memory ran out."""
    return _WORDS.search(text) is not None


def out_of_memory(error: BaseException, when: str = "") -> MachineError:
    """Return the error to raise in place of torch's.

    Args:
        error: torch's or Python's own.
        when: what follows "out of memory": where it happened, and what is kept.
    """
    said = str(error).strip().partition("\n")[0]
    return MachineError(f"out of memory{when}", got=said, fix=FIX)
