"""Optimizers against torch.optim, and which parameter decays."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fundamentallm.compute import processor
from fundamentallm.compute.plan import Machine
from fundamentallm.config.component import Component
from fundamentallm.errors import ConfigError
from fundamentallm.training import optimizers
from fundamentallm.training.optimizers import (
    OPTIMIZERS,
    OptimizerBuilder,
    parameter_groups,
    with_plain_dtype,
)

# What each name promises, in torch's words.
REFERENCES = {
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"betas": (0.9, 0.999), "eps": 1e-8}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.99, "eps": 1e-8}),
}
OPTIONS = {
    "adamw": {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
    "adam": {"betas": (0.8, 0.95), "eps": 1e-6},
    "sgd": {"momentum": 0.5, "nesterov": True, "weight_decay": 0.3},
    "rmsprop": {"alpha": 0.9, "eps": 1e-6, "momentum": 0.4, "weight_decay": 0.3},
}


class Toy(nn.Module):
    """Every kind of parameter: embedding, linear with bias, norms, a tied head, a raw one."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(7, 4)
        self.position = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4, 4))
        self.final_norm = nn.RMSNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.token.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[-1]))
        return self.head(self.final_norm(self.linear(self.norm(x)) @ self.scale))


def names_by_group(model: nn.Module) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {g["name"]: [names[id(p)] for p in g["params"]] for g in parameter_groups(model)}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(7, (3, 5), generator=generator)
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


def toy(dtype: torch.dtype = torch.float64) -> Toy:
    torch.manual_seed(0)
    return Toy().to(dtype)


def test_only_linear_weights_decay():
    groups = names_by_group(toy())
    # token.weight is the tied head's weight.
    assert groups["decay"] == ["token.weight", "linear.weight"]
    assert groups["no_decay"] == [
        "scale",
        "position.weight",
        "norm.weight",
        "norm.bias",
        "linear.bias",
        "final_norm.weight",
    ]


def test_an_untied_embedding_does_not_decay():
    model = toy()
    model.head.weight = nn.Parameter(torch.zeros(7, 4))
    assert names_by_group(model)["decay"] == ["linear.weight", "head.weight"]


LAYERS = [
    lambda: nn.Linear(2, 2),
    lambda: nn.Linear(2, 2, bias=False),
    lambda: nn.Embedding(3, 2),
    lambda: nn.LayerNorm(2),
    lambda: nn.MultiheadAttention(2, 1),
    lambda: nn.Linear(2, 2).requires_grad_(False),
    lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
]


@settings(max_examples=examples(40))
@given(st.lists(st.sampled_from(LAYERS), max_size=5), st.integers(0, 4))
def test_each_trainable_parameter_is_in_one_group_once(layers, copies):
    shared = nn.Linear(2, 2)
    model = nn.ModuleList([shared, *(layer() for layer in layers), *([shared] * copies)])
    grouped = [p for group in parameter_groups(model) for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, grouped)) == sorted(map(id, trainable))


def test_a_module_may_name_its_linear_weights():
    class Experts(nn.Module):
        linear_weights = ("up",)

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(2, 3, 3))
            self.gate = nn.Parameter(torch.zeros(2, 3))

    assert names_by_group(Experts()) == {"decay": ["up"], "no_decay": ["gate"]}
    Experts.linear_weights = ("up", "down")
    with pytest.raises(ValueError, match=r"Experts names down.*up, gate"):
        parameter_groups(Experts())


def test_a_parametrized_linear_has_no_weight_of_its_own():
    groups = names_by_group(weight_norm(nn.Linear(2, 2)))
    assert groups["decay"] == []
    assert len(groups["no_decay"]) == 3


def test_weight_decay_is_written_only_where_given():
    decay, no_decay = parameter_groups(toy())
    assert "weight_decay" not in decay
    assert no_decay["weight_decay"] == 0
    assert parameter_groups(toy(), 0.3)[0]["weight_decay"] == 0.3


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="Linear has no parameter that requires a gradient"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("with_options", [False, True], ids=["defaults", "options"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_ten_steps_equal_torch(name, with_options, dtype, rtol):
    options = OPTIONS[name] if with_options else {}
    model, twin = toy(dtype), toy(dtype)
    train(model, OptimizerBuilder.build(name, model, 0.02, **options), steps=10)

    reference, defaults = REFERENCES[name]
    settings_of_twin = {**defaults, **options}
    decay = settings_of_twin.pop("weight_decay", 0.0)
    linear = [twin.token.weight, twin.linear.weight]
    others = [
        *(twin.position.weight, twin.norm.weight, twin.norm.bias, twin.linear.bias),
        *(twin.scale, twin.final_norm.weight),
    ]
    groups = [{"params": linear, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    # The plain loop in Python is the reference for the fused and foreach kernels.
    train(twin, reference(groups, lr=0.02, foreach=False, **settings_of_twin), steps=10)

    for (key, actual), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol, msg=key)
    assert not model.linear.weight.equal(toy(dtype).linear.weight)
    assert model.frozen.weight.equal(toy(dtype).frozen.weight)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_two_runs_are_bitwise_equal(name):
    models = [toy(torch.float32), toy(torch.float32)]
    for model in models:
        train(model, OptimizerBuilder.build(name, model, 0.02), steps=10)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert one.equal(other)


def test_decay_alone_shrinks_linear_weights():
    model = toy()
    before = copy.deepcopy(model)
    optimizer = OptimizerBuilder.build("adamw", model, 0.5, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {"token.weight", "linear.weight"}
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        factor = 1 - 0.5 * 0.1 if name in decayed else 1
        torch.testing.assert_close(new, old * factor, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_fused_where_torch_has_it(name):
    assert OptimizerBuilder.build(name, toy(), 0.1).defaults["fused"] is True
    elsewhere = nn.Linear(2, 2, device="meta")
    assert OptimizerBuilder.build(name, elsewhere, 0.1).defaults["fused"] is None
    complex_model = nn.Linear(2, 2, dtype=torch.complex64)
    assert OptimizerBuilder.build(name, complex_model, 0.1).defaults["fused"] is None


def test_rmsprop_is_foreach():
    assert OptimizerBuilder.build("rmsprop", toy(), 0.1).defaults["foreach"] is True
    elsewhere = nn.Linear(2, 2, device="meta")
    assert OptimizerBuilder.build("rmsprop", elsewhere, 0.1).defaults["foreach"] is None


@pytest.mark.parametrize("name", REFERENCES)
def test_factories_take_plain_parameters_too(name):
    model = nn.Linear(2, 2)
    optimizer = OPTIMIZERS.build(name, {}, params=model.parameters(), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_defaults_reach_only_optimizers_that_have_the_option():
    defaults = {"weight_decay": 0.2, "eps": 1e-5}

    def group(name: str, **options: float) -> dict[str, float]:
        optimizer = OptimizerBuilder.build(name, toy(), 0.1, defaults=defaults, **options)
        assert optimizer.param_groups[1]["weight_decay"] == 0
        return optimizer.param_groups[0]

    assert (group("adamw")["weight_decay"], group("adamw")["eps"]) == (0.2, 1e-5)
    assert (group("adam")["weight_decay"], group("adam")["eps"]) == (0, 1e-5)
    assert group("sgd")["weight_decay"] == 0.2
    assert group("rmsprop")["eps"] == 1e-5
    assert group("adamw", weight_decay=0.5)["weight_decay"] == 0.5


def test_unknown_names_and_options_teach():
    with pytest.raises(ConfigError, match=r"(?s)unknown optimizer 'adamww'.*did you mean 'adamw'"):
        OptimizerBuilder.build("adamww", toy(), 0.1)
    with pytest.raises(ConfigError, match="'adam' has no option 'weight_decay'"):
        OptimizerBuilder.build("adam", toy(), 0.1, weight_decay=0.1)
    with pytest.raises(ConfigError, match="betas"):
        OptimizerBuilder.build("adamw", toy(), 0.1, betas=0.9)
    assert set(OPTIMIZERS.names()) == {*REFERENCES, "lion", "muon"}


@pytest.mark.parametrize("lr", [0.0, -1e-3, math.nan, math.inf])
def test_a_learning_rate_that_cannot_be_is_refused(lr):
    with pytest.raises(ValueError, match="learning rate must be finite and above 0"):
        OptimizerBuilder.build("sgd", toy(), lr)


def nothing_that_decays() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4))


@pytest.mark.parametrize("make", [nothing_that_decays, lambda: toy(torch.float32)])
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_state_continues_bitwise_also_with_an_empty_group(name, make):
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make()
        return model, OptimizerBuilder.build(name, model, 0.02)

    model, optimizer = fresh()
    train(model, optimizer, 3)
    resumed, other = fresh()
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["name"] for group in other.param_groups] == [
        group["name"] for group in optimizer.param_groups
    ]
    train(model, optimizer, 3, seed=2)
    train(resumed, other, 3, seed=2)
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert one.equal(two)


@pytest.mark.parametrize(
    ("written", "device", "bfloat16", "dtype"),
    [
        ("auto", "cpu", 5e11, "bfloat16"),
        ("auto", "cpu", 1e9, "float32"),
        ("auto", "cuda", 1e9, "bfloat16"),
        ("auto", "cuda", 0, "float32"),  # a GPU without bfloat16 units
        ("auto", "mps", 5e11, "float32"),
        ("bfloat16", "cpu", 1e9, "bfloat16"),
        (None, "cpu", 5e11, None),
    ],
)
def test_a_written_auto_is_the_type_of_the_faster_products(
    monkeypatch, written, device, bfloat16, dtype
):
    monkeypatch.setattr(processor, "cpu_rates", lambda: (1e11, bfloat16))
    monkeypatch.setattr(optimizers, "has_bf16", lambda device: bfloat16 > 0)
    options = {"adamw_lr": 1e-3} | ({} if written is None else {"dtype": written})
    found = with_plain_dtype(Component(name="muon", options=options), Machine(torch.device(device)))
    assert (found.options.get("dtype"), found.options["adamw_lr"]) == (dtype, 1e-3)
