"""Normalizations against loops over Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fundamentallm.errors import ConfigError
from fundamentallm.models.layers.normalization import NORMALIZATIONS

WIDTH = 6


def naive_layernorm(row: list[float], gain: list[float], bias: list[float], eps: float) -> Tensor:
    mean = math.fsum(row) / len(row)
    variance = math.fsum((x - mean) ** 2 for x in row) / len(row)
    columns = zip(row, gain, bias, strict=True)
    return torch.tensor([(x - mean) / math.sqrt(variance + eps) * g + b for x, g, b in columns])


def naive_rmsnorm(row: list[float], gain: list[float], eps: float) -> Tensor:
    mean_square = math.fsum(x * x for x in row) / len(row)
    columns = zip(row, gain, strict=True)
    return torch.tensor([x / math.sqrt(mean_square + eps) * g for x, g in columns])


def random_vector(seed: int) -> Tensor:
    return torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(
    row=st.lists(st.floats(-100, 100), min_size=WIDTH, max_size=WIDTH),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    bias=st.booleans(),
)
def test_layernorm_is_its_formula(row: list[float], eps: float, bias: bool) -> None:
    norm = NORMALIZATIONS.build("layernorm", {"eps": eps}, width=WIDTH, bias=bias).double()
    norm.weight.data = gain = random_vector(1)
    shift = torch.zeros(WIDTH, dtype=torch.float64)
    if bias:
        norm.bias.data = shift = random_vector(2)
    expected = naive_layernorm(row, gain.tolist(), shift.tolist(), eps).double()
    actual = norm(torch.tensor([row], dtype=torch.float64))
    torch.testing.assert_close(actual, expected.unsqueeze(0), rtol=1e-5, atol=1e-5)


@given(
    row=st.lists(st.floats(-100, 100), min_size=WIDTH, max_size=WIDTH),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
)
def test_rmsnorm_is_its_formula(row: list[float], eps: float) -> None:
    norm = NORMALIZATIONS.build("rmsnorm", {"eps": eps}, width=WIDTH, bias=True).double()
    norm.weight.data = gain = random_vector(1)
    actual = norm(torch.tensor([row], dtype=torch.float64))
    expected = naive_rmsnorm(row, gain.tolist(), eps).double()
    torch.testing.assert_close(actual, expected.unsqueeze(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NORMALIZATIONS.names())
def test_a_new_normalization_ignores_the_scale_of_its_input(name: str) -> None:
    norm = NORMALIZATIONS.build(name, width=WIDTH, bias=True).double()
    x = random_vector(0)
    torch.testing.assert_close(norm(1000 * x), norm(10 * x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        norm(x).square().mean(), torch.ones((), dtype=torch.float64), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("name", NORMALIZATIONS.names())
def test_a_row_of_zeros_stays_finite_with_its_gradient(name: str) -> None:
    norm = NORMALIZATIONS.build(name, width=WIDTH, bias=False)
    x = torch.zeros(2, WIDTH, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_only_layernorm_has_a_bias_and_only_when_asked() -> None:
    def names(name: str, bias: bool) -> set[str]:
        module = NORMALIZATIONS.build(name, width=WIDTH, bias=bias)
        return {key for key, _ in module.named_parameters()}

    assert names("layernorm", bias=True) == {"weight", "bias"}
    assert names("layernorm", bias=False) == {"weight"}
    assert names("rmsnorm", bias=True) == {"weight"}


@pytest.mark.parametrize("name", NORMALIZATIONS.names())
@pytest.mark.parametrize("eps", [0, -1e-5])
def test_an_eps_that_allows_nan_is_refused(name: str, eps: float) -> None:
    with pytest.raises(ConfigError, match="a number above 0") as caught:
        NORMALIZATIONS.build(name, {"eps": eps}, width=WIDTH, bias=False)
    assert caught.value.key == "eps"
