"""Lion against its algorithm, written out weight by weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fundamentallm.errors import ConfigError
from fundamentallm.training.optimizers import OptimizerBuilder


def layer(dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=dtype)


def set_gradients(model: nn.Module, seed: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return [weight.grad.flatten().tolist() for weight in model.parameters()]


def test_ten_steps_are_algorithm_2():
    lr, b1, b2, decay = 0.02, 0.8, 0.95, 0.3
    model = layer()
    optimizer = OptimizerBuilder.build("lion", model, lr, betas=[b1, b2], weight_decay=decay)
    weights = [weight.flatten().tolist() for weight in layer().parameters()]
    momenta = [[0.0] * len(values) for values in weights]
    for step in range(10):
        gradients = set_gradients(model, step)
        optimizer.step()
        for w, m, g, own_decay in zip(weights, momenta, gradients, (decay, 0.0), strict=True):
            for i in range(len(w)):
                c = b1 * m[i] + (1 - b1) * g[i]
                w[i] -= lr * (math.copysign(1.0, c) + own_decay * w[i])
                m[i] = b2 * m[i] + (1 - b2) * g[i]
    for actual, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(
            actual.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


def test_a_parameter_without_a_gradient_stays():
    model = layer()
    optimizer = OptimizerBuilder.build("lion", model, 0.1, weight_decay=0.5)
    model.bias.grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    assert model.weight.equal(layer().weight)
    torch.testing.assert_close(model.bias, layer().bias - 0.1)


def test_a_closure_is_evaluated_with_gradients():
    model = layer()
    optimizer = OptimizerBuilder.build("lion", model, 0.1)

    def closure() -> torch.Tensor:
        loss = model(torch.ones(1, 3, dtype=torch.float64)).sum()
        loss.backward()
        return loss

    expected = model(torch.ones(1, 3, dtype=torch.float64)).sum()
    assert optimizer.step(closure).equal(expected)
    torch.testing.assert_close(model.bias, layer().bias - 0.1)


@pytest.mark.parametrize("options", [{"betas": [1.0, 0.9]}, {"weight_decay": -0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        OptimizerBuilder.build("lion", layer(), 0.1, **options)
