"""The block as native code, against the same block in torch."""

from __future__ import annotations

import copy
import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests import forked
from torch import nn

from fundamentallm.compute.compilation import compile_model, uncompile, uncompiled
from fundamentallm.compute.plan import Machine, ModelFacts, Plan
from fundamentallm.compute.precision import Precision
from fundamentallm.config import TrainingConfig, TransformerConfig
from fundamentallm.errors import ConfigError, MachineError
from fundamentallm.models.layers.components import build_block, build_positions
from fundamentallm.models.layers.normalization import RMSNorm, rms_norm
from fundamentallm.models.native import block as native
from fundamentallm.models.native import library
from fundamentallm.models.native.block import NativeBlocks, require_native, why_not
from fundamentallm.models.native.library import build, find_compiler
from fundamentallm.models.native.normalization import native_rms_norm
from fundamentallm.models.transformer import Transformer, run_block

CPU = torch.device("cpu")
ROUNDING = 2.0**-7  # of bfloat16, which has 8 bits; a product adds up many of them at random

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
pytestmark = needs_compiler

PLAIN = {"d_model": 64, "num_heads": 2, "d_ff": 96, "feedforward": "relu_squared"}
KINDS = {
    "plain": PLAIN,
    "gelu": {**PLAIN, "feedforward": "gelu"},
    "swiglu": {**PLAIN, "feedforward": "swiglu"},
    "grouped": {**PLAIN, "num_heads": 2, "num_kv_heads": 1},
    "learned": {**PLAIN, "positions": "learned"},
    "mixed": {**PLAIN, "residual_mix": True},
    "normed": {**PLAIN, "qk_norm": True},
    "all": {
        **PLAIN,
        "d_model": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "d_ff": 160,
        "feedforward": "swiglu",
        "residual_mix": True,
        "qk_norm": True,
    },
    "filled": {**PLAIN, "d_ff": 100},
    "filled swiglu": {**PLAIN, "d_ff": 77, "feedforward": "swiglu"},
    "wide heads": {**PLAIN, "d_model": 192, "num_heads": 2, "qk_norm": True},
}


class Case:
    """A block with weights of a trained size, its inputs, and both ways to compute it."""

    def __init__(self, kind: str, batch: int = 3, time: int = 96) -> None:
        self.config = TransformerConfig(vocab_size=65, sequence_length=time, **KINDS[kind])
        torch.manual_seed(0)
        self.positions = build_positions(self.config)
        self.block = build_block(self.config)
        for parameter in self.block.parameters():
            scale = 0.3 if parameter.ndim < 2 else 1.5 * parameter.size(-1) ** -0.5
            parameter.data = scale * torch.randn_like(parameter) + (parameter.ndim < 2)
        self.parameters = dict(self.block.named_parameters())  # also while copies are lent
        shape = (batch, time, self.config.d_model)
        self.x, self.embedded, self.d_y = (torch.randn(shape) for _ in range(3))
        self.runner = NativeBlocks(run_block)

    def native(self, *arguments):
        """Call the runner as training in bf16 does."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.runner(*arguments)

    def gradients(self, run) -> dict[str, torch.Tensor]:
        """Return the output and all gradients, by name."""
        for parameter in self.parameters.values():
            parameter.grad = None
        x, embedded = (t.clone().requires_grad_() for t in (self.x, self.embedded))
        y = run(self.block, x, self.positions, embedded)
        y.backward(self.d_y.to(y.dtype))
        found = {"y": y.detach(), "x": x.grad}
        if self.config.residual_mix:
            found["embedded"] = embedded.grad
        found.update((name, p.grad) for name, p in self.parameters.items())
        return found


# Of the compiler's names for processors, which have other kernels: plain vectors, AVX-512 with
# bfloat16, tiles.
# Kernels of a lower processor are compiled for this test alone.
AVX2 = pytest.param("x86-64-v3", marks=pytest.mark.long)
PROCESSORS = {"x86-64-v3": "avx2", "cooperlake": "avx512_bf16", "sapphirerapids": "amx_bf16"}


def library_for(processor, precision="bf16"):
    """Return a library with the kernels of a processor; kept from one test run to the next."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().split() if cpu.exists() else []
    if PROCESSORS[processor] not in flags:
        pytest.skip(f"this processor has no {PROCESSORS[processor]}")
    if processor == [name for name, needs in PROCESSORS.items() if needs in flags][-1]:
        return library.load_library(precision)  # compiled for this very processor, it has them
    directory = library.default_cache_dir() / "native"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return build(find_compiler(), directory, f"-march={processor}", precision)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time", [32, 96, 256])
def test_output_and_every_gradient_are_those_of_the_plain_block(kind, time):
    case = Case(kind, time=time)
    found = case.gradients(case.native)
    for tensor in (case.x, case.embedded, case.d_y):
        tensor.data = tensor.double()
    case.block.double()
    case.positions.double()
    expected = case.gradients(run_block)
    assert found.keys() == expected.keys()
    worst = {name: difference(found[name], expected[name]) for name in expected}
    # A few sums of many terms of either sign lose more.
    assert max(worst.values()) < 4 * ROUNDING, worst
    assert worst["y"] < 2 * ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_it_rounds_no_more_than_torch_with_weights_in_bfloat16(kind):
    case = Case(kind, time=256)
    exact = case.gradients(run_block)
    found = case.gradients(case.native)
    with Precision("bf16", CPU, bf16_weights=True).weights(case.block):
        narrow = case.gradients(
            lambda block, x, positions, embedded: run_block(
                block, x.bfloat16(), positions, embedded.bfloat16()
            )
        )
    for name in (name for name in exact if exact[name].numel() > 2):  # of two numbers it is luck
        allowed = 1.3 * difference(narrow[name], exact[name])
        assert difference(found[name], exact[name]) < allowed, name


def test_the_check_would_notice_a_wrong_scale():
    case = Case("plain")
    found = case.gradients(case.native)["y"]
    with torch.no_grad():
        case.block.attention.value.weight.mul_(1.05)
    assert difference(found, case.gradients(run_block)["y"]) > ROUNDING


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_no_position_reads_a_later_one(kind):
    case = Case(kind, batch=1, time=128)
    before = case.gradients(case.native)["y"]
    case.x[:, 77:] += 1.0
    after = case.gradients(case.native)["y"]
    assert torch.equal(before[:, :77], after[:, :77])
    assert (before[:, 77:] != after[:, 77:]).any(dim=-1).all()


def test_a_sequence_is_what_it_is_alone():
    case = Case("all", batch=5)
    whole = case.gradients(case.native)
    for row in range(5):
        alone = Case("all", batch=5)
        for name in ("x", "embedded", "d_y"):
            setattr(alone, name, getattr(case, name)[row : row + 1])
        found = alone.gradients(alone.native)
        assert torch.equal(found["y"], whole["y"][row : row + 1])
        assert torch.equal(found["x"], whole["x"][row : row + 1])


def test_it_gives_the_same_bits_again_and_on_any_number_of_threads():
    case = Case("all", batch=7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, second = case.gradients(case.native), case.gradients(case.native)
        torch.set_num_threads(3)
        third, fourth = case.gradients(case.native), case.gradients(case.native)
    finally:
        torch.set_num_threads(threads)
    for name in first:
        assert torch.equal(first[name], second[name])
        assert torch.equal(third[name], fourth[name])
    assert torch.equal(first["y"], third["y"])
    assert torch.equal(first["x"], third["x"])


def test_evaluation_gives_the_bits_of_training_and_keeps_nothing():
    case = Case("all")
    expected = case.gradients(case.native)["y"]
    with torch.no_grad():
        y = case.native(case.block, case.x, case.positions, case.embedded)
    assert torch.equal(y, expected)
    assert not y.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["x", "query", "value", "gate", "output"])
def test_what_is_not_finite_is_not_hidden(place, value):
    case = Case("plain")
    where = {
        "x": case.x,
        "query": case.block.attention.query.weight,
        "value": case.block.attention.value.weight,
        "gate": case.block.feedforward.input.weight,
        "output": case.block.feedforward.output.weight,
    }[place]
    where.data.view(-1)[5] = value
    found = case.gradients(case.native)
    assert not found["y"].isfinite().all()
    assert not all(found[name].isfinite().all() for name in found if name != "y")


def test_a_gradient_that_is_not_finite_is_not_hidden():
    case = Case("plain")
    case.d_y[0, 3, 2] = float("nan")
    found = case.gradients(case.native)
    assert found["y"].isfinite().all()
    assert not found["attention.query.weight"].isfinite().all()


def test_a_graph_is_gone_through_once():
    case = Case("plain")
    y = case.native(case.block, case.x.requires_grad_(), case.positions, case.embedded)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        y.sum().backward()


def test_two_graphs_at_a_time_do_not_share_buffers():
    case = Case("all")
    expected = case.gradients(case.native)
    case.block.zero_grad()
    x = case.x.clone().requires_grad_()
    first = case.native(case.block, x, case.positions, case.embedded)
    second = case.native(case.block, 2 * x.detach(), case.positions, case.embedded)
    first.backward(case.d_y)
    assert torch.equal(x.grad, expected["x"])
    second.backward(case.d_y)


def trained_model(checkpointing: bool):
    """Return a model and the function that gives its gradients, by name."""
    config = TransformerConfig(vocab_size=65, sequence_length=64, num_layers=3, **KINDS["all"])
    torch.manual_seed(0)
    model = Transformer(config)
    model.gradient_checkpointing = checkpointing
    ids = torch.randint(65, (4, 64))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    return model, gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_with_it(checkpointing):
    model, gradients = trained_model(checkpointing)
    expected = gradients()
    compile_model(model, native=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients()
    assert any(not torch.equal(found[name], expected[name]) for name in expected)
    for name in expected:
        assert difference(found[name], expected[name]) < 8 * ROUNDING, name


class TestDropout:
    """Its masks are its own, so they are read off the results."""

    P = 0.25

    def case(self, **changes) -> Case:
        KINDS["dropped"] = {**PLAIN, "d_model": 128, "dropout": self.P, **changes}
        try:
            return Case("dropped", batch=4, time=64)
        finally:
            del KINDS["dropped"]

    def run(self, case: Case, seed: int = 0) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return case.native(case.block, case.x, case.positions, case.embedded)

    def test_a_branch_loses_its_share_and_the_rest_grows(self):
        case = self.case()
        # With one value in every channel, the first branch adds the same number everywhere.
        case.block.attention.dropout = 0.0
        case.block.dropout.p = 0.0
        case.x[:] = 1.0
        case.block.feedforward.output.weight.data.zero_()
        whole = self.run(case) - case.x
        case.block.attention.dropout = case.block.dropout.p = self.P
        added = self.run(case) - case.x
        dropped = added.abs() < 1e-6
        assert abs(dropped.float().mean() - self.P) < 0.01
        # What the heads read lost some of its weights too: a factor for each row and head.
        assert abs((added * whole).sum() / whole.square().sum() - 1) < 0.03

    def test_weights_and_branches_are_dropped_apart(self):
        case = self.case()
        case.x[:] = 1.0
        case.block.feedforward.output.weight.data.zero_()
        case.block.attention.output.weight.data.copy_(torch.eye(128))
        read = (self.run(case) - case.x) * (1 - self.P)
        # The first row of each sequence reads itself alone: with what its one weight became.
        first = read[:, 0].view(4, 2, 64)
        whole = (first.abs() < 1e-6).all(-1)
        others = (first.abs() < 1e-6).float().mean(-1)[~whole]
        assert whole.any()
        assert not whole.all()
        assert abs(others.mean() - self.P) < 0.1

    def test_the_same_seed_draws_the_same_and_another_does_not(self):
        case = self.case()
        first, again, other = self.run(case), self.run(case), self.run(case, seed=1)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        masks = [(y - case.x).abs() < 1e-6 for y in (first, other)]
        both = (masks[0] & masks[1]).float().mean()
        assert both < 1.5 * self.P**2

    def test_evaluation_drops_nothing(self):
        case = self.case()
        case.block.eval()
        found = self.run(case)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        self.run(case)
        assert torch.equal(state, torch.get_rng_state())
        expected = run_block(case.block, case.x, case.positions, case.embedded).detach()
        assert difference(found, expected) < 2 * ROUNDING

    def test_on_average_it_is_the_plain_block(self):
        case = self.case()
        case.block.feedforward.output.weight.data.zero_()  # behind a square no average holds
        whole = run_block(case.block.eval(), case.x, case.positions, case.embedded)
        case.block.train()
        mean = sum(self.run(case, seed) for seed in range(200)) / 200
        assert difference(mean - case.x, whole.detach() - case.x) < 0.08

    @pytest.mark.parametrize("name", ["x", "query", "value", "output", "input", "feed"])
    def test_gradients_are_those_of_what_was_kept(self, name):
        """Along a direction the function changes as its gradient says, with the masks held."""
        case = self.case()
        attention, feedforward = case.block.attention, case.block.feedforward
        tensor = {
            "x": case.x,
            "query": attention.query.weight,
            "value": attention.value.weight,
            "output": attention.output.weight,
            "input": feedforward.input.weight,
            "feed": feedforward.output.weight,
        }[name]
        tensor.requires_grad_()
        torch.manual_seed(0)
        y = case.native(case.block, case.x, case.positions, case.embedded)
        (gradient,) = torch.autograd.grad(y, tensor, case.d_y)
        direction = gradient / gradient.norm()  # where the slope is far above the rounding
        step = 0.003 * float(tensor.detach().norm())
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(sign * step * direction)
                ends.append((self.run(case) * case.d_y).double().sum())
                tensor.sub_(sign * step * direction)
        slope = float(ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=0.02)

    def test_checkpointed_activations_are_computed_again_with_the_same_masks(self):
        config = TransformerConfig(
            vocab_size=65, sequence_length=64, num_layers=2, **{**PLAIN, "dropout": self.P}
        )
        torch.manual_seed(0)
        model = compile_model(Transformer(config), native=True)
        ids = torch.randint(65, (4, 64))

        def gradients(checkpointing: bool) -> list[torch.Tensor]:
            model.gradient_checkpointing = checkpointing
            model.zero_grad()
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16):
                nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            return [p.grad for p in model.parameters()]

        for plain, again in zip(gradients(False), gradients(True), strict=True):
            assert torch.equal(plain, again)

    def test_shares_that_differ_go_through_the_plain_block(self):
        case = self.case()
        case.block.attention.dropout = 0.5
        case.runner.plain = lambda *arguments: "plain"
        assert case.native(case.block, case.x, case.positions, case.embedded) == "plain"


class TestNormalization:
    @pytest.mark.parametrize("shape", [(3, 5, 64), (1, 16), (4, 96)])
    def test_it_is_the_plain_one(self, shape):
        torch.manual_seed(0)
        x = torch.randn(shape, requires_grad=True)
        weight = torch.randn(shape[-1], requires_grad=True)
        d_y = torch.randn(shape)
        found = torch.autograd.grad(native_rms_norm(x, weight, 1e-5), (x, weight), d_y)
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        expected = torch.autograd.grad(rms_norm(*wide, 1e-5), wide, d_y.double())
        for ours, exact in zip(found, expected, strict=True):
            assert difference(ours, exact) < 1e-6

    def test_rows_that_do_not_lie_in_one_piece(self):
        torch.manual_seed(0)
        x, weight = torch.randn(64, 7), torch.randn(64)
        found = native_rms_norm(x.t(), weight, 1e-5)
        torch.testing.assert_close(found, rms_norm(x.t(), weight, 1e-5))

    @pytest.mark.parametrize(("width", "dtype"), [(24, torch.float32), (64, torch.bfloat16)])
    def test_what_it_does_not_know_goes_to_the_plain_one(self, width, dtype):
        x, weight = torch.randn(3, width, dtype=dtype), torch.randn(width, dtype=dtype)
        assert torch.equal(native_rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))

    def test_a_model_with_native_blocks_has_it_everywhere(self):
        model = Transformer(TransformerConfig(vocab_size=65, sequence_length=32, **PLAIN))
        compile_model(model, native=True)
        assert {m.kernel for m in model.modules() if isinstance(m, RMSNorm)} == {native_rms_norm}


def test_calls_that_it_does_not_know_go_through_the_plain_block():
    case = Case("plain")
    asked = []

    def plain(block, x, positions, embedded):
        asked.append(x.shape)
        return run_block(block, x, positions, embedded)

    case.runner = NativeBlocks(plain)
    case.native(case.block, case.x[:, :33], case.positions, case.embedded[:, :33])
    assert len(asked) == 1
    case.native(case.block, case.x[:, :64], case.positions, case.embedded[:, :64])
    assert len(asked) == 1
    case.runner(case.block, case.x, case.positions, case.embedded)  # in float32
    assert len(asked) == 2
    case.block.bfloat16()
    case.native(case.block, case.x.bfloat16(), case.positions, case.embedded.bfloat16())
    assert len(asked) == 3


def test_a_model_can_be_copied():
    model = compile_model(
        Transformer(TransformerConfig(vocab_size=65, sequence_length=32, **PLAIN)), native=True
    )
    ids = torch.randint(65, (2, 32))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids).sum().backward()  # with buffers in use
    again = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(again(ids), model(ids))
    assert again.run_block is not model.run_block


def test_an_empty_batch_is_none_of_its_business():
    case = Case("plain")
    case.runner.plain = lambda *arguments: "plain"
    for empty in (case.x[:0], case.x[:, :0]):
        assert case.native(case.block, empty, case.positions, empty) == "plain"


def test_what_was_compiled_is_plain_again_for_the_next_step():
    model = Transformer(TransformerConfig(vocab_size=65, sequence_length=32, **PLAIN))
    compile_model(compile_model(model, 4, 32), native=True)
    uncompile(model)
    assert model.run_block is run_block
    assert {m.kernel for m in model.modules() if isinstance(m, RMSNorm)} == {rms_norm}


def test_a_kernel_of_the_user_stays():
    model = Transformer(TransformerConfig(vocab_size=65, sequence_length=32, **PLAIN))
    model.norm.kernel = own = lambda x, weight, eps: x
    uncompile(model)
    assert model.norm.kernel is own


@pytest.mark.parametrize(
    "change", [{"bias": True}, {"num_heads": 4}, {"normalization": "layernorm"}]
)
def test_a_model_that_it_does_not_know_is_refused_by_a_script_too(change):
    config = TransformerConfig(vocab_size=65, sequence_length=32, **{**PLAIN, **change})
    with pytest.raises(ConfigError, match="does not support"):
        compile_model(Transformer(config), native=True)
    with pytest.raises(ConfigError, match="Transformer"):
        compile_model(nn.Linear(2, 2), native=True)


def test_in_a_script_it_is_bf16_whatever_auto_would_be():
    model = Transformer(TransformerConfig(vocab_size=65, sequence_length=32, **PLAIN))
    config = TrainingConfig(compile="native", precision="auto")
    precision = Plan.resolve(config, ModelFacts.of(model), Machine(CPU)).build_precision()
    assert (precision.name, precision.bf16_weights) == ("bf16", False)


def test_buffers_of_inference_are_not_kept_for_training():
    case = Case("plain")
    with torch.inference_mode():
        case.native(case.block, case.x, case.positions, case.embedded)
    case.gradients(case.native)


def test_a_block_whose_sums_leave_the_cache():
    wide = {"d_model": 512, "num_heads": 8, "d_ff": 1024, "feedforward": "swiglu", "qk_norm": True}
    KINDS["wide"] = wide
    try:
        case = Case("wide", batch=5, time=96)
    finally:
        del KINDS["wide"]
    found, exact = case.gradients(case.native), case.gradients(run_block)
    for name in exact:
        assert difference(found[name], exact[name]) < 4 * ROUNDING, name


@pytest.mark.long  # a start of Python
def test_a_system_that_grants_fewer_threads_gives_the_same():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; import test_native_block as t;"
        "case = t.Case('all', batch=5); torch.set_num_threads(3); "
        "found = case.gradients(case.native); torch.set_num_threads(1);"
        "alone = case.gradients(case.native);"
        "assert all(torch.equal(found[name], alone[name]) for name in found)"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        check=True,
        env={**os.environ, "OMP_THREAD_LIMIT": "1"},
    )


def test_modules_are_watched_through_the_plain_block():
    model = Transformer(TransformerConfig(vocab_size=65, sequence_length=32, **PLAIN))
    compile_model(model, native=True)
    with uncompiled(model):
        assert model.run_block is run_block
    assert isinstance(model.run_block, NativeBlocks)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"d_model": 80, "d_ff": 96}, "d_model 80"),
        ({"num_heads": 4}, "d_model / num_heads 16"),
        ({"d_ff": 100}, ""),
        ({"sequence_length": 40}, "sequence_length 40"),
        ({"sequence_length": 8192}, "8192"),
        ({"normalization": "layernorm"}, "layernorm"),
        ({"bias": True}, "bias"),
        ({"dropout": 0.1}, ""),
        ({"feedforward": {"name": "gelu", "approximate": "tanh"}}, "approximate"),
    ],
)
def test_it_says_which_models_it_does_not_know(change, reason):
    config = TransformerConfig(**{"vocab_size": 65, "sequence_length": 64, **PLAIN, **change})
    said = why_not(config, CPU)
    assert reason in said
    assert bool(said) == bool(reason)
    assert "for CPUs" in why_not(config, torch.device("cuda", 0))
    if reason:
        with pytest.raises(ConfigError, match="native") as caught:
            require_native(config, CPU)
        assert caught.value.got == said


@pytest.mark.long
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_kernels_of_all_processors_agree(processor):
    case = Case("all", time=64)
    expected = case.gradients(case.native)
    case.runner.library = library_for(processor)
    if case.runner.library is library.load_library():
        pytest.skip("the kernels of this processor are these")
    found = case.gradients(case.native)
    for name in expected:
        assert difference(found[name], expected[name]) < 4 * ROUNDING, name


@pytest.mark.parametrize("processor", [AVX2, "native"])
@pytest.mark.parametrize("feedforward", ["swiglu", "gelu"])
def test_activations_far_from_zero(feedforward, processor):
    KINDS["far"] = {**PLAIN, "feedforward": feedforward}
    try:
        case = Case("far", batch=1, time=32)
    finally:
        del KINDS["far"]
    if processor != "native":
        case.runner.library = library_for(processor)
    first = getattr(case.block.feedforward, "gate", case.block.feedforward.input)
    first.weight.data *= 200
    found, exact = case.gradients(case.native), case.gradients(run_block)
    assert difference(found["y"], exact["y"]) < 4 * ROUNDING
    for name in exact:  # near 0 a steep slope makes much of a rounding
        assert difference(found[name], exact[name]) < 16 * ROUNDING, name


def test_the_structure_is_that_of_the_source():
    source = (Path(library.__file__).parent / "block.cpp").read_text()
    body = source[source.index("struct Block {") : source.index("Size head_width() const")]
    statements = [line.split("//")[0] for line in body.splitlines()[1:]]
    names = []
    for statement in " ".join(statements).split(";"):
        words = statement.replace("*", " ").replace(",", " ").split()
        names += [word for word in words if word not in _TYPES]
    assert names == [name for name, _ in native._Arguments._fields_]


_TYPES = {"Size", "FeedForward", "float", "const", "number"}


class TestFloat32:
    """The same block with products of float32, by vectors of 512 and of 256 bits."""

    def case(self, kind: str, processor: str = "native", **sizes: int) -> Case:
        KINDS["dropped"] = {**KINDS["all"], "dropout": 0.25}
        KINDS["wide"] = {**PLAIN, "d_model": 384, "num_heads": 6, "d_ff": 1536}
        try:
            case = Case(kind, **sizes)
        finally:
            del KINDS["dropped"], KINDS["wide"]
        case.runner = NativeBlocks(run_block, "fp32")
        if processor != "native":
            case.runner.library = library_for(processor, "fp32")
        return case

    @pytest.mark.parametrize("processor", [AVX2, "native"])
    @pytest.mark.parametrize("kind", [*KINDS, "wide"])
    def test_it_rounds_no_more_than_torch_in_float32(self, kind, processor):
        case = self.case(kind, processor)
        found, plain = case.gradients(case.runner), case.gradients(run_block)
        for tensor in (case.x, case.embedded, case.d_y):
            tensor.data = tensor.double()
        case.block.double()
        case.positions.double()
        expected = case.gradients(run_block)
        assert found.keys() == expected.keys()
        for name in expected:
            rounding = difference(found[name], expected[name])
            assert rounding < 3e-6, name
            if expected[name].numel() > 2:  # of two numbers it is luck
                assert rounding < 1.6 * difference(plain[name], expected[name]), name

    def test_the_check_would_notice_a_small_fault(self):
        case = self.case("plain")
        found = case.gradients(case.runner)["y"]
        with torch.no_grad():
            case.block.attention.value.weight.mul_(1.0001)
        assert difference(found, case.gradients(run_block)["y"]) > 1e-5

    @pytest.mark.parametrize("processor", [AVX2, "native"])
    def test_dropout_draws_what_it_draws_in_bf16(self, processor):
        case, narrow = self.case("dropped", processor), self.case("dropped")
        narrow.runner = NativeBlocks(run_block)
        torch.manual_seed(1)
        found = case.gradients(case.runner)
        torch.manual_seed(1)
        expected = narrow.gradients(narrow.native)
        for name in expected:
            assert difference(found[name], expected[name]) < 4 * ROUNDING, name

    @pytest.mark.parametrize("processor", [AVX2, "native"])
    def test_rows_and_threads_do_not_depend_on_each_other(self, processor):
        case = self.case("all", processor, batch=5)
        whole = case.gradients(case.runner)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            again = case.gradients(case.runner)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(whole["y"], again["y"])
        assert torch.equal(whole["x"], again["x"])
        with torch.no_grad():
            y = case.runner(case.block, case.x[1:2], case.positions, case.embedded[1:2])
        assert torch.equal(y, whole["y"][1:2])
        case.x[:, 77:] += 1.0
        after = case.gradients(case.runner)["y"]
        assert torch.equal(whole["y"][:, :77], after[:, :77])
        assert (whole["y"][:, 77:] != after[:, 77:]).any(dim=-1).all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("place", ["x", "attention.value.weight", "feedforward.input.weight"])
    def test_what_is_not_finite_is_not_hidden(self, place, value):
        case = self.case("plain")
        where = case.x if place == "x" else case.parameters[place]
        where.data.view(-1)[5] = value
        found = case.gradients(case.runner)
        assert not found["y"].isfinite().all()
        assert not all(found[name].isfinite().all() for name in found if name != "y")

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_a_model_trains_with_it(self, checkpointing):
        model, gradients = trained_model(checkpointing)
        expected = gradients()
        plan = Plan.resolve(TrainingConfig(compile="native"), ModelFacts.of(model), Machine(CPU))
        plan.prepare(model)
        found = gradients()
        assert any(not torch.equal(found[name], expected[name]) for name in expected)
        for name in expected:
            assert difference(found[name], expected[name]) < 1e-5, name

    def test_under_autocast_it_is_the_plain_block(self):
        case = self.case("plain")
        case.runner.plain = lambda *arguments: "plain"
        assert case.native(case.block, case.x, case.positions, case.embedded) == "plain"

    def test_normalization_is_the_same_in_both_libraries(self, monkeypatch):
        torch.manual_seed(0)
        x, weight = torch.randn(3, 5, 64), torch.randn(64)
        found = []
        for precision in ("bf16", "fp32"):
            monkeypatch.setattr(library, "_LOADED", {precision: library.load_library(precision)})
            found.append(native_rms_norm(x, weight, 1e-5))
        assert torch.equal(*found)


class TestLibrary:
    @pytest.fixture(autouse=True)
    def _forgetful(self):
        library.load_library.cache_clear()
        yield
        library.load_library.cache_clear()

    @pytest.fixture
    def calls(self, tmp_path_factory, monkeypatch):
        """Have CXX copy what is compiled already and note its calls.

        Asked is where the library lies and how often it is made; compiling takes ten seconds.
        """
        made = library.load_library()._name
        library.load_library.cache_clear()
        place = tmp_path_factory.mktemp("compiler")
        script = place / "c++"
        script.write_text(
            f'#!/bin/sh\necho "$@" >> "{place}/calls"\nfor out; do :; done\ncp "{made}" "$out"\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return lambda: len((place / "calls").read_text().splitlines())

    def test_it_is_compiled_once(self, calls, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        library.load_library()
        (path,) = (tmp_path / "fundamentallm" / "native").iterdir()
        written = path.stat().st_mtime_ns
        library.load_library.cache_clear()
        library.load_library()
        assert [path] == list((tmp_path / "fundamentallm" / "native").iterdir())
        assert path.stat().st_mtime_ns == written
        assert calls() == 1

    @pytest.mark.usefixtures("calls")
    def test_without_a_place_of_its_own_it_is_compiled_for_the_process(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        (tmp_path / "file").write_text("no directory")
        assert library.load_library().fundamentallm_available()

    @pytest.mark.usefixtures("calls")
    def test_a_directory_that_others_write_to_is_not_trusted(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        directory = tmp_path / "fundamentallm" / "native"
        directory.mkdir(parents=True)
        directory.chmod(0o777)
        assert library.load_library().fundamentallm_available()
        assert not list(directory.iterdir())

    @pytest.mark.usefixtures("calls")
    def test_a_directory_below_one_that_others_write_to_is_not_trusted(self, tmp_path, monkeypatch):
        shared = tmp_path / "shared"
        shared.mkdir()
        shared.chmod(0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", str(shared))
        assert library.load_library().fundamentallm_available()
        assert not list((shared / "fundamentallm" / "native").iterdir())

    @pytest.mark.usefixtures("calls")
    def test_a_full_disk_costs_the_cache_alone(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        build_there = library.build

        def full(compiler, directory, *others):
            if directory.is_relative_to(tmp_path):
                raise OSError(28, "No space left on device")
            return build_there(compiler, directory, *others)

        monkeypatch.setattr(library, "build", full)
        assert library.load_library().fundamentallm_available()
        monkeypatch.setattr(library, "build", lambda *others: full(None, tmp_path))
        library.load_library.cache_clear()
        with pytest.raises(MachineError, match="No space left"):
            library.load_library()

    def test_no_compiler_is_said(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(MachineError, match="no C"):
            library.load_library()

    def test_a_compiler_that_refuses_is_said(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        refuses = tmp_path / "refuses"
        refuses.write_text("#!/bin/sh\necho 'block.cpp: error: too old' >&2\nexit 1\n")
        refuses.chmod(0o755)
        monkeypatch.setenv("CXX", str(refuses))
        with pytest.raises(MachineError, match="refuses") as caught:
            library.load_library()
        assert "too old" in caught.value.got
        assert not list((tmp_path / "fundamentallm" / "native").iterdir())

    @pytest.mark.usefixtures("calls")
    def test_the_place_that_was_looked_at_is_the_place_that_is_loaded(self, tmp_path, monkeypatch):
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        ours.mkdir(mode=0o700)
        theirs.mkdir(mode=0o700)
        link = tmp_path / "link"
        link.symlink_to(ours)
        monkeypatch.setenv("XDG_CACHE_HOME", str(link))
        looked = library.is_ours

        def then_the_link_turns(directory):
            answer = looked(directory)
            link.unlink()
            link.symlink_to(theirs)
            return answer

        monkeypatch.setattr(library, "is_ours", then_the_link_turns)
        assert library.load_library().fundamentallm_available()
        assert list((ours / "fundamentallm" / "native").iterdir())
        assert not list(theirs.rglob("*"))

    @pytest.mark.skipif(os.getuid() != 0, reason="needs the right to give a folder away")
    @pytest.mark.parametrize("level", [0, 1, 2])
    def test_a_folder_of_somebody_else_on_the_way_is_not_trusted(self, tmp_path, level):
        folders = [tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/c"]
        for folder in folders:
            folder.mkdir(mode=0o700)
        assert library.is_ours(folders[-1])
        os.chown(folders[level], 12345, -1)
        assert not library.is_ours(folders[-1])

    @pytest.mark.usefixtures("calls")
    def test_a_library_that_others_may_write_or_that_is_a_link_is_made_anew(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        library.load_library()
        (path,) = (tmp_path / "fundamentallm" / "native").iterdir()
        sound = path.read_bytes()
        evil = tmp_path / "evil.so"
        for spoil in (
            lambda: (path.unlink(), path.write_bytes(b"not ours"), path.chmod(0o666)),
            lambda: (evil.write_bytes(b"not ours"), path.unlink(), path.symlink_to(evil)),
        ):
            spoil()
            library.load_library.cache_clear()
            assert library.load_library().fundamentallm_available()
            assert path.read_bytes() == sound
            assert not path.is_symlink()
        assert evil.read_bytes() == b"not ours"

    def test_a_compiler_that_does_not_end_is_ended_with_what_it_started(
        self, tmp_path, monkeypatch
    ):
        slow = tmp_path / "slow"
        # The child keeps standard error open, as the real compiler's do.
        slow.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/child\nwait\n")
        slow.chmod(0o755)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("CXX", str(slow))
        monkeypatch.setattr(library, "SECONDS", 1.0)
        monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
        with pytest.raises(MachineError, match="too long") as caught:
            library.load_library()
        assert caught.value.got == "more than 1 seconds"
        child = int((tmp_path / "child").read_text())
        deadline = time.monotonic() + forked.SECONDS
        while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":  # dead, and nobody in this container collects it
                break
            time.sleep(0.05)
        else:
            assert not Path(f"/proc/{child}").exists()

    def test_a_busy_machine_has_more_time(self, monkeypatch):
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        for load, times in ((0.5, 1.0), (4.0, 1.0), (10.0, 2.5)):
            monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
            assert library._crowding() == times

    @pytest.mark.usefixtures("calls")
    def test_a_system_that_refuses_tiles_is_said(self, tmp_path, monkeypatch):
        names = ("packed_size", "forward", "backward", "normalize", "normalize_backward")
        functions = {f"fundamentallm_{name}": SimpleNamespace() for name in names}
        refusing = SimpleNamespace(fundamentallm_available=lambda: 0, **functions)
        monkeypatch.setattr(ctypes, "CDLL", lambda path: refusing)
        with pytest.raises(MachineError, match="AMX"):
            build(find_compiler(), tmp_path)
