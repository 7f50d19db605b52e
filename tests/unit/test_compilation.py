"""One block compiled and reused: how often the compiler runs, and that results stay."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fundamentallm.compute import compilation
from fundamentallm.compute.compilation import (
    CompiledBlocks,
    compile_model,
    find_compiler,
    resolve_compile,
    uncompiled,
)
from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision, narrowed
from fundamentallm.data.batch import Window
from fundamentallm.errors import MachineError
from fundamentallm.models.layers.attention import use_kernel
from fundamentallm.models.transformer import Transformer, run_block
from fundamentallm.testing import UniformModel, tiny_model
from fundamentallm.training.losses import LanguageModelingLoss
from fundamentallm.training.recovery.diagnosis import Diagnosis, StepReplayer
from fundamentallm.training.recovery.incident import first_bad

# Torch hides this one from users while it traces, by way of showwarning, which pytest has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

MODERN = {"qk_norm": True, "residual_mix": True, "feedforward": "relu_squared"}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


def pair(**options: Any) -> tuple[Transformer, Transformer, CompileCounter]:
    """A model whose block is compiled (by a backend that counts), and a plain one."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(tiny_model(num_layers=3, **{**MODERN, **options}))
    counter = CompileCounter()
    models[0].run_block = CompiledBlocks(run_block, backend=counter)
    return models[0], models[1], counter


def tokens(batch: int = 2, time: int = 8) -> Tensor:
    return torch.randint(11, (batch, time), generator=torch.Generator().manual_seed(1))


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_all_blocks_and_steps_share_one_compilation(dropout: float, checkpointing: bool) -> None:
    fast, plain, counter = pair(dropout=dropout)
    for model in (fast, plain):
        model.gradient_checkpointing = checkpointing
        for step in range(3):
            torch.manual_seed(step)
            model(tokens()).square().sum().backward()
    assert counter.frame_count == 1
    assert_same_gradients(fast, plain)


@pytest.mark.parametrize("narrow", [False, True])
def test_evaluation_uses_the_code_of_training(narrow: bool) -> None:
    fast, plain, counter = pair()
    outputs = []
    for model in (fast, plain):
        for training in (True, False, True, False):
            model.train(training)
            with torch.set_grad_enabled(training):
                if narrow:
                    with narrowed(model, torch.bfloat16):
                        out = model(tokens())
                else:
                    out = model(tokens())
            assert out.requires_grad == training
            outputs.append(out.detach())
    assert counter.frame_count == 1
    for actual, expected in zip(outputs[:4], outputs[4:], strict=True):
        torch.testing.assert_close(actual, expected)


def test_another_shape_is_computed_without_the_compiler() -> None:
    fast, plain, counter = pair()
    fast(tokens())
    for ids in (tokens(batch=1), tokens(time=5)):
        assert torch.equal(fast(ids), plain(ids))
    assert counter.frame_count == 1


def test_a_known_shape_is_compiled_whatever_comes_first() -> None:
    fast, plain, counter = pair()
    fast.run_block = CompiledBlocks(run_block, 2, 8, backend=counter)
    fast(tokens(batch=1))  # the short last step of an epoch
    assert counter.frame_count == 0
    with torch.no_grad():  # an evaluation before any step
        torch.testing.assert_close(fast.eval()(tokens()), plain.eval()(tokens()))
    fast.train()(tokens())
    fast(tokens(time=5))
    assert counter.frame_count == 1


def test_an_unknown_length_is_that_of_the_first_whole_batch() -> None:
    fast, _, counter = pair()
    fast.run_block = CompiledBlocks(run_block, 2, backend=counter)
    fast(tokens(batch=1, time=5))
    fast(tokens())
    assert counter.frame_count == 1


def test_any_number_of_models_in_a_process_is_compiled() -> None:
    for batch in range(1, 11):
        fast, _, counter = pair()
        fast(tokens(batch=batch))
        assert counter.frame_count == 1


def test_hooks_are_called_where_a_model_is_uncompiled() -> None:
    fast, _, _ = pair()
    fast(tokens())
    seen: list[str] = []
    fast.blocks[0].feedforward.register_forward_hook(lambda *_: seen.append("feedforward"))
    with uncompiled(fast):
        fast(tokens())
    assert seen == ["feedforward"]
    assert isinstance(fast.run_block, CompiledBlocks)


def test_a_replay_sees_into_compiled_blocks() -> None:
    fast, _, counter = pair()
    ids = tokens()
    window = Window([{"input_ids": ids, "target_ids": ids}], ids.numel())
    replayer = StepReplayer(
        fast, LanguageModelingLoss(), Precision("fp32", torch.device("cpu")), Ranks()
    )
    assert replayer.replay(window).is_finite
    assert counter.frame_count == 1
    with torch.no_grad():
        fast.blocks[1].feedforward.input.weight[0, 0] = torch.nan
    found = first_bad(Diagnosis("", replayer.replay(window, watch=True)))
    assert found["forward"]["module"] == "blocks.1.feedforward.input"


def test_evaluation_alone_compiles_nothing() -> None:
    fast, plain, counter = pair()
    with torch.no_grad():
        assert torch.equal(fast.eval()(tokens()), plain.eval()(tokens()))
    assert counter.frame_count == 0


def test_dropout_is_off_in_evaluation() -> None:
    fast, plain, counter = pair(dropout=0.5)
    fast(tokens())
    with torch.no_grad():
        assert torch.equal(fast.eval()(tokens()), plain.eval()(tokens()))
    assert counter.frame_count == 1


def test_a_failing_compiler_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no space left\non the disk")

    fast, plain, _ = pair()
    fast.run_block = CompiledBlocks(run_block, backend=broken)
    with caplog.at_level(logging.WARNING):
        for model in (fast, plain, fast):
            model.zero_grad()
            model(tokens()).square().sum().backward()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "torch.compile failed, training continues without it" in caplog.text
    assert "no space left" in caplog.text
    assert_same_gradients(fast, plain)


def test_an_error_in_a_block_stays_an_error() -> None:
    fast, _, _ = pair()
    with pytest.raises(ValueError, match="the input has 9 tokens"):
        fast(tokens(time=9))
    fast.blocks[1].feedforward.forward = lambda x: x[:, :, :3]
    with pytest.raises(RuntimeError, match="size of tensor"):
        fast(tokens())


def test_a_model_without_blocks_is_compiled_as_a_whole() -> None:
    model = UniformModel(5)
    other = compile_model(model)
    assert other is not model
    assert isinstance(other, torch._dynamo.eval_frame.OptimizedModule)


def test_a_model_with_blocks_keeps_its_parameters_names() -> None:
    model = tiny_model()
    names = list(model.state_dict())
    assert compile_model(model) is model
    assert isinstance(model.run_block, CompiledBlocks)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(("choice", "found"), [(True, "/usr/bin/g++"), ("auto", "/usr/bin/g++")])
def test_a_compiler_that_is_there_is_used(choice: Any, found: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(compilation, "find_compiler", lambda: found)
    assert resolve_compile(choice) is True
    assert resolve_compile(False) is False


def test_without_a_compiler_auto_warns_once_and_true_is_an_error(
    monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert find_compiler() is None
    with caplog.at_level(logging.WARNING):
        assert resolve_compile("auto") is False
        assert resolve_compile(False) is False
    assert len(caplog.records) == 1
    with pytest.raises(MachineError, match=r"(?s)needs a C\+\+ compiler.*CXX=/nowhere/c\+\+"):
        resolve_compile(True)


@pytest.mark.long
@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("kernel", ["flash", "explicit"])
@pytest.mark.parametrize("narrow", [False, True])
def test_real_compiled_code_computes_the_same(kernel: str, narrow: bool) -> None:
    fast, plain, _ = pair()
    compile_model(fast.train())
    for model in (fast, plain):
        use_kernel(model, kernel)
        if narrow:
            with narrowed(model, torch.bfloat16):
                model(tokens()).float().square().sum().backward()
        else:
            model(tokens()).square().sum().backward()
    for (name, p), q in zip(fast.named_parameters(), plain.parameters(), strict=True):
        if narrow:
            assert torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.99, name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)
