"""The memory of a run, against the peak of torch's own allocator during two of its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision
from fundamentallm.config import RunConfig
from fundamentallm.data.batch import Window
from fundamentallm.engine.tuning import fit
from fundamentallm.engine.tuning.fit import estimate_run, refuse_what_cannot_fit
from fundamentallm.models.build import build_model
from fundamentallm.training.losses import LOSSES
from fundamentallm.training.optimizers import OPTIMIZERS, OptimizerBuilder
from fundamentallm.training.step import TrainStep

CPU = torch.device("cpu")
CHUNKED = {"name": "chunked_cross_entropy", "chunk_tokens": 64}


def run_config(batch_size: int = 1, training: Any = None, **model: Any) -> RunConfig:
    shape = {"vocab_size": 65, "d_model": 128, "num_layers": 4, "num_heads": 4, **model}
    return RunConfig.model_validate(
        {
            "name": "sized",
            "data": {"source": "tiny_shakespeare", "batch_size": batch_size},
            "model": {"sequence_length": 64, **shape},
            "training": training or {},
        }
    )


def peak_bytes(config: RunConfig, bf16_weights: bool = False) -> int:
    """Return the most bytes that torch had allocated while it built a model and took two steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build_model(config.model).train()
        model.gradient_checkpointing = config.training.gradient_checkpointing
        step = TrainStep(
            model,
            model,
            OptimizerBuilder.from_config(config.training, model),
            LOSSES.build(config.training.loss.name, config.training.loss.options),
            Precision(config.training.precision, CPU, bf16_weights),
            Ranks(),
            1.0,
            lambda event: None,
        )
        ids = torch.zeros(config.data.batch_size, 64, dtype=torch.int64)
        for _ in range(2):
            step(Window([{"input_ids": ids, "target_ids": ids}], ids.numel()), ids.numel(), 1)
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(
    "optimizer",
    [*OPTIMIZERS.names(), {"name": "rmsprop", "momentum": 0.9}, {"name": "sgd", "momentum": 0.0}],
    ids=str,
)
def test_the_peak_of_each_optimizer(optimizer: Any) -> None:
    config = run_config(training={"optimizer": optimizer})
    assert 0.97 < estimate_run(config).total_bytes / peak_bytes(config) < 1.25


@pytest.mark.parametrize("bf16_weights", [False, True], ids=["autocast", "copies"])
@pytest.mark.parametrize(
    ("batch_size", "gradient_checkpointing", "model"),
    [
        (1, False, {}),
        (4, False, {"normalization": "layernorm", "feedforward": "gelu", "positions": "learned"}),
        (4, True, {}),
        (8, False, {"vocab_size": 2000, "num_layers": 2}),
    ],
)
def test_the_peak_in_bfloat16(
    batch_size: int, gradient_checkpointing: bool, model: dict[str, Any], bf16_weights: bool
) -> None:
    training = {"precision": "bf16", "gradient_checkpointing": gradient_checkpointing}
    config = run_config(batch_size, training, **model)
    assert 0.92 < estimate_run(config).total_bytes / peak_bytes(config, bf16_weights) < 1.2


def test_accumulated_gradients_are_there_beside_all_activations() -> None:
    config, accumulating = (
        run_config(4, {"optimizer": {"name": "sgd", "momentum": 0.0}, "accumulation_steps": steps})
        for steps in (1, 2)
    )
    cost = estimate_run(config)
    head = 4 * 65 * 128
    more = estimate_run(accumulating).total_bytes - cost.total_bytes
    assert more == cost.gradient_bytes - head


@pytest.mark.parametrize("softcap", [None, pytest.param(15.0, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "loss",
    ["cross_entropy", {"name": "cross_entropy", "z_loss": 1e-4}, CHUNKED, {**CHUNKED, "z_loss": 1}],
    ids=str,
)
def test_the_peak_of_each_loss(loss: Any, softcap: float | None) -> None:
    config = run_config(
        8, {"loss": loss}, vocab_size=4000, d_model=64, num_layers=1, logit_softcap=softcap
    )
    assert 0.97 < estimate_run(config).total_bytes / peak_bytes(config) < 1.2


def test_the_optimizers_state_is_counted_to_the_byte_by_its_groups() -> None:
    config = run_config(training={"optimizer": "muon"}, num_layers=5)
    model = build_model(config.model)
    optimizer = OptimizerBuilder.from_config(config.training, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(
        v.nbytes
        for state in optimizer.state.values()
        for v in state.values()
        if isinstance(v, torch.Tensor)
    )
    assert estimate_run(config).optimizer_bytes == held


def test_an_optimizer_of_somebody_else_says_its_state_by_being_run(monkeypatch) -> None:
    monkeypatch.setattr(OPTIMIZERS, "_factories", {**OPTIMIZERS._factories})

    @OPTIMIZERS.register("three_states")
    class ThreeStates(torch.optim.Optimizer):
        def __init__(self, params, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        def step(self, closure=None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p] = {name: torch.zeros_like(p) for name in "abc"}

    @OPTIMIZERS.register("reads_values")
    class ReadsValues(ThreeStates):
        def step(self, closure=None) -> None:
            if float(self.param_groups[0]["params"][0].sum()) > 0:
                super().step()

    cost = estimate_run(run_config(training={"optimizer": "three_states"}))
    assert cost.optimizer_bytes == 3 * cost.weight_bytes
    cost = estimate_run(run_config(training={"optimizer": "reads_values"}))
    assert cost.optimizer_bytes == 2 * cost.weight_bytes


def test_runs_of_the_same_sizes_are_estimated_once(monkeypatch) -> None:
    monkeypatch.setattr(OPTIMIZERS, "_factories", {**OPTIMIZERS._factories})
    first = estimate_run(run_config(training={"total_steps": 700, "learning_rate": 0.01}))
    assert estimate_run(run_config(training={"total_steps": 900, "eval_steps": 5})) is first
    for other in (
        run_config(2),
        run_config(d_model=64),
        run_config(training={"optimizer": "lion"}),
        run_config(training={"precision": "bf16"}),
        run_config(training={"accumulation_steps": 2}),
    ):
        assert estimate_run(other) != first
    OPTIMIZERS.register("of_a_plugin")(lambda params: None)  # what a name means may have changed
    assert estimate_run(run_config(training={"total_steps": 700})) is not first


def test_a_chunked_loss_is_not_refused_for_the_logits_that_it_never_holds(monkeypatch) -> None:
    monkeypatch.setattr(fit, "memory_limit", lambda device: 2 << 30)
    sizes = {"vocab_size": 150_000, "d_model": 32, "num_layers": 1, "num_heads": 2}
    whole = run_config(256, **sizes)
    with pytest.raises(fit.ConfigError, match="does not fit") as refused:
        refuse_what_cannot_fit(whole, CPU)
    assert "27.6 GiB" in refused.value.got
    assert "chunked_cross_entropy" in refused.value.fix
    before = torch.get_rng_state()
    chunked = run_config(256, {"loss": {**CHUNKED, "chunk_tokens": 256}}, **sizes)
    assert refuse_what_cannot_fit(chunked, CPU).total_bytes < 1 << 30
    assert torch.equal(torch.get_rng_state(), before)
