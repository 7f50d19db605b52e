"""SWEEP.yaml: what is accepted, what is refused and where, and which settings follow from it."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.config.sweep import Prune, Range, SweepConfig, load_sweep
from fundamentallm.engine.sweeping.proposals import at_random, proposed
from fundamentallm.engine.sweeping.record import RunRecord, TrialRecord, limits
from fundamentallm.engine.sweeping.sweep import check_trials
from fundamentallm.errors import ConfigError

RATE = "training.learning_rate"
BASE = "config: quickstart\nsteps: 10\n"


def sweep_of(text: str) -> SweepConfig:
    return SweepConfig.from_yaml(BASE + text)


def check(path: Path) -> None:
    sweep = load_sweep(path)
    check_trials(sweep, sweep.base())


def test_a_grid_has_every_combination() -> None:
    sweep = sweep_of(f"keys: {{{RATE}: [1e-4, 1e-3], model.num_layers: [1, 2, 3]}}")
    expected = [
        {RATE: rate, "model.num_layers": layers}
        for rate, layers in itertools.product([1e-4, 1e-3], [1, 2, 3])
    ]
    assert sweep.number_of_trials == 6
    past: list[TrialRecord] = []
    for number in range(1, 7):
        past.append(TrialRecord(number=number, settings=proposed(sweep, past)))
    assert [trial.settings for trial in past] == expected


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("keys: {training.lerning_rate: [1]}", 3, "keys.training.lerning_rate"),
        ("keys:\n  training.optimizer: [adamw, adamm]", 4, "keys.training.optimizer"),
        (f"keys:\n  {RATE}: [1e-3, fast]", 4, f"keys.{RATE}"),
        (f"keys: {{{RATE}: []}}", 3, "no values"),
        (f"keys: {{{RATE}: [1e-3, 2e-3, 1e-3]}}", 3, "a value twice"),
        ("keys: {training: {learning_rate: [1e-3]}}", 3, "write training.learning_rate:"),
        (f"keys: {{{RATE}: {{low: 1, high: 2}}}}", 3, "a grid has no values of a range"),
        (f"method: random\nkeys: {{{RATE}: [1]}}", 0, "the number of trials is missing"),
        (f"trials: 3\nkeys: {{{RATE}: [1]}}", 3, "all combinations"),
        (f"method: random\ntrials: 2\nkeys: {{{RATE}: {{low: 2, high: 1}}}}", 5, "range is empty"),
        (f"method: random\ntrials: 2\nkeys: {{{RATE}: {{low: 0, high: 1, log: true}}}}", 5, "log"),
        ("keys: {seed: [1, 2]}", 3, "write how many seeds"),
        ("keys: {training.total_steps: [1, 2]}", 3, "under `steps`"),
        (f"fixed: {{training: {{}}}}\nkeys: {{{RATE}: [1]}}", 0, "set"),
        (f"fixed: {{{RATE}: 1e-3}}\nkeys: {{{RATE}: [1e-3]}}", 0, "set the same value"),
        (f"sedes: 2\nkeys: {{{RATE}: [1e-3]}}", 3, "seeds"),
        (f"name: ../x\nkeys: {{{RATE}: [1e-3]}}", 3, "directory name"),
        (f"fixed: {{data.split: [1, 0, 0]}}\nkeys: {{{RATE}: [1e-3]}}", 3, "no validation text"),
    ],
)
def test_a_fault_is_refused_at_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(BASE + text)
    with pytest.raises(ConfigError) as caught:
        check(path)
    assert message in str(caught.value)
    assert caught.value.where.startswith(f"{path}:{line}" if line else str(path))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, math.nextafter(1, 0)])
@pytest.mark.parametrize(
    "values", [Range(low=1e-5, high=1e-2, log=True), Range(low=0.5, high=2), Range(low=2, high=9)]
)
def test_a_range_has_its_values(values: Range, share: float) -> None:
    value = values.at(share)
    assert values.low <= value <= values.high
    assert isinstance(value, int) == values.is_whole
    if values.log:
        assert value == pytest.approx(1e-5 * 1e3**share, rel=1e-5)


def test_random_settings_cover_a_range_and_follow_from_their_number() -> None:
    text = f"method: random\ntrials: 300\nkeys: {{{RATE}: {{low: 1e-4, high: 1e-2, log: true}}}}"
    draws = [at_random(sweep_of(text), number)[RATE] for number in range(1, 301)]
    assert draws == [at_random(sweep_of(text), number)[RATE] for number in range(1, 301)]
    assert len(set(draws)) > 290
    assert math.log10(statistics.median(draws)) == pytest.approx(-3, abs=0.2)
    assert draws[:3] != [at_random(sweep_of(f"seed: 1\n{text}"), n)[RATE] for n in (1, 2, 3)]


def test_optuna_proposes_the_same_after_the_same_trials_and_learns() -> None:
    pytest.importorskip("optuna")
    text = "method: optuna\ntrials: 40\nkeys: {training.learning_rate: {low: 0.0, high: 1.0},"
    sweep = sweep_of(text + " model.num_layers: [1, 2]}")
    past: list[TrialRecord] = []
    for number in range(1, 31):
        settings = proposed(sweep, past)
        assert settings == proposed(sweep, past)
        loss = (settings[RATE] - 0.3) ** 2 + settings["model.num_layers"]
        state: Any = ["complete", "pruned", "failed", "complete"][number % 4]
        run = RunRecord(seed=1, state=state, reason="", evaluations=[(5, loss)])
        past.append(TrialRecord(number=number, settings=settings, runs=[run]))
    late = [trial.settings for trial in past[20:]]
    assert statistics.fmean(abs(one[RATE] - 0.3) for one in late) < 0.2
    assert [one["model.num_layers"] for one in late].count(1) > 6


def test_limits_are_medians_of_earlier_trials() -> None:
    losses = [[5.0, 4.0], [3.0, None], [4.0, 1.0], [9.0]]
    past = [
        TrialRecord(
            number=number,
            settings={},
            runs=[
                RunRecord(
                    seed=1,
                    state="complete",
                    reason="",
                    evaluations=list(zip((10, 20), values, strict=False)),
                )
            ],
        )
        for number, values in enumerate(losses, 1)
    ]
    assert limits(Prune(trials=4), past, 100) == [[10, 4.5]]
    assert limits(Prune(trials=3), past, 100) == [[10, 4.5], [20, 4.0]]
    assert limits(Prune(trials=3, from_step=11), past, 100) == [[20, 4.0]]
    assert limits(Prune(trials=3), past, 20) == [[10, 4.5]]
