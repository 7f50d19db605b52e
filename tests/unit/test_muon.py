"""Muon against torch's own, the singular value decomposition, and itself matrix by matrix."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples
from torch import Tensor, nn

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision
from fundamentallm.data.batch import Window
from fundamentallm.errors import ConfigError
from fundamentallm.testing import tiny_model
from fundamentallm.training.losses import LanguageModelingLoss
from fundamentallm.training.optim import muon as muon_module
from fundamentallm.training.optim.muon import Muon, orthogonalize
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.schedulers import LinearWarmup
from fundamentallm.training.step import TrainStep

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 4),
    st.floats(-15, 15),
    st.integers(0, 99),
)
@settings(max_examples=examples(60))
def test_orthogonalize_maps_singular_values_and_keeps_the_vectors(
    rows: int, columns: int, num_steps: int, magnitude: float, seed: int
) -> None:
    matrix = random(rows, columns, seed=seed)
    u, s, v = np.linalg.svd(matrix.numpy(), full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(num_steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    actual = orthogonalize(matrix * 10**magnitude, num_steps)
    np.testing.assert_allclose(actual.numpy(), (u * s) @ v, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 48), (96, 24), (24, 96)])
def test_singular_values_end_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    spread = torch.logspace(-1.5, 0, min(shape), dtype=F64)  # from 0.03 to 1
    u, v = (torch.linalg.qr(random(n, min(shape), seed=n)).Q for n in shape)
    out = orthogonalize(((u * spread) @ v.mT).to(dtype))
    assert out.dtype == dtype
    values = torch.linalg.svdvals(out.double())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_zeros_stay_zeros_and_batches_of_batches_are_matrices() -> None:
    stacked = random(2, 3, 5, 4)
    stacked[1, 2] = 0
    out = orthogonalize(stacked)
    assert torch.all(out[1, 2] == 0)
    torch.testing.assert_close(out[1, 0], orthogonalize(stacked[1, 0]), rtol=1e-10, atol=1e-12)


class Net(nn.Module):
    """Two matrices of one shape, a tall and a wide one, an embedding, a head and vectors."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.up = nn.Linear(4, 12, bias=False)
        self.down = nn.Linear(12, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.second(self.first(x).relu())
        return self.head(self.norm(self.down(self.up(x).relu())))


def names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {g["name"]: [of[id(p)] for p in g["params"]] for g in optimizer.param_groups}


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_goes_where_its_kind_belongs(tied: bool) -> None:
    model = Net(tied)
    groups = names(model, OptimizerBuilder.build("muon", model, 0.02))
    assert groups == {
        "matrices": ["first.weight", "second.weight", "up.weight", "down.weight"],
        "head": ["embedding.weight" if tied else "head.weight"],
        "embeddings": [] if tied else ["embedding.weight"],
        "vectors": ["first.bias", "norm.weight", "norm.bias"],
    }


def backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    model(torch.randint(7, (3, 5), generator=generator)).square().mean().backward()


def reference(model: Net, lr: float, adjust: str, **options: Any) -> list[torch.optim.Optimizer]:
    """Torch's own two optimizers over the same parameters."""
    matrices = [model.first.weight, model.second.weight, model.up.weight, model.down.weight]
    vectors = [model.first.bias, model.norm.weight, model.norm.bias, model.embedding.weight]
    groups = [{"params": [model.head.weight]}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr, weight_decay=0.3, adjust_lr_fn=adjust, **options),
        torch.optim.AdamW(groups, 0.01, betas=(0.8, 0.9), weight_decay=0.3, foreach=False),
    ]


@pytest.mark.parametrize("scale", ["spectral", "adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_ten_steps_equal_torch(nesterov: bool, scale: str) -> None:
    model, twin = Net(), Net()
    options = {"momentum": 0.8, "nesterov": nesterov}
    optimizer = OptimizerBuilder.build(
        "muon",
        model,
        0.02,
        **options,
        **{"scale": scale, "adamw_lr": 0.01, "betas": [0.8, 0.9], "weight_decay": 0.3},
        dtype="bfloat16",  # as torch's always is
    )
    adjust = {"spectral": "original", "adamw": "match_rms_adamw"}[scale]
    others = reference(twin, 0.02, adjust, **options)
    for step in range(10):
        backward(model, step)
        optimizer.step()
        backward(twin, step)
        for other in others:
            other.step()
    for (name, actual), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        # The two differ in the order of bfloat16 sums, and each difference comes back.
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.004, msg=name)
        assert not actual.equal(dict(Net().named_parameters())[name]), name


def test_batched_equals_matrix_by_matrix() -> None:
    model, twin = Net(), Net()
    optimizer = OptimizerBuilder.build("muon", model, 0.02)
    matrices = [p for p in twin.parameters() if p.ndim == 2][1:-1]
    single = [
        Muon({"params": [matrix], "lr": 0.02, "weight_decay": 0.01}, []) for matrix in matrices
    ]
    for step in range(5):
        backward(model, step)
        for own, other in zip(twin.parameters(), model.parameters(), strict=True):
            own.grad = other.grad.clone()
        optimizer.step()
        for one in single:
            one.step()
    for name in ("first", "second", "up", "down"):
        actual, expected = getattr(model, name).weight, getattr(twin, name).weight
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_rows_are_divided_by_their_running_root_mean_square_and_the_norm_stays() -> None:
    weight = nn.Parameter(random(6, 4))
    silent = nn.Parameter(random(6, 4))  # as of a layer whose outputs start at 0
    group = {"params": [weight, silent], "lr": 0.1, "weight_decay": 0.0}
    optimizer = Muon(group, [], momentum=0.0, nesterov=False, row_beta=0.9)
    expected, squares = weight.detach().numpy().copy(), np.zeros((6, 1))
    before = silent.detach().clone()
    for step in range(4):
        weight.grad = random(6, 4, seed=step + 1) * torch.logspace(-2, 0, 6, dtype=F64)[:, None]
        silent.grad = torch.zeros_like(silent)
        update = orthogonalize(weight.grad).numpy()
        squares = 0.9 * squares + 0.1 * (update**2).mean(axis=1, keepdims=True)
        even = update / np.sqrt(squares)
        even *= np.linalg.norm(update) / np.linalg.norm(even)
        expected -= 0.1 * math.sqrt(6 / 4) * even
        optimizer.step()
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-7)
        if step == 1:  # as a resumed run
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = Muon(group, [], momentum=0.0, nesterov=False, row_beta=0.9)
            optimizer.load_state_dict(state)
    assert silent.equal(before)


def test_without_it_the_state_is_the_momentum_only() -> None:
    for row_beta, expected in ((None, {"momentum"}), (0.95, {"momentum", "row_squares"})):
        optimizer = OptimizerBuilder.build("muon", model := Net(), 0.02, row_beta=row_beta)
        backward(model, 0)
        optimizer.step()
        assert optimizer.state[model.up.weight].keys() == expected


def test_float32_is_the_least_off_a_gpu_and_stays_what_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Net().bfloat16()
    auto, asked = (
        OptimizerBuilder.build("muon", model, 0.02, dtype=d) for d in ("auto", "bfloat16")
    )
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert auto._dtype_on(cpu, torch.bfloat16) == torch.float32
    assert auto._dtype_on(cpu, F64) == F64
    monkeypatch.setattr(muon_module, "has_bf16", lambda device: True)
    assert auto._dtype_on(cuda, torch.float32) == torch.bfloat16
    monkeypatch.setattr(muon_module, "has_bf16", lambda device: False)  # as a T4
    assert auto._dtype_on(cuda, torch.float32) == torch.float32
    assert asked._dtype_on(cpu, torch.float32) == torch.bfloat16


def test_each_group_has_its_rate_and_the_schedule_moves_them_together() -> None:
    rates = {"head_lr": 0.3, "embedding_lr": 0.2, "vector_lr": 0.1}
    optimizer = OptimizerBuilder.build("muon", Net(), 0.02, **rates)
    schedule = LinearWarmup(optimizer, 4)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.02 / 4, 0.3 / 4, 0.2 / 4, 0.1 / 4]
    default = OptimizerBuilder.build("muon", Net(), 0.02, adamw_lr=0.7)
    assert [g["lr"] for g in default.param_groups] == [0.02, 0.7, 0.7, 0.7]
    assert [g["weight_decay"] for g in default.param_groups] == [0.01, 0.01, 0.0, 0.0]


class Bench:
    """A training step of a tiny transformer with Muon, in float64."""

    def __init__(self, max_grad_norm: float | None = None) -> None:
        torch.manual_seed(0)
        self.model = tiny_model(vocab_size=7, tie_embeddings=False).double()
        self.optimizer = OptimizerBuilder.build("muon", self.model, 0.02, adamw_lr=0.01)
        self.step = TrainStep(
            self.model,
            self.model,
            self.optimizer,
            LanguageModelingLoss(),
            Precision("fp32", torch.device("cpu")),
            Ranks(),
            max_grad_norm,
            lambda event: None,
        )

    def take(self, micro_batches: int, seed: int) -> None:
        ids = torch.randint(7, (4, 9), generator=torch.Generator().manual_seed(seed))
        rows = ids.chunk(micro_batches)
        batches = [{"input_ids": r[:, :-1], "target_ids": r[:, 1:]} for r in rows]
        output = self.step(Window(batches, 32), 32, 4)
        assert not output.rejection

    def assert_like(self, other: Bench) -> None:
        for (name, one), two in zip(
            self.model.named_parameters(), other.model.parameters(), strict=True
        ):
            torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9, msg=name)


def test_accumulated_micro_batches_give_the_whole_batchs_update() -> None:
    whole, split = Bench(max_grad_norm=0.1), Bench(max_grad_norm=0.1)
    for seed in range(4):
        whole.take(1, seed)
        split.take(4, seed)
    whole.assert_like(split)


def test_a_clipped_step_is_that_of_the_clipped_gradient() -> None:
    clipped, manual = Bench(max_grad_norm=0.05), Bench()
    for seed in range(4):
        clipped.take(1, seed)
        before = (
            copy.deepcopy(manual.model.state_dict()),
            copy.deepcopy(manual.optimizer.state_dict()),
        )
        manual.take(1, seed)  # for its gradient
        gradients = [p.grad.clone() for p in manual.model.parameters()]
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        assert norm > 0.05
        manual.model.load_state_dict(before[0])
        manual.optimizer.load_state_dict(before[1])
        for parameter, gradient in zip(manual.model.parameters(), gradients, strict=True):
            parameter.grad = gradient * (0.05 / (norm + 1e-6))  # as torch clips
        manual.optimizer.step()
    clipped.assert_like(manual)


def test_parameters_without_gradients_stay() -> None:
    model = Net()
    optimizer = OptimizerBuilder.build("muon", model, 0.1, weight_decay=0.5)
    model.second.weight.grad = torch.ones(4, 4, dtype=F64)
    optimizer.step()
    for name, parameter in model.named_parameters():
        same = parameter.equal(dict(Net().named_parameters())[name])
        assert same == (name != "second.weight"), name


def test_a_closure_is_evaluated_with_gradients() -> None:
    model = Net()
    optimizer = OptimizerBuilder.build("muon", model, 0.1)

    def closure() -> Tensor:
        backward(model, 0)
        return torch.tensor(3.0)

    assert optimizer.step(closure) == 3
    assert not model.up.weight.equal(Net().up.weight)


@pytest.mark.parametrize(
    "options",
    [
        *({"momentum": 1.0}, {"num_steps": 0}, {"head_lr": 0.0}, {"scale": "other"}),
        *({"dtype": "int8"}, {"betas": (0.9, 1.5)}, {"betas": (2.0, 0.9)}, {"eps": -1.0}),
        *({"weight_decay": -1.0}, {"adamw_lr": -1.0}, {"row_beta": 1.0}),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    name = next(iter(options))
    said = "beta" if name == "betas" else name.removesuffix("_lr")
    with pytest.raises((ConfigError, ValueError), match=f"(?i){said}"):
        OptimizerBuilder.build("muon", Net(), 0.1, **options)


def test_the_last_layer_is_the_head_by_its_rows_where_none_has_the_name() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Linear(7, 4))
    model.append(nn.Linear(4, 7, bias=False))
    groups = OptimizerBuilder.build("muon", model, 0.1).param_groups
    assert [id(p) for p in groups[0]["params"]] == [id(model[1].weight), id(model[2].weight)]
    assert [id(p) for p in groups[1]["params"]] == [id(model[3].weight)]


def test_a_vector_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="matrices; vectors"):
        Muon({"params": [nn.Parameter(torch.ones(3))], "lr": 0.1, "weight_decay": 0.0}, [])
