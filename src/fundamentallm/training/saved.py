"""Read the values of a saved state: each is checked when it is loaded, before its first use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fundamentallm.errors import CheckpointError

LARGEST = 2**63 - 1


def saved_count(state: Mapping[str, Any], name: str) -> int:
    """Return a whole number of at least 0.

    Raises:
        CheckpointError: the value is another one.
    """
    value = state[name]
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise _other(name, value, "an integer of at least 0")
    return value


def saved_number(state: Mapping[str, Any], name: str) -> float:
    """Return a number, which may be infinite or NaN.

    Raises:
        CheckpointError: the value is another one.
    """
    value = state[name]
    if type(value) not in (int, float) or (type(value) is int and abs(value) > LARGEST):
        raise _other(name, value, "a number")
    number: float = value  # an integer stays one: what is saved next has to be equal
    return number


def saved_counts(state: Mapping[str, Any], name: str) -> list[int]:
    """Return a list of whole numbers of at least 0; raises as `saved_count`."""
    return [saved_count({name: value}, name) for value in _items(state, name)]


def saved_numbers(state: Mapping[str, Any], name: str) -> list[float]:
    """Return a list of numbers; raises as `saved_number`."""
    return [saved_number({name: value}, name) for value in _items(state, name)]


def saved_pairs(state: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    """Return a list of pairs of numbers; raises as `saved_number`."""
    pairs = [saved_numbers({name: value}, name) for value in _items(state, name)]
    if any(len(pair) != 2 for pair in pairs):
        raise _other(name, pairs, "pairs of numbers")
    return [(first, second) for first, second in pairs]


def _items(state: Mapping[str, Any], name: str) -> Sequence[Any]:
    values = state[name]
    if not isinstance(values, list | tuple):
        raise _other(name, values, "a list")
    return values


def _other(name: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's value '{name}' is of another kind",
        got=repr(value)[:80],
        expected=expected,
    )
