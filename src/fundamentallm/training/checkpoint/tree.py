"""Nested state <-> strict JSON and a flat table of tensors, without pickle.

A tree is made of dict (keys: str or int), list, tuple, None, bool, int, float, str and
torch.Tensor. JSON has fewer types, so these are written as a dict with one marker key:

    {"$tensor": "optimizer.state.0.exp_avg"}   the tensor of that name in the table
    {"$tuple": [0.9, 0.999]}                   a tuple
    {"$dict": [[0, ...], [1, ...]]}            a dict with keys that are not all plain text
    {"$float": "nan"}                          nan, inf or -inf

Two places with the same memory (tied weights) name one tensor, and share it again when read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fundamentallm.errors import CheckpointError

MAX_DEPTH = 64
RESERVED_NAMES = frozenset({"__metadata__"})  # means something else inside a safetensors header

Path = tuple[str, ...]


class Stateful(Protocol):
    """An object with a state to save: a scheduler, a scaler, a handler."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Restore a state that `state_dict` returned."""


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into strict JSON and tensors.

    Args:
        tree: the state. Subclasses of the allowed types are kept as the plain type.

    Returns:
        A skeleton for `json.dumps(..., allow_nan=False)`, and the tensors by name: the dotted
        path of their first place in the tree. They are detached but not copied.

    Raises:
        CheckpointError: a value or key of another type, with its dotted path.
    """
    tensors: dict[str, Tensor] = {}
    names_by_memory: dict[tuple[Any, ...], str] = {}

    def name_of(tensor: Tensor, path: Path) -> str:
        check_storable(tensor, path)
        # Empty tensors have no memory to share.
        memory = (
            (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel()
            else None
        )
        if memory in names_by_memory:
            return names_by_memory[memory]
        # Lone surrogates are legal in a Python key and illegal in the file's header.
        base = ".".join(path).encode("utf-8", "backslashreplace").decode()
        name, copy = base, 1
        while name in tensors or name in RESERVED_NAMES:  # {0: a, "0": b} have one dotted path
            copy += 1
            name = f"{base}~{copy}"
        tensors[name] = tensor.detach()
        if memory is not None:
            names_by_memory[memory] = name
        return name

    def encode(value: Any, path: Path) -> Any:
        if len(path) > MAX_DEPTH:
            raise CheckpointError(
                f"the state is nested deeper than {MAX_DEPTH} levels; does it contain itself?",
                where=dotted(path),
            )
        if isinstance(value, Tensor):
            return {"$tensor": name_of(value, path)}
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, list):
            return [encode(item, (*path, str(index))) for index, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"$tuple": encode(list(value), path)}
        if isinstance(value, dict):
            for key in value:
                if isinstance(key, bool) or not isinstance(key, str | int):
                    raise not_storable(key, (*path, repr(key)), "key", "a str or an int")
            items = [(key, encode(item, (*path, str(key)))) for key, item in value.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return dict(items)
            return {"$dict": [list(item) for item in items]}
        raise not_storable(
            value, path, "value", "dict, list, tuple, None, bool, int, float, str or Tensor"
        )

    return encode(tree, ()), tensors


def equal(tree: Any, other: Any) -> bool:
    """Return whether two trees hold the same values, bit for bit in their tensors.

    Raises:
        CheckpointError: as `flatten`.
    """
    (skeleton, tensors), (other_skeleton, others) = flatten(tree), flatten(other)
    return bool(skeleton == other_skeleton) and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor.cpu(), others[name].cpu())
        for name, tensor in tensors.items()
    )


def copied(tree: Any, buffers: dict[str, Tensor] | None = None) -> Any:
    """Return a copy of a tree on the CPU that shares no memory with it; tied tensors stay tied.

    Args:
        tree: the state.
        buffers: the memory of an earlier copy, which is used again where names and shapes fit
            (new memory doubles the time); afterwards it has the memory of this copy.

    Raises:
        CheckpointError: as `flatten`.
    """
    skeleton, tensors = flatten(tree)
    buffers = {} if buffers is None else buffers
    old = dict(buffers)
    buffers.clear()
    for name, tensor in tensors.items():
        buffer = old.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffers[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        else:
            buffers[name] = buffer.copy_(tensor)
    return unflatten(skeleton, buffers)


def unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Build a tree again: the inverse of `flatten`.

    Raises:
        CheckpointError: a skeleton that `flatten` cannot have made, that names a missing tensor,
            or that does not name every tensor.
    """
    used: set[str] = set()

    def decode(value: Any, path: Path) -> Any:
        if len(path) > MAX_DEPTH:
            raise malformed(path, f"more than {MAX_DEPTH} levels")
        if isinstance(value, list):
            return [decode(item, (*path, str(index))) for index, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        markers = [key for key in value if key.startswith("$")]
        if not markers:
            return {key: decode(item, (*path, key)) for key, item in value.items()}
        match value:
            case {"$tensor": str(name)} if len(value) == 1 and name in tensors:
                used.add(name)
                return tensors[name]
            case {"$tuple": list(items)} if len(value) == 1:
                return tuple(decode(items, path))
            case {"$float": ("nan" | "inf" | "-inf") as text} if len(value) == 1:
                return float(text)
            case {"$dict": list(pairs)} if len(value) == 1 and all(map(is_pair, pairs)):
                return {key: decode(item, (*path, str(key))) for key, item in pairs}
        raise malformed(path, repr(value)[:80])

    tree = decode(skeleton, ())
    if unnamed := sorted(set(tensors) - used):
        raise malformed((), f"tensors without a place: {', '.join(unnamed[:4])}")
    return tree


def is_pair(item: Any) -> bool:
    """Return whether `item` is one entry of a `$dict`: a list of a key and a value."""
    return isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int)


def dotted(path: Path) -> str:
    """Return the path as a user reads it, as `state.optimizer.param_groups.0.lr`."""
    return ".".join(("state", *path))


def check_storable(tensor: Tensor, path: Path) -> None:
    """Refuse tensors that are not dense arrays of their values.

    Raises:
        CheckpointError: a tensor without data or not dense, or of a subclass, such as a DTensor,
            of which only this process's shard would be saved.
    """
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    if not plain or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = f"a {type(tensor).__name__} ({tensor.layout}, {tensor.device})"
        raise CheckpointError(
            "a checkpoint cannot hold this tensor",
            where=dotted(path),
            got=kind,
            expected="a dense torch.Tensor with data",
            fix="put a plain dense copy into the state",
        )


def not_storable(value: Any, path: Path, role: str, expected: str) -> CheckpointError:
    """Return the error for a value or key of a type that a tree cannot hold."""
    return CheckpointError(
        f"a checkpoint cannot hold this {role}",
        where=dotted(path),
        got=f"{type(value).__module__}.{type(value).__qualname__}",
        expected=expected,
        fix="return plain values and tensors from state_dict()",
    )


def malformed(path: Path, got: str) -> CheckpointError:
    """Return the error for a skeleton that no `flatten` wrote."""
    return CheckpointError("the saved state is malformed", where=dotted(path), got=got)
