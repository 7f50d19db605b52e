"""A shuffled order that is computed, not stored.

A Feistel network is a bijection of pairs of half-words for any round function
(Luby and Rackoff 1988), so keyed mixing gives a permutation of a power of four; positions that
land outside the wanted range are sent through again until they fall inside (cycle walking,
Black and Rogaway 2002). Any element of any order is found in constant time and memory, and the
same numbers come out on every platform and with every version of every library.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def derive_key(*parts: int) -> int:
    """Mix integers into one key of 64 bits; every part and its place matter.

    The mixing is splitmix64 (Steele, Lea and Flood 2014).
    """
    key = 0
    for part in parts:
        key = _mix(key ^ (part & _MASK))
    return key


class Permutation:
    """A keyed bijection of range(size).

    Args:
        size: number of elements, at least 1.
        key: 64 bits; another key gives another order.
    """

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [derive_key(key, number) for number in range(_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the elements at positions of the order.

        Args:
            positions: (N,) integers in range(size).

        Returns:
            (N,) int64.
        """
        values = np.array(positions, dtype=np.uint64)
        if values.size and int(values.max()) >= self.size:
            raise ValueError(f"positions must lie below {self.size}, got {int(values.max())}")
        values = self._encrypt(values)
        outside = values >= self.size
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.size
        elements: np.ndarray = values.astype(np.int64)
        return elements

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        half = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> half, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mix_array(right ^ np.uint64(key)) & mask)
        joined: np.ndarray = (left << half) | right
        return joined


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: np.ndarray) -> np.ndarray:
    """`_mix` of every element; arithmetic of uint64 arrays wraps as it must."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX_2)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
