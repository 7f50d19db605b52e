"""The next free name."""

from __future__ import annotations

import itertools
from pathlib import Path

from fundamentallm.files.names import numbered


def test_the_first_name_is_the_plain_one_and_the_others_count_from_two() -> None:
    names = itertools.islice(numbered(Path("runs/v1.2")), 3)
    assert [str(path) for path in names] == ["runs/v1.2", "runs/v1.2-2", "runs/v1.2-3"]


def test_a_suffix_stays_behind_the_number() -> None:
    names = itertools.islice(numbered(Path("a.tuned"), ".yaml"), 2)
    assert [str(path) for path in names] == ["a.tuned.yaml", "a.tuned-2.yaml"]
