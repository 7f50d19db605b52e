"""How a training engine fires its events, and which handlers listen."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from ignite.engine import Engine, Events, EventsList
from ignite.engine.events import RemovableEventHandle

from fundamentallm.events import LOOP, TrainingEvents
from fundamentallm.registry import registered_name
from fundamentallm.training.foreign import has_state, is_foreign, owner_of

# Ignite logs each error that it passes on; the code that catches the error reports it.
logging.getLogger("ignite").addHandler(logging.NullHandler())


class Dispatcher(Engine):
    """An Ignite engine with the events of `events.py`.

    Args:
        process_function: as for Ignite's `Engine`.

    Attributes:
        attached: the stateful handlers by name; a checkpoint holds the state of each.
    """

    def __init__(self, process_function: Callable[[Engine, Any], Any]) -> None:
        super().__init__(process_function)
        self.register_events(
            *TrainingEvents, event_to_attr={event: event.counter for event in TrainingEvents}
        )
        self.attached: dict[str, Any] = {}
        # Compared by identity: the hash of an Ignite event is a function in Python.
        self._last_handlers: list[tuple[Events, Callable[[], None]]] = []

    def notify(self, event: TrainingEvents) -> None:
        """Count the event and fire it if anyone listens."""
        if event.counts:
            setattr(self.state, event.counter, getattr(self.state, event.counter) + 1)
        handlers = self._event_handlers[event]
        if not handlers:
            return
        if self.logger.isEnabledFor(logging.DEBUG):
            self._fire_event(event)
        else:
            self._call(event, handlers)

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        """Fire as Ignite does, without formatting an unused debug line; then call the last handler.

        With cold caches, after a step of 10 ms, that line costs 45 microseconds an event.
        """
        if event_args or event_kwargs or self.logger.isEnabledFor(logging.DEBUG):
            super()._fire_event(event_name, *event_args, **event_kwargs)
        else:
            self._call(event_name, self._event_handlers[event_name])
        for event, handler in self._last_handlers:
            if event is event_name:
                handler()

    def _call(self, event: Any, handlers: list[Any]) -> None:
        self.last_event_name = event
        for handler, args, options in handlers:
            if args and isinstance(args[0], weakref.ref):  # of the engine, if it is wanted
                handler(args[0](), *args[1:], **options)
            else:
                handler(*args, **options)

    def keep_last(self, event: Events, handler: Callable[[], None]) -> None:
        """Call an internal handler behind all others of its event.

        It is not among the engine's handlers, which others count, time and list.
        """
        self._last_handlers.append((event, handler))

    def add_event_handler(
        self, event_name: Any, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Attach a handler, as Ignite does; add its owner's state.

        Raises:
            ConfigError: it is one of Ignite's that could not do here what it does elsewhere.
        """
        owner = owner_of(handler)
        if owner is not self and is_foreign(owner) and not isinstance(event_name, EventsList):
            self.receive(owner, handler, event_name)
        self.admit(handler)
        return super().add_event_handler(event_name, handler, *args, **kwargs)

    def receive(self, owner: Any, handler: Callable[..., Any], event_name: Any) -> None:
        """Check one of Ignite's handlers before it is attached."""

    def remove_event_handler(self, handler: Callable[..., Any], event_name: Any) -> None:
        """Remove a handler, as Ignite does; forget one of Ignite's with its last method."""
        super().remove_event_handler(handler, event_name)
        owner = owner_of(handler)
        if is_foreign(owner) and not any(
            owner_of(entry[0]) is owner
            for entries in self._event_handlers.values()
            for entry in entries
        ):
            self.release(owner)

    def release(self, owner: Any) -> None:
        """Forget one of Ignite's handlers."""
        self.attached = {name: known for name, known in self.attached.items() if known is not owner}

    def admit(self, handler: Callable[..., Any]) -> None:
        """Make the state of a handler's owner, if it has one, a part of every checkpoint.

        Raises:
            ValueError: an owner of the same name is part of it already.
        """
        owner = owner_of(handler)
        if owner is self or not has_state(owner):
            return
        if any(known is owner for known in self.attached.values()):
            return
        base = name = registered_name(type(owner)) or type(owner).__name__
        if is_foreign(owner):  # one class serves many metrics: they are told apart by their order
            number = 1
            while name in self.attached:
                number += 1
                name = f"{base} {number}"
        if name in self.attached:
            raise ValueError(
                f"a handler named '{name}' is attached already, and a checkpoint could not"
                " distinguish the two; attach only one, or give one a different class"
            )
        self.attached[name] = owner

    def has_role(self, role: str) -> bool:
        """Return whether a handler with this attribute `role` is attached."""
        return bool(self.owners_of_role(role))

    def owners_of_role(self, role: str) -> list[Any]:
        """Return the attached handlers with this attribute `role`, one for each method."""
        owners = (
            owner_of(handler)
            for entries in self._event_handlers.values()
            for handler, _, _ in entries
        )
        return [owner for owner in owners if getattr(owner, "role", None) == role]


def timeline(engine: Engine) -> list[tuple[str, list[str]]]:
    """Return the events that have handlers, in the order of the loop, and their handlers."""
    entries = []
    for event in LOOP:
        names = [
            _handler_name(handler)
            for handler, _, _ in engine._event_handlers[event]
            if getattr(handler, "__self__", None) is not engine
        ]
        if names:
            entries.append((event.name, names))
    return entries


def _handler_name(handler: Any) -> str:
    """Return the registered or class name of a handler's owner, else the function's name."""
    while isinstance(handler, partial):
        handler = handler.func
    owner = owner_of(handler)
    name = registered_name(type(owner)) or getattr(owner, "__name__", type(owner).__name__)
    return str(name)


def caller_name(frame: FrameType) -> str:
    """Return the name of the handler whose method runs in a frame, else the function's place."""
    if (owner := frame.f_locals.get("self")) is not None:
        return registered_name(type(owner)) or type(owner).__name__
    code = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}, line {frame.f_lineno})"
