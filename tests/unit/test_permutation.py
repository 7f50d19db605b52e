from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.data.permutation import Permutation, derive_key

KEYS = st.integers(min_value=0, max_value=2**64 - 1)


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_it_is_a_bijection_of_every_size(key: int) -> None:
    for size in range(1, 301):
        elements = Permutation(size, key)(np.arange(size))
        assert sorted(elements.tolist()) == list(range(size))


@given(size=st.integers(min_value=1, max_value=2**40), key=KEYS, data=st.data())
def test_any_position_is_found_alone(size: int, key: int, data: st.DataObject) -> None:
    positions = data.draw(
        st.lists(st.integers(min_value=0, max_value=size - 1), unique=True, max_size=20)
    )
    order = Permutation(size, key)
    together = order(np.array(positions, dtype=np.int64))
    assert together.dtype == np.int64
    assert len(set(together.tolist())) == len(positions)
    assert all(0 <= element < size for element in together.tolist())
    assert together.tolist() == [int(order(np.array([position]))[0]) for position in positions]


def test_every_order_of_four_elements_occurs_about_as_often() -> None:
    keys = 4800
    counts: dict[tuple[int, ...], int] = dict.fromkeys(itertools.permutations(range(4)), 0)
    for key in range(keys):
        counts[tuple(Permutation(4, derive_key(key))(np.arange(4)).tolist())] += 1
    expected = keys / 24
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 49.7  # exceeded once in a thousand at 23 degrees of freedom


def test_elements_do_not_follow_their_positions() -> None:
    size = 10_000
    for key in range(5):
        elements = Permutation(size, derive_key(key))(np.arange(size))
        assert abs(np.corrcoef(np.arange(size), elements)[0, 1]) < 0.05
        neighbours = np.abs(np.diff(elements)) == 1
        assert neighbours.mean() < 0.002  # 2 in 10,000 by chance
        assert (elements == np.arange(size)).sum() < 10  # 1 by chance


def test_keys_give_unrelated_orders() -> None:
    size = 10_000
    orders = [Permutation(size, derive_key(1, epoch))(np.arange(size)) for epoch in range(5)]
    for first, second in itertools.combinations(orders, 2):
        assert (first == second).sum() < 10
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


@pytest.mark.parametrize("position", [10, -1, 2**40])
def test_a_position_outside_is_refused(position: int) -> None:
    with pytest.raises(ValueError, match="below 10"):
        Permutation(10, 0)(np.array([position], dtype=np.int64))


def test_no_element_cannot_be_permuted() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Permutation(0, 0)


def test_keys_and_orders_never_change() -> None:
    """A resumed run relies on them; the first number is splitmix64's own first output from 0."""
    assert derive_key(0) == 0xE220A8397B1DCDAF
    assert derive_key(42, 3, 1) == 0x5D396F908F79BB0B
    assert Permutation(10, 42)(np.arange(10)).tolist() == [9, 7, 3, 6, 0, 1, 8, 4, 2, 5]


@given(parts=st.lists(KEYS, min_size=1, max_size=4), data=st.data())
def test_every_part_of_a_key_and_its_place_matter(parts: list[int], data: st.DataObject) -> None:
    key = derive_key(*parts)
    assert 0 <= key < 2**64
    place = data.draw(st.integers(min_value=0, max_value=len(parts) - 1))
    changed = [*parts[:place], parts[place] ^ 1, *parts[place + 1 :]]
    assert derive_key(*changed) != key
    assert derive_key(*parts, 0) != key
    if parts[0] != parts[-1]:
        assert derive_key(*[parts[-1], *parts[1:-1], parts[0]]) != key


def _splitmix64(state: int) -> int:
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(size=st.integers(min_value=1, max_value=5000), key=KEYS, data=st.data())
def test_the_vectorised_network_equals_one_in_plain_integers(
    size: int, key: int, data: st.DataObject
) -> None:
    position = data.draw(st.integers(min_value=0, max_value=size - 1))
    bits = 1
    while 4**bits < size:
        bits += 1
    value = position
    while True:
        left, right = divmod(value, 2**bits)
        for number in range(6):
            round_key = _splitmix64(_splitmix64(key) ^ number)
            left, right = right, left ^ (_splitmix64(right ^ round_key) % 2**bits)
        value = left * 2**bits + right
        if value < size:
            break
    assert int(Permutation(size, key)(np.array([position]))[0]) == value
