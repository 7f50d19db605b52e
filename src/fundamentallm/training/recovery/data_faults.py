"""When one rank cannot read its data, all ranks end the run at the same step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from fundamentallm.compute.distributed import Ranks
from fundamentallm.data.batch import Window
from fundamentallm.errors import DataError

_FIELDS = ("what", "where", "got", "expected", "fix")


class DataFaults:
    """Delays a rank's data error until all ranks have been told.

    If one rank left the loop, the others would wait for it in their next collective operation, and
    the run could not be saved. A single process raises its error at once.

    Args:
        ranks: the ranks of the run.

    Attributes:
        own: this rank's error; None while its data can be read.
        everyone_knows: whether all ranks have been told of the error.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.own: DataError | None = None
        self.everyone_knows = ranks.alone
        self._ranks = ranks

    def kept_from(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Return a loader that ends with an empty step batch where the other raises DataError."""
        return loader if self._ranks.alone else _Guarded(loader, self)

    def raise_everywhere(self) -> None:
        """Raise the error of the first rank that has one; every rank must call this.

        Raises:
            DataError: on all ranks, if any rank has one.
        """
        if self._ranks.alone or (source := self._ranks.first(self.own is not None)) is None:
            return
        fields = {name: getattr(self.own, name, "") for name in _FIELDS}
        received = json.loads(self._ranks.broadcast_text(json.dumps(fields), source))
        self.everyone_knows = True
        raise DataError(received.pop("what"), **received) from self.own


class _Guarded:
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
