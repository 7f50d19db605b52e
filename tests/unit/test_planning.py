"""The pure parts of `plan`: sizes, small runs, costs, and the choice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from fundamentallm.config import RunConfig
from fundamentallm.engine.planning.choice import (
    Cadence,
    Costs,
    affordable_tokens,
    batch_factor,
    calmer,
    candidates,
    rule_rate,
    trial_rate,
)
from fundamentallm.engine.planning.design import (
    LEAST_STEPS,
    RUNS,
    Speed,
    design,
    sizes_to_measure,
)
from fundamentallm.engine.planning.kept import KeptRuns, Measured
from fundamentallm.engine.planning.scaling_law import Point, Prediction
from fundamentallm.engine.planning.shapes import Shape, shapes_of
from fundamentallm.engine.planning.trial import TrialResult, small_run
from fundamentallm.models.build import build_model
from fundamentallm.models.families import MODELS

SPEED = Speed(1e-6, 1e-12)
SHAPES = [Shape({"d_model": n}, n * 100_000, n * 600_000) for n in (1, 3, 9, 27, 81)]


@MODELS.register("test_of_one_size")
def one_size(vocab_size: int) -> nn.Module:
    """Build a model that only its own code knows."""
    return nn.Sequential(nn.Embedding(vocab_size, 4), nn.Linear(4, vocab_size))


def config(**model: object) -> RunConfig:
    plain = {"vocab_size": 65, "sequence_length": 64, "d_model": 48, "num_layers": 3} | model
    return RunConfig.model_validate({"model": {"num_heads": 4} | plain})


class TestShapes:
    def test_each_is_a_valid_model_with_its_number_of_parameters(self) -> None:
        base = config()
        shapes = shapes_of(base)
        assert [shape.parameters for shape in shapes] == sorted(s.parameters for s in shapes)
        assert sum(not shape.values for shape in shapes) == 1
        for shape in shapes[:4]:
            model = shape.applied_to(base).model
            type(model).model_validate(model.model_dump())
            assert sum(p.numel() for p in build_model(model).parameters()) == shape.parameters

    def test_they_keep_the_proportions(self) -> None:
        for shape in shapes_of(config(num_kv_heads=2, d_ff=96)):
            model = shape.applied_to(config(num_kv_heads=2, d_ff=96)).model
            assert model.d_model == 12 * model.num_heads
            assert model.num_heads == 2 * model.num_kv_heads
            assert model.d_ff == pytest.approx(2 * model.d_model, abs=8)

    def test_a_family_without_a_known_shape_has_one_size(self) -> None:
        plain = {"family": "test_of_one_size", "vocab_size": 11, "sequence_length": 8}
        (only,) = shapes_of(RunConfig.model_validate({"model": plain}))
        assert (only.values, only.parameters) == ({}, 11 * 4 + 4 * 11 + 11)


class TestSpeed:
    def test_the_fit_finds_both_numbers(self) -> None:
        flops = [1e5, 1e6, 1e7]
        found = Speed.fitted(flops, [SPEED.token_seconds(one) for one in flops])
        assert (found.base, found.per_flop) == pytest.approx((1e-6, 1e-12))

    @pytest.mark.parametrize(
        ("flops", "seconds"),
        [([1e6], [3e-6]), ([1e5, 1e6], [1e-6, 2e-5]), ([1e5, 1e6], [2e-6, 1e-6])],
    )
    def test_neither_number_is_negative(self, flops: list[float], seconds: list[float]) -> None:
        found = Speed.fitted(flops, seconds)
        assert found.base >= 0
        assert found.per_flop >= 0
        assert found.token_seconds(flops[0]) > 0


class TestDesign:
    def test_the_small_runs_take_the_time(self) -> None:
        sizes = sizes_to_measure(SHAPES, SPEED, 3600, 10**9)
        trials = design(sizes, SPEED, 60.0, 2048, 0.5)
        assert len(trials) == len(RUNS)
        assert 45 < sum(trial.seconds for trial in trials) < 60
        assert all(trial.steps >= LEAST_STEPS for trial in trials)

    def test_a_short_time_has_fewer_runs_of_enough_steps(self) -> None:
        sizes = sizes_to_measure(SHAPES, SPEED, 60, 10**9)
        step = 2048 * SPEED.token_seconds(sizes[0].flops)
        trials = design(sizes, SPEED, 1500 * step, 2048, 0.0)
        assert 0 < len(trials) < len(RUNS)
        assert all(trial.steps >= LEAST_STEPS for trial in trials)
        assert design(sizes, SPEED, 10 * step, 2048, 0.0) == []

    def test_the_sizes_grow_with_the_time_and_stop_growing_with_a_small_text(self) -> None:
        def largest(seconds: float, text: int) -> int:
            return sizes_to_measure(SHAPES, SPEED, seconds, text)[-1].parameters

        assert largest(3, 10**9) < largest(300, 10**9)
        assert largest(30_000, 10**5) < largest(30_000, 10**9)


class FakeLaw:
    """Knows the loss of each run: falls with size and tokens, rises after two passes."""

    text = 10**7

    def predict(self, point: Point) -> Prediction:
        loss = 1.0 + 30 / point.parameters**0.4 + 100 / point.tokens**0.4
        loss += 0.1 * max(point.tokens / self.text - 2, 0)
        return Prediction(loss, 0.98 * loss, 1.02 * loss)

    def best_rate(self, tokens: float) -> float:
        return 1.0 if tokens < 10**6 else 0.1


COSTS = Costs(SPEED, 5.0, 0.3, 100_000)
RARELY = Cadence(10**9, False, 1000)


class TestChoice:
    def test_the_tokens_that_a_time_allows_take_that_time(self) -> None:
        shape, often = SHAPES[1], Cadence(500, True, 1000)
        tokens = affordable_tokens(shape, COSTS, often, 600.0, 2048)
        steps = tokens / 2048
        seconds = 5.0 + tokens * SPEED.token_seconds(shape.flops)
        seconds += (steps / 500 + steps / 1000 + 1) * COSTS.evaluating(shape) + 0.5
        assert seconds == pytest.approx(600.0)

    def test_frequent_evaluations_are_made_rarer(self) -> None:
        shape = SHAPES[2]
        assert calmer(shape, COSTS, RARELY, 600.0, 2048) == RARELY
        own = calmer(shape, COSTS, Cadence(1, True, 100), 600.0, 2048)
        tokens = affordable_tokens(shape, COSTS, own, 600.0, 2048)
        assert COSTS.evaluating(shape) * own.count(tokens / 2048) <= 0.11 * 600

    def test_each_size_has_its_best_run(self) -> None:
        found = candidates(SHAPES, FakeLaw(), COSTS, RARELY, 120.0, 2048, 10**6)
        assert [one.shape for one in found] == SHAPES[:4]  # 81 times is beyond what was measured
        assert all(one.seconds <= 120 for one in found)
        # The smallest would read the text ten times; two are best.
        assert not found[0].is_full
        assert found[0].tokens < 3 * FakeLaw.text
        assert found[-1].is_full
        assert all(0.5 <= one.rate <= 2 for one in found)

    def test_no_run_fits_into_no_time(self) -> None:
        assert candidates(SHAPES, FakeLaw(), COSTS, RARELY, 5.5, 2048, 10**6) == []

    def test_rates_and_batches_follow_their_rules(self) -> None:
        assert rule_rate(1e-3, "adamw", 400, 100) == pytest.approx(5e-4)
        assert rule_rate(0.03, "muon", 400, 100) == 0.03
        assert trial_rate(500) == trial_rate(10**6) == 1.0
        assert 1 < trial_rate(300) < trial_rate(100) < trial_rate(1) == 4.0
        assert batch_factor(5e6, 1e6) == 1
        assert batch_factor(1e5, 1e6) == 1
        assert batch_factor(1e8, 1e6) == pytest.approx(4)  # 100 ** 0.38 = 5.8


class TestSmallRun:
    def test_it_has_a_whole_schedule_and_writes_nothing(self) -> None:
        base = config()
        training = base.training.model_copy(update={"max_seconds": 9.0, "warmup_steps": 500})
        handlers = {"weight_ema": {"decay": 0.9}, "early_stopping": True}
        base = base.model_copy(update={"training": training, "handlers": handlers})
        found = small_run(base, 80, 2.0)
        assert (found.training.total_steps, found.training.max_seconds) == (80, None)
        assert found.training.warmup_steps == 8
        assert found.training.learning_rate == 2 * base.training.learning_rate
        on = {name for name, options in found.handlers.items() if options is not False}
        assert on == {"schedule", "weight_ema"}


RUN = Measured(100, 600, 80, 1.5, TrialResult(2.5, 1e-5, 0.25))


class TestKeptRuns:
    def test_they_are_found_again_for_the_same_facts(self, tmp_path: Path) -> None:
        path = tmp_path / "plans.json"
        kept = KeptRuns({"text": "a"}, path)
        kept.add(RUN)
        diverged = replace(RUN, rate=3.0, result=TrialResult(math.inf, 1e-5, 0.0))
        kept.add(diverged)
        KeptRuns({"text": "b"}, path).add(diverged)
        assert KeptRuns({"text": "a"}, path).runs == [RUN, diverged]
        assert KeptRuns({"text": "c"}, path).runs == []

    @pytest.mark.parametrize("field", ["loss", "token_seconds", "steps", "rate"])
    def test_figures_that_cannot_be_are_not_taken(
        self, tmp_path: Path, field: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "plans.json"
        KeptRuns({}, path).add(RUN)
        stored = json.loads(path.read_text())
        (entry,) = stored["entries"].values()
        entry["measured"][0][field] = -1
        path.write_text(json.dumps(stored))
        assert KeptRuns({}, path).runs == []
        assert "damaged" in caplog.text
