"""Autocast, the loss scale, and what `auto` means on which device."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fundamentallm.compute import precision as module
from fundamentallm.compute.precision import (
    Precision,
    resolve_bf16_weights,
    resolve_device,
    resolve_precision,
)
from fundamentallm.errors import CheckpointError, ConfigError, MachineError
from fundamentallm.models.layers.feedforward import FEEDFORWARDS
from fundamentallm.models.layers.normalization import NORMALIZATIONS
from fundamentallm.models.layers.positions import POSITIONS
from fundamentallm.testing import tiny_model
from fundamentallm.training.losses import compute_loss
from fundamentallm.training.optimizers import OptimizerBuilder

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
MPS = torch.device("mps")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> torch.device:
    return torch.device(request.param)


def linear(device: torch.device) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8).to(device)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_matrix_products_run_in_the_named_type(name, dtype, device):
    model = linear(device)
    with Precision(name, device).autocast():
        assert model(torch.ones(2, 8, device=device)).dtype == dtype
    assert model(torch.ones(2, 8, device=device)).dtype == torch.float32
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_only_fp16_scales(name):
    model = linear(CPU)
    optimizer = OptimizerBuilder.build("sgd", model, 0.1, momentum=0.0)
    precision = Precision(name, CPU)
    assert precision.scaler is None
    loss = model.weight.sum() + model.bias.sum()
    assert precision.scale(loss) is loss
    before = model.weight.detach().clone()
    loss.backward()
    precision.unscale_(optimizer)
    precision.step(optimizer)
    precision.update()
    torch.testing.assert_close(model.weight.detach(), before - 0.1)
    assert precision.state_dict() == {}
    precision.load_state_dict({})


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="fp32, bf16 or fp16, got 'auto'"):
        Precision("auto", CPU)
    with pytest.raises(ValueError, match="bf16_weights are for precision bf16, not fp32"):
        Precision("fp32", CPU, bf16_weights=True)


MODERN = {"qk_norm": True, "residual_mix": True, "embedding_norm": True, "logit_softcap": 5.0}


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(seed))
    return compute_loss(model(ids[:, :-1]), ids[:, 1:], "sum")


def with_rounded_weights(**options) -> nn.Module:
    """A model whose weights lose nothing in bfloat16."""
    torch.manual_seed(0)
    model = tiny_model(**options)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_copies_compute_in_bfloat16_and_gather_gradients_in_float32(tied, checkpointing):
    model = with_rounded_weights(tie_embeddings=tied, **MODERN)
    twin = copy.deepcopy(model)
    model.gradient_checkpointing = checkpointing
    seen = set()
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    for seed in range(2):  # as two micro-batches
        with Precision("bf16", CPU, bf16_weights=True).weights(model):
            assert model.head.weight.dtype == torch.bfloat16
            assert model.token_embedding.weight.dtype == torch.float32
            loss = loss_of(model, seed)
            loss.backward()
        expected = loss_of(twin, seed)
        expected.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    assert seen == {torch.bfloat16}
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert isinstance(parameter, nn.Parameter), name
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        # Bfloat16 has 8 bits; what counts is that the direction is the same.
        cosine = F.cosine_similarity(parameter.grad.flatten(), other.grad.flatten(), dim=0)
        assert cosine > 0.99, name
        assert parameter.grad.norm().item() == pytest.approx(other.grad.norm().item(), rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_copies_are_no_less_exact_than_autocast_however_often_a_token_comes(tied, positions):
    # Of 4,608 tokens the first come some 1,000 times: sums of so many rows need more than 8 bits.
    drawn = torch.rand(512, 9, generator=torch.Generator().manual_seed(0))
    batch = (11 * drawn**2).long()
    gradients = []
    for precision, wide in (
        (Precision("fp32", CPU), True),
        (Precision("bf16", CPU), False),
        (Precision("bf16", CPU, bf16_weights=True), False),
    ):
        model = with_rounded_weights(tie_embeddings=tied, positions=positions, **MODERN)
        model = model.double() if wide else model
        with precision.weights(model), precision.autocast():
            loss = compute_loss(model(batch[:, :-1]), batch[:, 1:], "sum")
            (loss / batch.numel()).backward()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters()})
    exact, autocast, copies = gradients
    for name, expected in exact.items():
        error, known = (
            ((actual[name] - expected).norm() / expected.norm()).item()
            for actual in (copies, autocast)
        )
        # Both are chance; lost rows cost 14 times as much. The two scalars of a residual mix are
        # sums over all activations, in which most cancels.
        assert error < (0.1 if expected.numel() == 2 else max(2 * known, 0.015)), name


def test_a_window_adds_up_gradients_that_bfloat16_would_lose():
    model = nn.Linear(1, 1, bias=False)
    precision = Precision("bf16", CPU, bf16_weights=True)
    for value in [256.0, *[1.0] * 8]:
        with precision.weights(model):
            model(torch.tensor([[value]], dtype=torch.bfloat16)).float().backward()
    assert model.weight.grad.item() == 264  # in bfloat16, 256 + 1 is 256


def test_copies_are_taken_back_whatever_happens():
    model = with_rounded_weights()
    parameters = dict(model.named_parameters())
    with (
        pytest.raises(ArithmeticError),
        Precision("bf16", CPU, bf16_weights=True).weights(model),
    ):
        raise ArithmeticError
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }


def test_a_buffer_and_a_parameter_that_is_no_number_stay():
    model = nn.Module()
    model.counts = nn.Parameter(torch.arange(3), requires_grad=False)
    model.weight = nn.Parameter(torch.ones(3))
    model.register_parameter("none", None)
    model.register_buffer("table", torch.ones(3))
    with Precision("bf16", CPU, bf16_weights=True).weights(model):
        types = (model.counts.dtype, model.weight.dtype, model.table.dtype)
        assert types == (torch.int64, torch.bfloat16, torch.float32)
        assert model.none is None


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_without_copies_the_model_is_left_alone(name):
    model = linear(CPU)
    with Precision(name, CPU).weights(model):
        assert model.weight.dtype == torch.float32


def test_copies_take_the_place_of_autocast():
    with Precision("bf16", CPU, bf16_weights=True).autocast():
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("choice", "precision", "device", "follows", "expected"),
    [
        ("auto", "bf16", CPU, lambda: True, True),
        ("auto", "bf16", CPU, lambda: False, False),
        ("auto", "bf16", CPU, None, False),
        ("auto", "bf16", CUDA, lambda: True, False),
        ("auto", "fp32", CPU, lambda: True, False),
        (True, "bf16", CUDA, None, True),
        (True, "fp32", CPU, lambda: True, False),
        (False, "bf16", CPU, lambda: True, False),
    ],
)
def test_copies_are_chosen_on_cpus_by_models_that_can(choice, precision, device, follows, expected):
    assert resolve_bf16_weights(choice, precision, device, follows) is expected


def test_a_part_that_widens_activations_is_noticed():
    class Widening(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(width))
            self.register_buffer("table", torch.ones(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gain * self.table

    NORMALIZATIONS.register("widening")(Widening)
    try:
        assert not tiny_model(normalization="widening").follows_weight_type()
    finally:
        del NORMALIZATIONS._factories["widening"]


@pytest.mark.parametrize("positions", POSITIONS.names())
@pytest.mark.parametrize("normalization", NORMALIZATIONS.names())
@pytest.mark.parametrize("feedforward", FEEDFORWARDS.names())
def test_every_part_of_ours_follows_the_type_of_the_weights(positions, normalization, feedforward):
    parts = {"positions": positions, "normalization": normalization, "feedforward": feedforward}
    model = tiny_model(**parts, **MODERN)
    before = torch.get_rng_state()
    assert model.follows_weight_type()
    assert torch.equal(torch.get_rng_state(), before)
    with Precision("bf16", CPU, bf16_weights=True).weights(model):
        assert model(torch.zeros(2, 8, dtype=torch.int64)).dtype == torch.bfloat16


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd", "rmsprop"])
def test_a_scaled_step_equals_an_unscaled_one(optimizer_name, device):
    weights = []
    for name in ("fp32", "fp16"):
        model = linear(device)
        optimizer = OptimizerBuilder.build(optimizer_name, model, 0.1)
        precision = Precision(name, device)
        # Without autocast the two differ by the scale alone, a power of two: no rounding.
        precision.scale(model(torch.ones(2, 8, device=device)).square().sum()).backward()
        precision.unscale_(optimizer)
        precision.step(optimizer)
        precision.update()
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)
    assert not weights[0].equal(linear(device).weight)


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd", "rmsprop"])
@pytest.mark.parametrize("stepped", [False, True])
def test_an_overflow_halves_the_scale_and_leaves_the_weights(optimizer_name, stepped, device):
    model = linear(device)
    optimizer = OptimizerBuilder.build(optimizer_name, model, 0.1)
    precision = Precision("fp16", device)
    precision.scale(model.weight.sum()).backward()
    scale = precision.state_dict()["scale"]
    model.weight.grad[0, 0] = torch.inf
    precision.unscale_(optimizer)
    if stepped:
        precision.step(optimizer)
    precision.update()
    assert model.weight.equal(linear(device).weight)
    assert precision.state_dict()["scale"] == scale / 2


def test_a_refused_step_must_be_closed_by_update():
    model = linear(CPU)
    optimizer = OptimizerBuilder.build("sgd", model, 0.1)
    precision = Precision("fp16", CPU)
    precision.scale(model.weight.sum()).backward()
    precision.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        precision.unscale_(optimizer)
    precision.update()
    precision.scale(model.weight.sum()).backward()
    precision.unscale_(optimizer)


def test_the_scale_survives_a_round_trip_through_json():
    model = linear(CPU)
    optimizer = OptimizerBuilder.build("sgd", model, 0.1)
    precision = Precision("fp16", CPU)
    for spoil in (True, False):
        optimizer.zero_grad()
        precision.scale(model.weight.sum()).backward()
        if spoil:
            model.weight.grad.fill_(torch.nan)
        precision.unscale_(optimizer)
        precision.update()
    state = precision.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (2.0**15, 1)
    restored = Precision("fp16", CPU)
    restored.load_state_dict(json.loads(json.dumps(state)))
    assert restored.state_dict() == state
    loss = torch.tensor(3.0)
    assert restored.scale(loss).item() == precision.scale(loss).item() == 3 * 2**15


def test_a_state_of_another_precision_is_refused():
    with pytest.raises(CheckpointError, match=r"(?s)no loss scale.*a loss scale for fp16"):
        Precision("fp16", CPU).load_state_dict({})
    with pytest.raises(CheckpointError, match=r"(?s)a loss scale.*no loss scale for bf16"):
        Precision("bf16", CPU).load_state_dict(Precision("fp16", CPU).state_dict())


@pytest.mark.parametrize(
    ("name", "mixed", "device", "has_bf16", "expected"),
    [
        (None, False, CPU, True, "fp32"),
        ("fp32", False, CUDA, True, "fp32"),
        ("bf16", False, CPU, True, "bf16"),
        ("bf16", True, CUDA, True, "bf16"),
        ("fp16", False, CUDA, True, "fp16"),
        ("fp16", True, CUDA, True, "fp16"),
        ("auto", False, CPU, True, "fp32"),
        ("auto", False, MPS, True, "fp32"),
        ("auto", False, CUDA, True, "bf16"),
        ("auto", False, CUDA, False, "fp16"),
        ("auto", True, CPU, True, "bf16"),
        (None, True, CPU, True, "bf16"),
        ("fp32", True, CPU, True, "bf16"),
        ("fp32", True, CUDA, True, "bf16"),
        ("fp32", True, CUDA, False, "fp16"),
    ],
)
def test_resolved_precision(monkeypatch, name, mixed, device, has_bf16, expected):
    monkeypatch.setattr(module, "has_bf16", lambda _: has_bf16)
    assert resolve_precision(name, mixed, device) == expected


@pytest.mark.parametrize("device", [CPU, MPS])
def test_fp16_off_cuda_is_a_config_error(device):
    with pytest.raises(ConfigError, match=f"fp16 needs a CUDA GPU, but the device is {device}"):
        resolve_precision("fp16", False, device)


def test_bf16_without_support_is_a_config_error(monkeypatch):
    monkeypatch.setattr(module, "has_bf16", lambda _: False)
    with pytest.raises(ConfigError, match="cuda:0 does not support it"):
        resolve_precision("bf16", False, CUDA)


def test_an_unknown_precision_teaches():
    with pytest.raises(ConfigError, match=r"(?s)unknown precision 'bf61'.*did you mean 'bf16'"):
        resolve_precision("bf61", False, CPU)


def machine(monkeypatch, *, gpus: int = 0, metal: bool = False, built: bool = True) -> None:
    """Pretend to be a machine with these devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus - 1)
    monkeypatch.setattr(torch.version, "cuda", "12.8" if built else None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: metal)


@pytest.mark.parametrize(
    ("gpus", "metal", "name", "expected"),
    [
        (0, False, "auto", "cpu"),
        (0, True, "auto", "mps"),
        (1, True, "auto", "cuda:0"),
        (2, False, "cuda", "cuda:1"),
        (2, False, "auto", "cuda:1"),
        (2, False, "cuda:0", "cuda:0"),
        (2, True, "cpu", "cpu"),
        (0, True, "mps", "mps"),
    ],
)
def test_resolved_device(monkeypatch, gpus, metal, name, expected):
    machine(monkeypatch, gpus=gpus, metal=metal)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "meta", "", "CPU"])
def test_an_unknown_device_is_a_config_error(monkeypatch, name):
    machine(monkeypatch, gpus=2)
    with pytest.raises(ConfigError, match=r"unknown device.*(?s:.*)cuda:N"):
        resolve_device(name)


def test_an_absurd_device_number_is_a_config_error(monkeypatch):
    machine(monkeypatch, gpus=2)
    with pytest.raises(ConfigError, match="unknown device"):
        resolve_device("cuda:" + "9" * 5000)


def test_a_typo_in_a_device_teaches():
    with pytest.raises(ConfigError, match="did you mean 'cuda'"):
        resolve_device("cud:0")


def test_absent_devices_are_machine_errors(monkeypatch):
    machine(monkeypatch)
    with pytest.raises(MachineError, match=r"(?s)finds no CUDA GPU.*CUDA_VISIBLE_DEVICES"):
        resolve_device("cuda:0")
    with pytest.raises(MachineError, match="Metal"):
        resolve_device("mps")
    machine(monkeypatch, built=False)
    with pytest.raises(MachineError, match=r"(?s)for CPUs only.*install the CUDA build"):
        resolve_device("cuda")
    machine(monkeypatch, gpus=2)
    with pytest.raises(MachineError, match=r"(?s)no GPU number 2.*cuda:0 to cuda:1"):
        resolve_device("cuda:2")
