"""Positions against complex numbers, the textbook formula and the law of relative distance."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fundamentallm.errors import ConfigError
from fundamentallm.models.layers.positions import POSITIONS, Positions

T, D, K = 12, 16, 8


def build(name: str, options: dict[str, object] | None = None, **sizes: int) -> Positions:
    supplied = {"width": D, "head_width": K, "sequence_length": T, **sizes}
    return POSITIONS.build(name, options, **supplied)


@pytest.fixture
def _float64() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["learned", "sinusoidal"])
def test_additive_positions_leave_queries_and_keys_alone(name: str) -> None:
    query, key = random(2, 4, T, K), random(2, 2, T, K)
    rotated = build(name).rotate(query, key)
    assert rotated[0] is query
    assert rotated[1] is key


def test_rotary_leaves_the_embeddings_alone_and_has_no_weights() -> None:
    rotary, x = build("rotary"), random(2, T, D)
    assert rotary.embed(x) is x
    assert list(rotary.parameters()) == []


@pytest.mark.parametrize("name", ["sinusoidal", "rotary"])
def test_tables_that_follow_from_the_config_are_in_no_checkpoint(name: str) -> None:
    assert build(name).state_dict() == {}


def test_learned_adds_row_t_at_position_t() -> None:
    positions, x = build("learned"), random(2, 5, D)
    table = positions.table.weight  # type: ignore[union-attr]
    assert table.shape == (T, D)
    expected = torch.stack([x[:, t] + table[t] for t in range(5)], dim=1)
    assert torch.equal(positions.embed(x), expected)


@pytest.mark.parametrize("width", [D, 7, 1])
@pytest.mark.usefixtures("_float64")
def test_sinusoidal_is_the_textbook_formula(width: int) -> None:
    positions = build("sinusoidal", {"scale": 1.0}, width=width)
    table = positions.embed(torch.zeros(1, T, width))[0]
    for t in range(T):
        for column in range(width):
            angle = t / 10_000 ** ((column - column % 2) / width)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert table[t, column].item() == pytest.approx(expected, abs=1e-12)


def test_sinusoids_start_at_the_scale_of_the_embeddings() -> None:
    waves = build("sinusoidal", sequence_length=500).embed(torch.zeros(1, 500, D))
    assert waves.abs().max().item() == pytest.approx(0.02, rel=1e-3)


@pytest.mark.usefixtures("_float64")
def test_rotary_multiplies_complex_pairs_by_unit_complex_numbers() -> None:
    base = 500.0
    query, key = random(1, 2, T, K, seed=1), random(1, 1, T, K, seed=2)
    rotated = build("rotary", {"base": base}).rotate(query, key)
    for before, after in zip((query, key), rotated, strict=True):
        assert after.shape == before.shape
        for head in range(before.size(1)):
            for t in range(T):
                for i in range(K // 2):
                    pair = complex(before[0, head, t, i], before[0, head, t, i + K // 2])
                    turned = pair * cmath.exp(1j * t * base ** (-2 * i / K))
                    assert after[0, head, t, i].item() == pytest.approx(turned.real, abs=1e-12)
                    assert after[0, head, t, i + K // 2].item() == pytest.approx(
                        turned.imag, abs=1e-12
                    )


@given(
    first=st.integers(0, 199),
    second=st.integers(0, 199),
    shift=st.integers(0, 300),
    seed=st.integers(0, 1000),
)
def test_rotary_products_depend_on_the_distance_alone(
    first: int, second: int, shift: int, seed: int
) -> None:
    length = 500
    # The same query and the same key stand at every position.
    query = random(K, seed=seed).expand(1, 1, length, K)
    key = random(K, seed=seed + 1).expand(1, 1, length, K)
    queries, keys = build("rotary", sequence_length=length).rotate(query, key)
    here = queries[0, 0, first] @ keys[0, 0, second]
    there = queries[0, 0, first + shift] @ keys[0, 0, second + shift]
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(queries.norm(dim=-1), query.norm(dim=-1))


def test_rotary_products_do_depend_on_the_distance() -> None:
    one = torch.ones(1, 1, T, K)
    queries, keys = build("rotary").rotate(one, one)
    products = queries[0, 0] @ keys[0, 0, 0]
    assert products[0] > products[1] > products[2]


def test_rotary_angles_are_right_at_far_positions() -> None:
    length = 100_000
    x = torch.zeros(1, 1, length, 64)
    x[..., 0] = 1.0
    turned, _ = build("rotary", head_width=64, sequence_length=length).rotate(x, x)
    for t in (9_999, 99_999):
        assert turned[0, 0, t, 0].item() == pytest.approx(math.cos(t), abs=1e-6)
    # Pair 3 turns by a fraction that float32 arithmetic would round before the product with t.
    x = torch.roll(x, 3, dims=-1)
    turned, _ = build("rotary", head_width=64, sequence_length=length).rotate(x, x)
    angle = 99_999 * 10_000 ** (-6 / 64)
    assert turned[0, 0, 99_999, 3].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_rotary_keeps_the_type_of_what_it_turns() -> None:
    x = random(1, 1, T, K).bfloat16()
    query, key = build("rotary").rotate(x, x)
    assert query.dtype == key.dtype == torch.bfloat16


@pytest.mark.parametrize("name", POSITIONS.names())
def test_position_0_to_t_are_the_same_in_a_shorter_text(name: str) -> None:
    positions, x, q = build(name), random(2, T, D), random(2, 3, T, K)
    assert torch.equal(positions.embed(x)[:, :5], positions.embed(x[:, :5]))
    long, short = positions.rotate(q, q), positions.rotate(q[:, :, :5], q[:, :, :5])
    assert torch.equal(long[0][:, :, :5], short[0])
    assert torch.equal(long[1][:, :, :5], short[1])


def test_the_interface_alone_marks_nothing() -> None:
    x, q = random(2, T, D), random(2, 3, T, K)
    assert Positions().embed(x) is x
    assert Positions().rotate(q, q) == (q, q)


@pytest.mark.parametrize(
    ("name", "options", "sizes", "key", "message"),
    [
        ("rotary", {}, {"head_width": 5}, "", "even head width"),
        ("rotary", {"base": 1.0}, {}, "base", "a number above 1"),
        ("rotary", {"base": -2}, {}, "base", "a number above 1"),
        ("sinusoidal", {"scale": 0.0}, {}, "scale", "a number above 0"),
    ],
)
def test_impossible_options_are_refused(
    name: str, options: dict[str, object], sizes: dict[str, int], key: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(name, options, **sizes)
    assert caught.value.key == key
