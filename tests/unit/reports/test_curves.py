"""Which values of a curve are drawn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.reports.curves import MAX_VALUES, Curve, drawn

VALUES = st.lists(
    st.floats(-10, 10).map(lambda x: round(x, 1)) | st.sampled_from(["NaN", "Infinity"]),
    min_size=1,
    max_size=200,
)


def curve_of(values: list[float | str]) -> Curve:
    count = len(values)
    steps = list(range(10, 10 * count + 1, 10))
    return Curve(steps, [x * 100 for x in steps], [x / 4 for x in steps], values)


def test_as_many_values_as_are_drawn_stay_exact() -> None:
    curve = curve_of([i * 0.1 for i in range(MAX_VALUES)])
    shown = drawn(curve)
    assert shown == {
        "step": curve.steps,
        "tokens": curve.tokens,
        "seconds": curve.seconds,
        "value": curve.values,
    }


def test_one_more_is_binned() -> None:
    curve = curve_of([(i * 7919 % 4001) * 0.1 for i in range(MAX_VALUES + 1)])
    shown = drawn(curve)
    assert sum(count for _, _, count in shown["bins"]) == MAX_VALUES + 1
    assert len(shown["step"]) <= MAX_VALUES


@given(VALUES, st.sets(st.integers(1, 200)), st.integers(5, 50))
def test_bins_have_their_extremes_and_what_matters_is_exact(
    values: list[float | str], numbers: set[int], limit: int
) -> None:
    curve = curve_of(values)
    steps_of_incidents = {10 * number for number in numbers}
    shown = drawn(curve, steps_of_incidents, limit)
    at = dict(zip(shown["step"], shown["value"], strict=True))
    assert shown["step"] == sorted(at)
    whole = dict(zip(curve.steps, curve.values, strict=True))
    assert at.items() <= whole.items()
    for step in (10, curve.steps[-1], *(steps_of_incidents & whole.keys())):
        assert at[step] == whole[step]
    if len(values) <= limit:
        assert at == whole
        assert "bins" not in shown
        return
    assert len(at) <= limit + len(steps_of_incidents)
    covered: list[int] = []
    for first, last, count in shown["bins"]:
        inside = [step for step in curve.steps if first <= step <= last]
        assert len(inside) == count
        covered += inside
        numbers_inside = [whole[step] for step in inside if not isinstance(whole[step], str)]
        drawn_inside = [value for step, value in at.items() if first <= step <= last]
        finite = [value for value in drawn_inside if not isinstance(value, str)]
        assert (len(drawn_inside) > len(finite)) == (count > len(numbers_inside))
        if numbers_inside:
            assert (min(finite), max(finite)) == (min(numbers_inside), max(numbers_inside))
    assert covered == curve.steps
