"""Feed-forwards against loops over Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fundamentallm.errors import ConfigError
from fundamentallm.models.layers.feedforward import FEEDFORWARDS

D, F = 4, 6


def build(name: str, options: dict[str, object] | None = None, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    supplied = {"width": D, "hidden_width": F, "bias": bias, "dropout": 0.5}
    return FEEDFORWARDS.build(name, options, **supplied).double()


def naive_linear(layer: nn.Linear, row: list[float]) -> list[float]:
    biases = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [
        math.fsum(w * x for w, x in zip(weights, row, strict=True)) + b
        for weights, b in zip(layer.weight.tolist(), biases, strict=True)
    ]


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def naive(
    module: nn.Module, name: str, options: dict[str, object], row: list[float]
) -> list[float]:
    hidden = naive_linear(module.input, row)  # type: ignore[arg-type]
    if name == "gelu":
        hidden = [(tanh_gelu if options.get("approximate") == "tanh" else gelu)(x) for x in hidden]
    elif name == "relu_squared":
        hidden = [max(x, 0.0) ** 2 for x in hidden]
    else:
        gates = naive_linear(module.gate, row)  # type: ignore[arg-type]
        hidden = [silu(gate) * x for gate, x in zip(gates, hidden, strict=True)]
    return naive_linear(module.output, hidden)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gelu", {}),
        ("gelu", {"approximate": "tanh"}),
        ("swiglu", {}),
        ("relu_squared", {}),
    ],
)
def test_a_feedforward_is_its_formula(name: str, options: dict[str, object], bias: bool) -> None:
    module = build(name, options, bias=bias)
    x = 3 * torch.randn(2, 3, D, dtype=torch.float64)
    expected = torch.tensor(
        [[naive(module, name, options, row) for row in rows] for rows in x.tolist()],
        dtype=torch.float64,
    )
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FEEDFORWARDS.names())
def test_every_parameter_gets_a_gradient_and_biases_only_exist_when_asked(name: str) -> None:
    for bias in (True, False):
        module = build(name, bias=bias)
        module(torch.randn(8, D, dtype=torch.float64)).square().sum().backward()
        names = dict(module.named_parameters())
        assert any(key.endswith("bias") for key in names) == bias
        for key, parameter in names.items():
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", FEEDFORWARDS.names())
def test_the_layer_that_writes_the_residual_is_called_output(name: str) -> None:
    output = build(name).output
    assert isinstance(output, nn.Linear)
    assert (output.in_features, output.out_features) == (F, D)


def test_an_unknown_approximation_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        build("gelu", {"approximate": "tan"})
    assert caught.value.key == "approximate"


def test_dropout_reaches_a_feedforward_that_asks_for_it() -> None:
    class Dropping(nn.Module):
        def __init__(self, width: int, dropout: float) -> None:
            super().__init__()
            self.rate = dropout

        def forward(self, x: Tensor) -> Tensor:
            return x

    FEEDFORWARDS.register("test_dropping")(Dropping)
    try:
        assert build("test_dropping").rate == 0.5
    finally:
        del FEEDFORWARDS._factories["test_dropping"]
