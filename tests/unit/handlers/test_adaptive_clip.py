"""Clipping by z-score against the paper's formulas, written out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events

from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import AdaptiveClip, Checkpointing
from fundamentallm.training.trainer import Trainer


def clipped(handler: AdaptiveClip, norms: list[float]) -> list[float]:
    """Feed norms to a handler; return what each update is clipped to, its own norm if not."""
    results = []
    for norm in norms:
        limits: list[float] = [norm]
        trainer: Any = SimpleNamespace(step=SimpleNamespace(norm=norm, clip_to=limits.append))
        handler.clip(trainer)
        handler.learn(trainer)
        results.append(limits[-1])
    return results


def by_the_paper(norms: list[float], alpha: float, z_max: float, warmup: int) -> list[float]:
    mean, variance = float(np.mean(norms[:warmup])), float(np.var(norms[:warmup]))
    results = list(norms[:warmup])
    for norm in norms[warmup:]:
        z = (norm - mean) / math.sqrt(variance)
        used = mean + z_max**2 / z * math.sqrt(variance) if z > z_max else norm
        mean = alpha * mean + (1 - alpha) * used
        variance = alpha * variance + (1 - alpha) * (used - mean) ** 2
        results.append(used)
    return results


def test_it_clips_as_the_paper_says():
    generator = np.random.default_rng(0)
    norms = [float(n) for n in generator.lognormal(0.0, 0.3, 200)]
    norms[60], norms[61], norms[150] = 30.0, 8.0, 1000.0
    result = clipped(AdaptiveClip(2.0, 0.9, 20), norms)
    assert result == pytest.approx(by_the_paper(norms, 0.9, 2.0, 20))
    assert result[60] < 5.0
    assert result[:20] == norms[:20]


def test_the_further_out_the_harder():
    calm = [1.0, 1.2] * 20
    limits = [clipped(AdaptiveClip(2.5, warmup=40), [*calm, spike])[-1] for spike in (2, 10, 1e6)]
    assert limits[0] > limits[1] > limits[2] > 1.1


def test_norms_that_never_vary_are_not_clipped():
    assert clipped(AdaptiveClip(warmup=5), [1.0] * 10 + [50.0])[-1] == 50.0


def make_trainer(*handlers: Any, **options: Any) -> Trainer:
    torch.manual_seed(0)
    fields = {"total_steps": 16, "eval_steps": 8, "warmup_steps": 0, **options}
    trainer = Trainer(
        tiny_model(),
        *tiny_loaders(),
        device="cpu",
        config=TrainingConfig(**fields),
        handlers=handlers,
    )

    def enlarge() -> None:
        if trainer.state.iteration in (12, 13):
            for parameter in trainer.model.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(1000.0)

    trainer.add_event_handler(TrainingEvents.FLLM_MICRO_BATCH_COMPLETED, enlarge)
    return trainer


def applied_norms(trainer: Trainer) -> tuple[list[float], list[float]]:
    """Run; return the norms of the applied gradients, and those before clipping."""
    norms: list[float] = []
    measured: list[float] = []

    def note() -> None:
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        measured.append(trainer.step.norm)

    trainer.add_event_handler(TrainingEvents.FLLM_OPTIMIZER_STEPPED, note)
    trainer.run()
    return norms, measured


@pytest.mark.parametrize("limit", [None, 0.5, 1e9])
def test_the_applied_gradient_has_that_norm_and_a_fixed_limit_holds_besides(limit):
    handler = AdaptiveClip(warmup=8)
    trainer = make_trainer(handler, max_grad_norm=limit)
    norms, measured = applied_norms(trainer)
    assert handler.num_clipped >= 2
    assert measured[11] > 100.0
    assert norms[11] <= min(limit or math.inf, 10.0) * (1 + 1e-6)


def test_a_resumed_run_clips_as_the_other(tmp_path):
    reference = make_trainer(AdaptiveClip(warmup=6), Checkpointing(tmp_path / "one"))
    reference.run()
    stopped = make_trainer(AdaptiveClip(warmup=6), Checkpointing(tmp_path / "two"))
    stopped.add_event_handler(
        Events.ITERATION_STARTED,
        lambda: stopped.interrupt_run(15) if stopped.state.iteration == 4 else None,
    )
    stopped.run()
    resumed = make_trainer(AdaptiveClip(warmup=6), Checkpointing(tmp_path / "two"))
    resumed.resume(tmp_path / "two" / "step-00000004")
    resumed.run()
    for one, other in zip(reference.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    states = [t.attached["adaptive_clip"].state_dict() for t in (reference, resumed)]
    assert states[0] == states[1]


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"decay": 1.0}, {"warmup": 1}])
def test_options_without_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AdaptiveClip(**options)
