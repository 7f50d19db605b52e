"""What Ignite's handlers that are attached to a trainer need of it while it runs.

Some set the learning rate, and those with a state must not lose it to events that fire again where
a run is resumed or has rolled back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ignite.engine import Events
from ignite.handlers import StateParamScheduler
from torch.optim import Optimizer

from fundamentallm.training import foreign
from fundamentallm.training.dispatch import Dispatcher

logger = logging.getLogger(__name__)


class IgniteHandlers:
    """Ignite's handlers on an engine.

    Args:
        engine: the training engine.
        optimizer: the one that it steps.

    Attributes:
        rate_setters: its schedulers for the learning rates of that optimizer.
        owes_epoch_end: whether the restored state, if it is that of an epoch's end, was saved
            before the handlers of EPOCH_COMPLETED.
    """

    def __init__(self, engine: Dispatcher, optimizer: Optimizer) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.rate_setters: list[Any] = []
        self.owes_epoch_end = False
        self._heard_epoch_end_at = -1
        self._states: list[tuple[Any, dict[str, Any]]] = []
        self._groups: list[dict[str, Any]] = []

    def admit(self, owner: Any) -> None:
        """Let a handler that is attached set the learning rate, if it is a scheduler for it."""
        if foreign.sets_rate(owner, self.optimizer) and owner not in self.rate_setters:
            self.rate_setters.append(owner)
            logger.info("%s of Ignite sets the learning rate", type(owner).__name__)

    def release(self, owner: Any) -> None:
        """Forget a handler that is removed."""
        self.rate_setters = [known for known in self.rate_setters if known is not owner]

    @contextmanager
    def rates_times(self, factor: float) -> Iterator[float]:
        """Lower the rates that they have set for one step; yield the first group's.

        They may compute the next rates from their own, so those are put back.
        """
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * factor
            yield float(groups[0]["lr"])
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    # ------------------------------------------------------------------ states

    def carry(self) -> None:
        """Keep their states and the optimizer's options over the events that begin a run.

        STARTED fires again when a run is resumed or has rolled back, and EPOCH_STARTED too where
        that is inside an epoch.
        """
        self._states = []
        if self.engine.state.iteration == 0:
            return
        handlers = [owner for owner in self.engine.attached.values() if foreign.is_foreign(owner)]
        if handlers:
            self._states = [(owner, foreign.state_of(owner)) for owner in handlers]
            self._groups = [
                {key: value for key, value in group.items() if key != "params"}
                for group in self.optimizer.param_groups
            ]

    def undo_resets(self) -> None:
        """Put back what is carried."""
        for owner, state in self._states:
            foreign.load_state(owner, state)
            if isinstance(owner, StateParamScheduler) and owner.event_index > 0:
                setattr(self.engine.state, owner.param_name, owner.get_param())
        if self._states:
            for group, options in zip(self.optimizer.param_groups, self._groups, strict=True):
                group.update(options)

    def begin_epoch(self, is_inside: bool) -> None:
        """Put it back once more if the run goes on inside an epoch; then it is carried no more."""
        if is_inside:
            self.undo_resets()
        self._states = []

    # ------------------------------------------------------------------ ends of epochs

    @property
    def hear_epoch_end(self) -> bool:
        """Whether one whose state a checkpoint holds listens at EPOCH_COMPLETED."""
        handlers = self.engine._event_handlers[Events.EPOCH_COMPLETED]
        return any(foreign.is_carried(entry[0]) for entry in handlers)

    def note_epoch_end(self, step: int) -> None:
        """Note that the handlers of EPOCH_COMPLETED were called with a step."""
        if self.hear_epoch_end:
            self._heard_epoch_end_at = step

    def have_heard_epoch_end(self, step: int) -> bool:
        """Whether the end of the epoch that a step ends was heard."""
        return self._heard_epoch_end_at == step
