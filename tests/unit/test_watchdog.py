"""Who stands still, from what the ranks have told; with processes: test_stalls.py."""

from __future__ import annotations

import pytest

from fundamentallm.compute.watchdog import Sighting, stalled

STEP, SAVE = 10.0, 100.0


def seen(heard: float, moved: float, collectives: int = 7, **report: object) -> Sighting:
    report = {"patient": False, "left": False, "collectives": collectives, **report}
    return Sighting(heard, moved, report)


@pytest.mark.parametrize(
    ("sightings", "named", "since"),
    [
        # Everybody goes on.
        ([seen(99, 95), seen(99, 95)], [], 100),
        # Rank 1 is stopped; rank 0 waits for it and is not blamed.
        ([seen(99, 80, 8), seen(85, 80)], [1], 85),
        # So in a save too: a slow disk stops no thread.
        ([seen(99, 80, 8, patient=True), seen(85, 80, patient=True)], [1], 85),
        # Rank 1 lives and hangs before a collective that rank 0 has begun.
        ([seen(99, 80, 8), seen(99, 81, 7)], [1], 81),
        # Both hang in the same one.
        ([seen(99, 80), seen(99, 81)], [0, 1], 81),
        # Rank 0 writes a checkpoint, and rank 1 waits for it there.
        ([seen(99, 20, patient=True), seen(99, 20, 8, patient=True)], [], 100),
        ([seen(99, -1, patient=True), seen(99, -1, 8, patient=True)], [0], -1),
        # Rank 1 is through with the run.
        ([seen(99, 95), seen(10, 10, left=True)], [], 100),
    ],
)
def test_who_stands_still(sightings, named, since):
    found, began, _ = stalled(sightings, 100, STEP, SAVE)
    assert (found, began) == (named, since)


def test_a_report_that_repeats_itself_is_no_sign_of_life():
    one = Sighting(0, 0)
    report = {"entered": 3, "collectives": 5, "beat": 1}
    one.see(report, 1)
    one.see(dict(report), 2)
    assert (one.heard, one.moved) == (1, 1)
    one.see({**report, "beat": 2}, 3)
    assert (one.heard, one.moved) == (3, 1)
    one.see({**report, "beat": 3, "collectives": 6}, 4)
    assert (one.heard, one.moved) == (4, 4)
