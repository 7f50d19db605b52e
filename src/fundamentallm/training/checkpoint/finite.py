"""Checks that a state is finite, and equal on every rank."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fundamentallm.errors import CheckpointError

# What a run learns. Scores and metrics elsewhere in a state may be infinite.
LEARNED = ("model", "optimizer", "handlers")

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DamagedStateError(CheckpointError):
    """Weights, moments or averages hold NaN or infinity, or the ranks hold different weights."""


def nonfinite_tensors(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each floating-point tensor in a tree that holds NaN or infinity, with its path."""
    if isinstance(tree, torch.Tensor):
        if tree.is_floating_point() and not all_finite(tree):
            yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from nonfinite_tensors(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for index, value in enumerate(tree):
            yield from nonfinite_tensors(value, f"{path}.{index}" if path else str(index))


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch cannot sum 8-bit floats
    # The sum is not finite if an element is not, and takes a fifth of the time of a look at each. A
    # sum of finite elements may overflow; then each is looked at.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _has_nan(tensor: torch.Tensor) -> bool:
    return bool(torch.isnan(tensor).any())


def bit_sum(tensors: Iterable[torch.Tensor]) -> int:
    """Return the sum of the tensors' bits read as integers, modulo 2^64: equal for equal tensors.

    It costs about as much as the sum of the numbers, and distinguishes NaNs of different bits.
    """
    total = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        total += int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64))
    return total % 2**64


def check_finite(
    state: Mapping[str, Any], where: str = "", constant_buffers: Collection[str] = ()
) -> None:
    """Refuse a state whose weights, moments or averages are not finite.

    Args:
        state: as `snapshot.capture` returns it.
        where: the checkpoint, for the message.
        constant_buffers: names under `model` that may be infinite, such as a mask of -inf, but not
            NaN, which a damaged running mean would be.

    Raises:
        DamagedStateError: with the names of the first tensors that are not finite.
    """
    learned = {part: state[part] for part in LEARNED if part in state}
    if not isinstance(constant_buffers, Collection):
        raise CheckpointError("the names of the model's buffers are not a list", where=where)
    allowed = {f"model.{name}" for name in constant_buffers}
    found = [
        name
        for name, tensor in nonfinite_tensors(learned)
        if name not in allowed or _has_nan(tensor)
    ]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise DamagedStateError(
            "the state is not finite: it holds NaN or infinity",
            where=where,
            got=", ".join(found[:3]) + more,
            fix="use an earlier checkpoint",
        )
