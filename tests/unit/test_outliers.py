"""The robust window against numpy's median, and what it refuses to learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.training.recovery.outliers import NORMAL_MAD, RobustWindow

VALUES = st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=4, max_size=60)


@given(VALUES, st.floats(-1e6, 1e6), st.integers(4, 20))
def test_the_score_is_the_distance_from_the_median_in_scaled_mads(values, new, size):
    window = RobustWindow(size, needed=4, floor=0.1)
    for value in values:
        window.extend([value])
    known = np.array(values[-size:])
    median = np.median(known)
    scale = np.median(np.abs(known - median)) / NORMAL_MAD
    expected = (new - median) / max(scale, 0.1 * abs(median), 1e-12)
    assert window.score(new) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    for threshold in (0.5, 3.0, 10.0):
        limit = window.limit(threshold)
        assert window.score(limit) == pytest.approx(threshold, rel=1e-6)


def test_a_normal_sample_has_a_scale_of_one():
    window = RobustWindow(5000, needed=5000)
    window.extend(np.random.default_rng(0).normal(0.0, 1.0, 5000).tolist())
    assert window.score(3.0) == pytest.approx(3.0, rel=0.1)


def test_nothing_stands_out_before_there_are_enough_values():
    window = RobustWindow(8, needed=4)
    for _ in range(3):
        window.extend([1.0])
        assert window.score(1e9) == 0.0
    window.extend([1.0])
    assert window.score(1e9) > 1e6


def test_an_early_scale_measures_by_the_median_alone():
    window = RobustWindow(8, needed=4, early=0.1)
    assert window.score(99.0) == 0.0
    for value in (2.0, 4.0):
        window.extend([value])
    assert window.score(6.0) == pytest.approx(10.0)


def test_what_is_not_finite_stands_out_and_never_enters():
    window = RobustWindow(8, needed=4)
    for value in (1.0, math.nan, 1.0, math.inf, 1.0, -math.inf, 1.0):
        window.extend([value])
    assert len(window) == 4
    assert window.score(math.nan) == window.score(math.inf) == math.inf
    assert window.score(-math.inf) == 0.0


def test_the_documented_defaults():
    window = RobustWindow()
    assert math.isnan(window.median)
    window.extend([100.0] * 31)
    assert window.score(1e9) == 0.0
    assert window.limit(1.0) == math.inf
    window.extend([100.0])
    assert window.limit(1.0) == 102.0
    window.extend([100.0] * 100)
    assert len(window) == 128
    still = RobustWindow()
    still.extend([0.0] * 32)
    assert still.limit(1.0) == 1e-12


def test_an_early_scale_is_never_zero():
    window = RobustWindow(8, needed=4, early=0.1, smallest=0.5)
    window.extend([0.0])
    assert window.score(1.0) == 2.0


def test_a_cleared_window_knows_nothing():
    window = RobustWindow(8, needed=2)
    window.extend([1.0, 2.0])
    window.clear()
    assert len(window) == 0
    assert window.score(9.0) == 0.0
    assert window.limit(1.0) == math.inf
    assert math.isnan(window.median)


def test_almost_half_of_the_window_may_be_wild():
    window = RobustWindow(21, needed=4)
    for index in range(21):
        window.extend([1e9 if index % 2 else 1.0 + index * 1e-3])
    assert abs(window.score(1.0)) < 3.0
    assert window.score(50.0) > 100.0


def test_a_saved_window_goes_on_as_if_nothing_had_been():
    values = [float(v) for v in np.random.default_rng(1).normal(2.0, 1.0, 50)]
    one = RobustWindow(16, needed=4)
    for value in values[:30]:
        one.extend([value])
    other = RobustWindow(16, needed=4)
    other.extend([99.0])
    other.load_state_dict(one.state_dict())
    for value in values[30:]:
        assert one.score(value) == other.score(value)
        one.extend([value])
        other.extend([value])
    assert one.state_dict() == other.state_dict()


def test_loaded_values_replace_the_known_ones():
    window = RobustWindow(8, needed=2)
    window.extend([50.0] * 8)
    window.load_state_dict({"values": [1.0, 3.0]})
    assert window.state_dict() == {"values": [1.0, 3.0]}
    assert window.median == 2.0
    assert RobustWindow(2, needed=2).needed == 2  # the smallest there is


@pytest.mark.parametrize(("size", "needed"), [(1, 1), (8, 9), (8, 1)])
def test_a_window_that_cannot_have_a_median_is_refused(size, needed):
    with pytest.raises(ValueError, match="needed"):
        RobustWindow(size, needed)
