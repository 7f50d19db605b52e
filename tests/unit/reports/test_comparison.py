"""Groups, their figures and the verdicts, against calculations made here."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.reports.comparison import Comparison, adjusted, compare, two_sided_p, welch
from fundamentallm.reports.curves import Curve
from fundamentallm.reports.forms import section, text_table, to_csv, to_json
from fundamentallm.reports.page import page
from fundamentallm.reports.run_data import RunData

LOSSES = {1e-3: [2.31, 2.35, 2.27], 3e-3: [2.11, 2.20, 2.02]}


def run_of(seed: int, losses: list[float], text: str = "a" * 64, **settings: Any) -> RunData:
    steps = list(range(1, len(losses) + 1))
    curve = Curve(steps, [64 * s for s in steps], [seed + s / 2 for s in steps], list(losses))
    speed = Curve(steps, [0] * len(steps), curve.seconds, [100.0 * seed + s for s in steps])
    name = f"run-{seed}-{settings}"
    return RunData(
        Path(name),
        name,
        "finished: done",
        config={"name": name, "seed": seed, "training": {"warmup": 5, **settings}},
        curves={"val/loss": curve, "train/tokens_per_second": speed},
        bytes_per_token=4.0,
        facts={"data SHA-256": text, "tokenizer SHA-256": "t"},
    )


@pytest.fixture
def comparison() -> Comparison:
    return compare(
        [
            run_of(seed, [3.0, loss, loss + 0.5], learning_rate=rate)
            for seed in range(3)
            for rate, losses in LOSSES.items()
            for loss in [losses[seed]]
        ]
    )


def test_runs_that_differ_in_the_seed_alone_are_one_row(comparison: Comparison) -> None:
    best, other = comparison.groups
    assert best.settings == {"training.learning_rate": 3e-3}
    assert other.settings == {"training.learning_rate": 1e-3}
    assert best.seeds == other.seeds == (0, 1, 2)
    for group, rate in ((best, 3e-3), (other, 1e-3)):
        losses = LOSSES[rate]
        mean = sum(losses) / 3
        spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 2)
        for figure, factor, shift in (
            ("best", 1.0, 0.0),
            ("last", 1.0, 0.5),
            ("bits_per_byte", 1 / math.log(2) / 4, 0.0),
        ):
            summary = group.summary(figure)
            assert summary is not None
            assert summary.mean == pytest.approx((mean + shift) * factor)
            assert summary.spread == pytest.approx(spread * factor)
            assert summary.count == 3
        seconds, speed = group.summary("seconds"), group.summary("speed")
        assert seconds is not None
        assert seconds.mean == pytest.approx(1 + 3 / 2)
        assert speed is not None
        assert speed.mean == pytest.approx(102)


def test_the_verdict_is_that_of_welchs_test(comparison: Comparison) -> None:
    (verdict,) = comparison.verdicts
    # By hand: variances 0.0016 and 0.0081, difference 0.2.
    error = math.sqrt((0.0016 + 0.0081) / 3)
    degrees = (0.0016 + 0.0081) ** 2 / ((0.0016**2 + 0.0081**2) / 2)
    assert verdict.difference == pytest.approx(0.2)
    assert verdict.t == pytest.approx(0.2 / error)
    assert verdict.degrees == pytest.approx(degrees)
    assert verdict.p == pytest.approx(integrated_p(0.2 / error, degrees), rel=1e-4)
    assert verdict.words == "a difference"


def integrated_p(t: float, degrees: float) -> float:
    """Return the two-sided p by Simpson's rule on the density of Student's t from 0 to |t|."""
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    scale = math.exp(log_scale) / math.sqrt(degrees * math.pi)
    count, width = 2000, abs(t) / 2000
    heights = [
        scale * (1 + (i * width) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(count + 1)
    ]
    inside = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    return 1 - 2 * inside * width / 3


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.0, 60.0])
def test_p_of_one_and_two_degrees_is_the_closed_form(t: float) -> None:
    assert two_sided_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-12)
    assert two_sided_p(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)


@pytest.mark.parametrize(("t", "degrees"), [(2.776445, 4), (2.228139, 10), (1.984, 99.0)])
def test_p_of_the_tables_is_5_percent(t: float, degrees: float) -> None:
    assert two_sided_p(t, degrees) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize(("t", "degrees"), [(0.5, 1.3), (2.5, 2.7), (3.0, 17.9)])
def test_p_of_fractional_degrees_is_the_integral(t: float, degrees: float) -> None:
    assert two_sided_p(t, degrees) == pytest.approx(integrated_p(t, degrees), rel=1e-5)


def test_losses_that_overlap_are_within_chance() -> None:
    runs = [run_of(s, [2 + 0.1 * s], learning_rate=1e-3) for s in range(3)]
    runs += [run_of(s, [2.05 + 0.1 * s], learning_rate=2e-3) for s in range(3)]
    (verdict,) = compare(runs).verdicts
    assert verdict.words == "within chance"


def test_one_seed_is_not_judged() -> None:
    runs = [run_of(0, [2.0], learning_rate=1e-3), run_of(0, [1.0], learning_rate=2e-3)]
    (verdict,) = compare(runs).verdicts
    assert verdict.p is None
    assert "two seeds" in verdict.words
    assert welch([1.0, 1.0], [2.0, 2.0]) is None


def test_several_runs_of_a_seed_are_one_sample() -> None:
    runs = [run_of(s, [3.0, 2.0 + 0.1 * s], learning_rate=1e-3) for s in range(2)]
    runs += [run_of(s, [3.0, 2.5 + 0.1 * s], learning_rate=2e-3) for s in range(2)]
    once = compare(runs)
    again = run_of(1, [3.0], learning_rate=2e-3)  # the same run, stopped earlier
    found = compare([again, *runs, runs[0], runs[0]])
    assert found.verdicts == once.verdicts
    assert not once.notes
    for group, other in zip(found.groups, once.groups, strict=True):
        assert sorted(group.figures["best"]) == sorted(other.figures["best"])
        assert len(group.figures["best"]) == 2
    assert [note.partition(":")[0] for note in found.notes] == [
        "group 1 has several runs of one seed",
        "group 2 has several runs of one seed",
    ]


def test_p_values_of_several_comparisons_are_holms() -> None:
    assert adjusted([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert adjusted([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert adjusted([]) == []


def test_losses_of_different_texts_are_not_judged() -> None:
    runs = [run_of(seed, [2.0 + seed], text) for seed in (0, 1) for text in ("a" * 64, "b" * 64)]
    found = compare(runs)
    assert len(found.groups) == 2
    assert not found.verdicts
    assert "different texts" in found.notes[0]


def test_a_run_without_a_checkpoint_is_among_those_of_its_configuration() -> None:
    runs = [run_of(seed, [2.0 + seed], learning_rate=1e-3) for seed in range(2)]
    dead = replace(run_of(2, [5.0], learning_rate=1e-3), facts={})
    (group,) = compare([*runs, dead]).groups
    assert group.seeds == (0, 1, 2)
    silent = compare([*runs, replace(dead, curves={})])
    assert text_table(silent).splitlines()[1].split()[:6] == [
        "1",
        "2",
        "of",
        "3",
        "2.5000",
        "\u00b1",
    ]
    other = run_of(3, [2.0], "b" * 64, learning_rate=1e-3)
    assert len(compare([*runs, dead, other]).groups) == 3  # of which text it was is not known


def test_all_forms_have_the_same_numbers(comparison: Comparison) -> None:
    made = json.loads(json.dumps(to_json(comparison), allow_nan=False))
    figures = made["groups"][0]["figures"]
    row, _ = csv.DictReader(io.StringIO(to_csv(comparison)))
    for name in ("best", "last", "bits_per_byte", "speed", "seconds"):
        summary = comparison.groups[0].summary(name)
        assert summary is not None
        for part in ("mean", "spread", "count"):
            assert figures[name][part] == getattr(summary, part) == float(row[f"{name}_{part}"])
    assert row["training.learning_rate"] == "0.003"
    text = text_table(comparison)
    assert "2.1100 \u00b1 0.0900" in text
    assert "group 2 against group 1: +0.2000 nats per token, a difference" in text
    shown = page([run for group in comparison.groups for run in group.runs], section(comparison))
    assert "2.1100 \u00b1 0.0900" in shown.decode()
