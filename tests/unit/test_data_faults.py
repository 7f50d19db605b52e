"""A rank's data error reaches all ranks at the same step; a single process raises it at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fundamentallm.compute.distributed import Ranks
from fundamentallm.data.batch import Window
from fundamentallm.errors import DataError
from fundamentallm.training.recovery.data_faults import DataFaults

FIELDS = {"what": "a file is cut off", "where": "shard 3", "got": "7", "expected": "9", "fix": "f"}
WINDOWS = [Window([], 1), Window([], 2)]


class Group:
    """What ranks share: what the others have said.

    Attributes:
        others: ranks with an error, besides this one.
        text: the last text that was sent; a rank without an error receives it.
    """

    def __init__(self) -> None:
        self.others: list[int] = []
        self.text = ""


class Rank:
    """One rank of two that are asked one after the other."""

    alone = False

    def __init__(self, rank: int, group: Group) -> None:
        self.rank, self.group = rank, group

    def first(self, condition: bool) -> int | None:
        return min([*self.group.others, *([self.rank] if condition else [])], default=None)

    def broadcast_text(self, text: str, source: int) -> str:
        if source == self.rank:
            self.group.text = text
        return self.group.text


def faulty(error: Exception) -> Iterator[Any]:
    yield from WINDOWS
    raise error


def test_a_single_process_reads_its_loader_and_raises_at_once():
    faults, loader = DataFaults(Ranks()), [1]
    assert faults.kept_from(loader) is loader
    assert faults.everyone_knows
    with pytest.raises(DataError, match="cut off"):
        list(faults.kept_from(faulty(DataError(FIELDS["what"]))))
    faults.own = DataError("kept by nobody")
    faults.raise_everywhere()


def test_the_error_of_one_rank_is_that_of_both():
    group = Group()
    here, there = (DataFaults(Rank(rank, group)) for rank in (1, 0))  # type: ignore[arg-type]
    error = DataError(**FIELDS)
    assert list(there.kept_from(WINDOWS)) == WINDOWS
    here.raise_everywhere()  # nothing has happened
    assert (here.own, here.everyone_knows) == (None, False)

    assert list(here.kept_from(faulty(error))) == [*WINDOWS, Window([], 0)]
    assert here.own is error
    assert not here.everyone_knows
    with pytest.raises(DataError) as raised:
        here.raise_everywhere()
    group.others = [1]
    with pytest.raises(DataError) as received:
        there.raise_everywhere()
    for one in (raised.value, received.value):
        assert {name: getattr(one, name) for name in FIELDS} == FIELDS
    assert here.everyone_knows
    assert there.everyone_knows
    assert (raised.value.__cause__, received.value.__cause__) == (error, None)


def test_another_error_is_not_kept():
    faults = DataFaults(Rank(0, Group()))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="no disk"):
        list(faults.kept_from(faulty(OSError("no disk"))))
    assert faults.own is None
