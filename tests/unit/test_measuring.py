"""The measurement itself: what it leaves alone, what it counts, and how it survives a child."""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import replace

import pytest
import torch

from fundamentallm.compute.compilation import find_compiler
from fundamentallm.compute.plan import Machine, ModelFacts, Plan
from fundamentallm.compute.threads import use_threads
from fundamentallm.config import RunConfig
from fundamentallm.data.loaders import Batching, TokenWindowLoader
from fundamentallm.engine.tuning import measuring
from fundamentallm.engine.tuning.measuring import (
    Measurement,
    measure,
    measure_in_process,
    rows_of,
    windows_of,
)
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.step import TrainStep

CPU = torch.device("cpu")
CONFIG = RunConfig.from_yaml(
    """
data: {batch_size: 2, sequence_length: 8}
model: {vocab_size: 11, d_model: 16, num_layers: 2, num_heads: 2, dropout: 0.1}
training: {accumulation_steps: 3, total_steps: 100, attention: flash, bf16_weights: false}
"""
)
LOADER = TokenWindowLoader(list(range(11)) * 50, Batching(8, 2, 3))


def training(**values: object) -> RunConfig:
    return CONFIG.model_copy(update={"training": CONFIG.training.model_copy(update=values)})


def plan_of(config: RunConfig) -> Plan:
    facts = ModelFacts.of(config.model)
    return Plan.resolve(config.training, facts, Machine(CPU), config.data.batch_size)


@pytest.fixture
def steps(monkeypatch):
    """What each call of a step saw: micro-batches, sequences."""
    calls = []
    real = TrainStep.__call__

    def noting(self, window, num_tokens, num_sequences):
        calls.append((len(window.micro_batches), num_sequences, self))
        output = real(self, window, num_tokens, num_sequences)
        assert not output.rejection
        assert math.isfinite(output.loss)
        return output

    monkeypatch.setattr(TrainStep, "__call__", noting)
    return calls


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon"])
def test_two_micro_batches_warm_up_and_then_steps_are_timed(steps, optimizer):
    component = CONFIG.training.optimizer.model_copy(update={"name": optimizer})
    config, window = training(optimizer=component), LOADER.window_at(0, 0)

    result = measure(config, plan_of(config), [window], seconds=1e-9)

    assert [call[:2] for call in steps] == [(1, 2), (1, 2), (3, 6), (3, 6), (3, 6)]
    assert 0 < result.step_seconds < 5
    assert (result.compile_seconds, result.fault) == (0.0, "")


def test_it_is_the_step_of_the_configuration(steps):
    config = training(
        precision="bf16", mixed_precision=True, bf16_weights=True, max_grad_value=0.5,
        attention="explicit", gradient_checkpointing=True,
    )  # fmt: skip
    measure(config, plan_of(config), [LOADER.window_at(0, 0)], seconds=1e-9)

    step = steps[0][2]
    assert (step.precision.name, step.precision.bf16_weights) == ("bf16", True)
    assert (step.max_grad_norm, step.max_grad_value) == (1.0, 0.5)
    assert {block.attention.kernel for block in step.model.blocks} == {"explicit"}
    assert step.model.gradient_checkpointing
    assert step.ranks.alone


def test_weights_and_random_numbers_stay_as_they_were(steps):
    torch.manual_seed(CONFIG.seed)
    expected = Transformer(CONFIG.model).state_dict()
    torch.manual_seed(5)
    before = torch.get_rng_state()

    measure(CONFIG, plan_of(CONFIG), [LOADER.window_at(0, 0)], seconds=1e-9)

    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in steps[-1][2].model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_a_hopeless_micro_batch_is_called_once(steps):
    result = measure(CONFIG, plan_of(CONFIG), [LOADER.window_at(0, 0)], seconds=1.0, slowest=0.0)
    assert len(steps) == 1
    assert result.step_seconds > 0


def test_the_first_call_of_compiled_code_is_no_reason_to_give_up(steps, monkeypatch):
    # In place of the compiler, which takes long: the code as it is.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    plan = replace(plan_of(CONFIG), compile=True)
    result = measure(CONFIG, plan, [LOADER.window_at(0, 0)], seconds=1e-9, slowest=0.0)
    assert [call[0] for call in steps] == [1, 1, 3, 3, 3]
    assert (result.fault, result.compile_seconds > 0) == ("", True)


def test_in_brief_three_calls_are_enough(steps):
    window = windows_of(rows_of(LOADER.window_at(0, 0)), 2, 1)[0]
    measure(CONFIG, plan_of(CONFIG), [window], seconds=1e-9, brief=True)
    assert len(steps) == 3


def test_a_step_of_other_micro_batches_has_the_same_rows():
    """The loader's own window of a split is the split of the loader's window."""
    rows = rows_of(LOADER.window_at(0, 1))
    for size, accumulation in ((6, 1), (3, 2), (1, 6)):
        of_loader = TokenWindowLoader(
            list(range(11)) * 50, Batching(8, size, accumulation)
        ).window_at(0, 1)
        (window,) = windows_of(rows, size, accumulation)
        assert window.num_tokens == of_loader.num_tokens
        for ours, its in zip(window.micro_batches, of_loader.micro_batches, strict=True):
            assert all(torch.equal(ours[key], its[key]) for key in its)


def test_a_short_step_is_filled_up():
    rows = {"input_ids": torch.arange(10).view(5, 2), "target_ids": torch.arange(10).view(5, 2)}
    (window,) = windows_of(rows, 4, 2)
    assert [len(batch["input_ids"]) for batch in window.micro_batches] == [4, 4]
    assert window.num_tokens == 16


def test_a_step_without_a_document_and_with_ignored_targets_counts_its_targets():
    rows = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    rows["target_ids"] = torch.tensor([[1, -100, 1], [-100, -100, 1]])
    (window,) = windows_of(rows, 2, 1)
    assert window.num_tokens == 3


def child(monkeypatch, code: str) -> None:
    """Let the measuring process be a few lines of Python."""
    real = measuring.subprocess.Popen
    monkeypatch.setattr(
        measuring.subprocess,
        "Popen",
        lambda command, **options: real([sys.executable, "-c", code, command[-1]], **options),
    )


ROWS = rows_of(LOADER.window_at(0, 0))


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "probably out of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed with signal 11"),
        ("raise MemoryError('x')", "out of memory"),
        ("raise RuntimeError('CUDA out of memory. Tried to')", "out of memory"),
        ("raise RuntimeError('odd')", "RuntimeError: odd"),
        ("import sys; sys.exit(3)", "ended with code 3"),
        ("", "ended with code 0"),
        ("import time; time.sleep(60)", "no result after 1 s"),
    ],
)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_a_process_that_comes_to_nothing_is_a_row(monkeypatch, code, fault):
    child(monkeypatch, code)
    result = measure_in_process(
        CONFIG, plan_of(CONFIG), ROWS, [], 1.0, patience=1.0 if "sleep" in code else 20.0
    )
    assert fault in result.fault
    assert result.step_seconds == math.inf


def test_the_process_has_its_own_compiler_cache(monkeypatch):
    code = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
own = all(os.environ[k].startswith(str(folder)) for k in
          ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"))
(folder / "result.json").write_text(json.dumps({"step_seconds": 0.5, "fault": "" if own else "no"}))
"""
    child(monkeypatch, code)
    assert measure_in_process(CONFIG, plan_of(CONFIG), ROWS, [], 1.0, 20.0) == Measurement(0.5)


def test_threads_are_what_torch_uses():
    before = torch.get_num_threads()
    try:
        use_threads(before + 2)
        assert torch.get_num_threads() == before + 2
        use_threads(None)
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.long
def test_a_real_process_measures():
    config = training(threads=1)
    result = measure_in_process(config, plan_of(config), ROWS, [], 0.05, 120.0)
    assert result.fault == ""
    assert 0 < result.step_seconds < 5
    assert result.peak_bytes is None or 1 << 25 < result.peak_bytes < 1 << 33


@pytest.mark.long
@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
# Torch hides this one from users while it traces, by way of showwarning, which pytest has replaced.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_code_serves_the_next_model_of_the_process():
    torch._dynamo.reset()
    config, window = training(compile=True), windows_of(ROWS, 2, 1)[0]
    first = measure(config, plan_of(config), [window], 0.05, brief=True)
    second = measure(config, plan_of(config), [window], 0.05, brief=True)
    assert first.fault == second.fault == ""
    assert second.compile_seconds < 0.2 * first.compile_seconds


def test_the_peak_of_a_gpu_is_of_this_measurement(monkeypatch):
    gpu = torch.device("cuda", 0)
    done = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", done.append)
    monkeypatch.setattr(measuring, "build_model", lambda config: done.append("built") or 1 / 0)
    config = training()
    with pytest.raises(ZeroDivisionError):
        measuring._measure(config, replace(plan_of(config), machine=Machine(gpu)), [], 1, 1, False)
    assert done == [gpu, "built"]
