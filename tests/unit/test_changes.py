"""Records of changes in a manifest count where they say what they must."""

from __future__ import annotations

from typing import Any

import pytest

from fundamentallm.training.checkpoint.changes import CHANGES, records_in
from fundamentallm.training.checkpoint.manifest import Manifest

RECORD = {
    "step": 4,
    "differences": [["data.batch_size", 2, 3]],
    "tokens": 128,
    "epochs": [6, [[3, 1], [9, 2, 5]]],
    "rows": [2, 3],
}


def read(record: dict[str, Any]) -> list[Any]:
    return list(records_in(Manifest("x", 0, {}, {CHANGES: [record]}, "")))


def test_a_record_with_the_rows_of_a_step_counts():
    assert read(RECORD) == [RECORD]


@pytest.mark.parametrize(
    "fault",
    [
        {"rows": [2]},
        {"rows": [2, 0]},
        {"rows": [2, 3.0]},
        {"tokens": -1},
        {"epochs": [0, []]},
        {"epochs": [6, [[3]]]},
        {"epochs": [6, [[1, 2, 3, 4]]]},
        {"epochs": 6},
    ],
    ids=str,
)
def test_one_with_rows_that_are_none_does_not(fault):
    assert read({**RECORD, **fault}) == []
