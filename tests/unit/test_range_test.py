"""The learning-rate range test: its curve on formulas, its steps against steps by hand."""

from __future__ import annotations

import itertools
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fundamentallm.config import load_config
from fundamentallm.engine.cli import main
from fundamentallm.engine.tuning.curve import Curve
from fundamentallm.engine.tuning.range_test import (
    HIGHEST,
    LOWEST,
    bare_trainer,
    geometric,
    range_test,
)
from fundamentallm.engine.wiring.assemble import check_names, open_machine
from fundamentallm.training.step import StepOutput

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny   # a small one
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2}
training:
  learning_rate: 0.2  # a guess
  total_steps: 12
handlers: {tensorboard: false}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG)
    return tmp_path


def fall(rate: float) -> float:
    """A loss that falls from 4 to 2 between 1e-4 and 1e-2, stays, and rises from 1 on."""
    share = min(1.0, max(0.0, (math.log10(rate) + 4) / 2))
    return 4 - 2 * share + 3 * max(0.0, math.log10(rate))


RATES = geometric(1e-6, 10.0, 141)


def test_rates_rise_by_one_factor_from_end_to_end() -> None:
    assert RATES[0] == 1e-6
    assert RATES[-1] == pytest.approx(10.0)
    factors = [b / a for a, b in itertools.pairwise(RATES)]
    assert factors == pytest.approx([10 ** (1 / 20)] * 140)
    assert geometric(3.0, 5.0, 1) == [3.0]


def test_the_suggestion_is_where_three_quarters_of_the_fall_are_done() -> None:
    curve = Curve(RATES, [fall(rate) for rate in RATES])
    # 2.5 of 4 to 2, which a straight line in log(rate) meets at 10 ** -2.5.
    assert curve.suggestion() == pytest.approx(10**-2.5, rel=0.15)


def test_noise_on_a_flat_floor_does_not_move_it() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        noise = 0.05 * torch.randn(len(RATES))
        curve = Curve(RATES, [fall(r) + float(n) for r, n in zip(RATES, noise, strict=True)])
        assert curve.suggestion() == pytest.approx(10**-2.5, rel=0.5)


def test_losses_that_only_scatter_or_rise_suggest_nothing() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        flat = (4 + 0.1 * torch.randn(141)).tolist()
        assert Curve(RATES, flat).suggestion() is None
    assert Curve(RATES, [4 + rate for rate in RATES]).suggestion() is None
    assert Curve([1.0], [4.0]).suggestion() is None


def test_smoothing_is_centred_and_keeps_a_straight_line() -> None:
    line = [float(n) for n in range(100)]
    smooth = Curve(line, line).smoothed()
    assert smooth[2:-2] == pytest.approx(line[2:-2])
    assert smooth[0] == pytest.approx(1.0)  # the mean of 0, 1, 2


def test_the_drawing_marks_the_suggestion_once() -> None:
    curve = Curve(RATES, [fall(rate) for rate in RATES])
    rows = curve.text(3e-3).splitlines()
    assert len(rows) <= 26
    (marked,) = [row for row in rows if "<-" in row]
    assert marked.endswith("<- 3.0e-03")
    rate = float(marked.split()[0])
    assert rate <= 3e-3 < 3 * rate
    lengths = [row.count("#") for row in rows[1:]]
    assert (min(lengths), max(lengths)) == (1, 48)


def test_its_steps_are_the_runs_own_at_each_rate() -> None:
    config = load_config("tiny.yaml")
    check_names(config)
    machine = open_machine(config)
    curve = range_test(config, machine, 24)
    assert curve.rates == pytest.approx(geometric(LOWEST, HIGHEST, 24)[: len(curve.losses)])

    by_hand = bare_trainer(config, machine, [])
    losses = []
    for step in range(8):
        for group in by_hand.optimizer.param_groups:
            group["lr"] = curve.rates[step]
        output = by_hand._train_step(by_hand.train_loader.window_at(0, step))
        assert isinstance(output, StepOutput)
        losses.append(output.loss)
    assert curve.losses[:8] == losses
    assert not Path("runs").exists()


def test_it_ends_where_the_loss_diverges() -> None:
    config = load_config("tiny.yaml")
    curve = range_test(config, open_machine(config), 60)
    assert 20 < len(curve.losses) < 60
    assert curve.losses[-1] > 2 * min(curve.losses)


def test_the_suggestion_is_written_into_a_copy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "tiny.yaml", "--learning-rate", "--steps", "60"]) == 0
    config = load_config("tiny.tuned.yaml")
    assert 1e-3 < config.training.learning_rate < 0.1
    assert "# a guess" in Path("tiny.tuned.yaml").read_text()
    assert Path("tiny.yaml").read_text() == CONFIG
    told = capsys.readouterr().out
    assert f"training.learning_rate: {config.training.learning_rate:g} (the file has 0.2)" in told
    assert "run tiny.tuned.yaml" in told


def test_the_picture_is_a_png(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'notebooks' is not installed")
    curve = Curve(RATES, [fall(rate) for rate in RATES])
    assert curve.png(3e-3).startswith(b"\x89PNG")


@pytest.mark.long
def test_without_matplotlib_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["tune", "tiny.yaml", "--learning-rate", "--steps", "60"]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not Path("tiny.tuned.png").exists()
    assert Path("tiny.tuned.yaml").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "30"], "--learning-rate"),
        (["--learning-rate", "--keep", "compile"], "no effect"),
        (["--learning-rate", "--steps", "5"], "at least 20"),
        (["--learning-rate", "--seconds", "-1"], "above 0"),
    ],
)
def test_options_that_do_nothing_are_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "tiny.yaml", *words]) == 2
    assert told in capsys.readouterr().err
