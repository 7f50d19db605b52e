"""A save under way, in a thread or not, and how it ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from fundamentallm.training.checkpoint.catalogue import Entry


class BackgroundSave:
    """One save, in this thread or in one of its own, and how it ended.

    Args:
        entry: its entry in the catalogue while it is being written.
        replaced: the earlier entry of its step, which returns if the save fails.
        best_before: best score and step, which return if the save fails.
        best_step: the step of the best checkpoint when the save began.

    Attributes:
        committed: whether the checkpoint is on the disk; a later failure loses nothing.
        pruned: the names of the checkpoints that were deleted for it.
    """

    def __init__(
        self,
        entry: Entry,
        replaced: Entry | None,
        best_before: tuple[float, int | None],
        best_step: int | None,
    ) -> None:
        self.step, self.name = entry.step, entry.name
        self.entry = entry
        self.replaced = replaced
        self.best_before = best_before
        self.best_step = best_step
        self.committed = False
        self.pruned: Sequence[str] = ()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], None]) -> None:
        """Do the work in this thread and keep its error."""
        try:
            work()
        except Exception as error:  # the caller of `wait` raises it
            self._failure = error

    def fail(self, error: Exception) -> None:
        """End the save with an error before it begins."""
        self._failure = error

    def start(self, work: Callable[[], None]) -> None:
        """Do the work in a thread of its own."""
        self._thread = threading.Thread(target=self.run, args=(work,), name=f"save-{self.step}")
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the checkpoint is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> Exception | None:
        """Wait for the end; return the error, None if the checkpoint is committed."""
        self.join()
        return self._failure

    @property
    def is_lost(self) -> bool:
        """Whether nothing was committed, once it has ended."""
        return self.wait() is not None and not self.committed
