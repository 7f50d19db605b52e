"""Model FLOPs utilization: the model's own count over a peak that is given or found."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fundamentallm.compute import peak
from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.models.estimate import estimate
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import ModelFlopsUtilization, Throughput
from fundamentallm.training.trainer import Trainer


def make_trainer(model: nn.Module | None = None) -> Trainer:
    torch.manual_seed(0)
    train, _ = tiny_loaders()
    model = model or tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, train, optimizer=optimizer, config=TrainingConfig(total_steps=3))


def test_is_the_models_flops_a_second_over_the_peak():
    trainer = make_trainer()
    handler = ModelFlopsUtilization(peak_tflops=0.5)
    Throughput().attach(trainer)
    handler.attach(trainer)
    trainer.run()
    metrics = trainer.state.metrics
    flops = estimate(trainer.model.config).flops_per_token
    assert metrics["train/mfu"] == pytest.approx(
        metrics["train/tokens_per_second"] * flops / 0.5e12
    )


def test_is_nan_where_nobody_measures_throughput(caplog):
    trainer = make_trainer()
    ModelFlopsUtilization(peak_tflops=1.0).attach(trainer)
    trainer.run()
    assert math.isnan(trainer.state.metrics["train/mfu"])
    assert caplog.text.count("mfu is NaN: it needs the handler throughput") == 1


def test_is_of_its_own_step_whatever_was_attached_first():
    trainer = make_trainer()
    ModelFlopsUtilization(peak_tflops=0.5).attach(trainer)
    Throughput().attach(trainer)
    shares = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_METRICS_READY,
        lambda: shares.append(
            trainer.state.metrics["train/mfu"] / trainer.state.metrics["train/tokens_per_second"]
        ),
    )
    trainer.run()
    flops = estimate(trainer.model.config).flops_per_token
    assert shares == pytest.approx([flops / 0.5e12] * 3)


def test_a_model_without_a_configuration_is_counted_by_its_parameters():
    model = tiny_model()
    del model.config  # type: ignore[attr-defined]
    handler = ModelFlopsUtilization(peak_tflops=1.0)
    handler.prepare(make_trainer(model))
    assert handler.flops_per_token == 6 * sum(p.numel() for p in model.parameters())


def test_the_peak_is_measured_where_it_is_not_given(monkeypatch):
    asked = []

    def measure(device: torch.device, dtype: torch.dtype) -> float:
        asked.append((device.type, dtype))
        return 2e12

    monkeypatch.setattr(peak, "measured_peak", measure)
    handler = ModelFlopsUtilization()
    handler.prepare(make_trainer())
    assert handler.peak == 2e12
    assert asked == [("cpu", torch.float32)]


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_refuses_a_peak_that_is_none(wrong):
    with pytest.raises(ValueError, match="peak_tflops"):
        ModelFlopsUtilization(peak_tflops=wrong)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_a_known_gpu_has_the_peak_of_its_data_sheet(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak.device_peak(torch.device("cuda"), torch.bfloat16) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA L40",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "A1000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
    ],
)
def test_another_gpu_and_a_slice_of_one_are_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(peak, "measured_peak", lambda device, dtype: 1.0)
    assert peak.device_peak(torch.device("cuda"), torch.bfloat16) == 1.0


def test_measuring_draws_no_random_number():
    before = torch.get_rng_state()
    assert peak.measured_peak(torch.device("cpu"), torch.float32) > 1e8
    assert torch.equal(before, torch.get_rng_state())


def measured_by_a_clock(monkeypatch, taken, **limits):
    """Return the peak where the products take these seconds, one after the other."""
    clock = itertools.count()
    now = 0.0

    def tick() -> float:
        nonlocal now
        if next(clock) % 2:
            now += next(taken)
        return now

    monkeypatch.setattr(peak, "time", SimpleNamespace(perf_counter=tick))
    return peak.measured_peak(torch.device("cpu"), torch.float32, **limits)


def test_the_peak_is_that_of_the_fastest_product(monkeypatch):
    shapes = ((64, 32), (16, 64))
    found = measured_by_a_clock(monkeypatch, iter([5.0, 2.0, 4.0, 3.0]), shapes=shapes, calls=2)
    assert found == max(2 * 64 * 32**2 / 2.0, 2 * 16 * 64**2 / 3.0)


def test_the_time_of_disturbed_products_is_measured_again(monkeypatch):
    taken = iter([1.0, 0.5, 1.0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.125])
    found = measured_by_a_clock(monkeypatch, taken, shapes=((32, 32),), calls=2, seconds=2.0)
    assert found == 2 * 32**3 / 0.25  # eight calls of 0.25 s would take the two seconds
    assert list(taken) == [0.125]
