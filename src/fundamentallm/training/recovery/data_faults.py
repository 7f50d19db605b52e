"""Data that one rank cannot read ends the run on all of them, at the same step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from fundamentallm.compute.distributed import Ranks
from fundamentallm.data.batch import Window
from fundamentallm.errors import DataError

_FIELDS = ("what", "where", "got", "expected", "fix")


class DataFaults:
    """Holds an error back until every rank has heard of it.

    A rank that left the loop by itself would strand the others in their next collective, and what
    all of them have done could not be saved. Alone, nothing is held back.

    Args:
        ranks: the ranks of the run.

    Attributes:
        own: this rank's error, None while its data can be read.
        everyone_knows: whether all ranks are told at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.own: DataError | None = None
        self.everyone_knows = ranks.alone
        self._ranks = ranks

    def kept_from(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Return a loader that yields a window of nothing, its last, in place of an error."""
        return loader if self._ranks.alone else _Kept(loader, self)

    def raise_everywhere(self) -> None:
        """Raise the error of the first rank that has one; every rank must call it.

        Raises:
            DataError: on all ranks, if there is one on any.
        """
        if self._ranks.alone or (source := self._ranks.first(self.own is not None)) is None:
            return
        fields = {name: getattr(self.own, name, "") for name in _FIELDS}
        said = json.loads(self._ranks.broadcast_text(json.dumps(fields), source))
        self.everyone_knows = True
        raise DataError(said.pop("what"), **said) from self.own


class _Kept:
    def __init__(self, loader: Iterable[Any], faults: DataFaults) -> None:
        self._loader = loader
        self._faults = faults

    def __iter__(self) -> Iterator[Any]:
        windows = iter(self._loader)
        while True:
            try:
                window = next(windows)
            except StopIteration:
                return
            except DataError as error:
                self._faults.own = error
                yield Window([], 0)
                return
            yield window
