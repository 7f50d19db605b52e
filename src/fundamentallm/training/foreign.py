"""Handlers of Ignite on this package's engine: what is refused, and what a checkpoint holds.

A handler of Ignite means here what it means on a plain engine, or it is refused when it is
attached, with the reason and the way to do it here. `docs/ignite.md` has the table.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from ignite.engine import Engine
from ignite.handlers import (
    BatchSizeScheduler,
    Checkpoint,
    EMAHandler,
    FastaiLRFinder,
    LRScheduler,
    ParamGroupScheduler,
    ParamScheduler,
)
from ignite.handlers.lr_finder import _ExponentialLR
from ignite.metrics import Frequency, GpuInfo, Metric, MetricGroup, MetricsLambda
from torch.optim import Optimizer

from fundamentallm.errors import ConfigError
from fundamentallm.registry import registered_name

# Where the trace of Ignite's wrapper leaves torch's, it does so in the first updates or at the end
# of a phase. More updates are not simulated.
MOST_UPDATES = 2_000

# What does the same here as a scheduler of torch.
_SCHEDULES = {
    "ChainedScheduler": "a schedule with warmup_steps",
    "ConstantLR": "linear_warmup",
    "CosineAnnealingLR": "cosine",
    "CosineAnnealingWarmRestarts": "cosine, or Ignite's CosineAnnealingScheduler with restarts",
    "ExponentialLR": "exponential",
    "LinearLR": "linear_warmup, or linear with min_lr",
    "PolynomialLR": "linear",
    "ReduceLROnPlateau": "Ignite's ReduceLROnPlateauScheduler",
    "SequentialLR": "a schedule with warmup_steps",
}


def owner_of(handler: Any) -> Any:
    """Return the object whose method a handler is, else the function itself."""
    if not hasattr(handler, "__self__"):
        handler = getattr(handler, "__wrapped__", handler)  # inside an event filter
    return getattr(handler, "__self__", handler)


def is_foreign(owner: Any) -> bool:
    """Whether this is an object of one of Ignite's classes, or of a class derived from one."""
    return registered_name(type(owner)) is None and any(
        base.__module__.startswith("ignite.") for base in type(owner).__mro__
    )


def has_state(owner: Any) -> bool:
    """Whether a checkpoint holds an object's state.

    What Ignite's `Checkpoint` has saved is a fact of its directory, not of the run, and an
    evaluator begins again with each of its runs.
    """
    if is_foreign(owner) and isinstance(owner, Checkpoint | Engine):
        return False
    return isinstance(owner, EMAHandler) or (
        hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict")
    )


def is_carried(handler: Any) -> bool:
    """Whether a handler belongs to an object of Ignite's whose state a checkpoint holds."""
    owner = owner_of(handler)
    return is_foreign(owner) and has_state(owner)


def state_of(owner: Any) -> dict[str, Any]:
    """Return the state of an object that `has_state`, without the functions in it."""
    if isinstance(owner, EMAHandler):
        return {"ema_model": owner.ema_model.state_dict()}
    state: dict[str, Any] = owner.state_dict()
    return _without_functions(state) if is_foreign(owner) else state


def load_state(owner: Any, state: Mapping[str, Any]) -> None:
    """Put such an object into a state; its functions stay."""
    if isinstance(owner, EMAHandler):
        owner.ema_model.load_state_dict(state["ema_model"])
    elif is_foreign(owner):
        owner.load_state_dict(_with_functions(state, owner.state_dict()))
    else:
        owner.load_state_dict(state)


def sets_rate(owner: Any, optimizer: Optimizer) -> bool:
    """Whether this is a scheduler of Ignite for the learning rates of an optimizer."""
    if not is_foreign(owner) or not isinstance(owner, ParamScheduler | ParamGroupScheduler):
        return False
    names = owner.param_name if isinstance(owner.param_name, list) else [owner.param_name]
    optimizers = owner.optimizer if isinstance(owner.optimizer, list) else [owner.optimizer]
    return any(
        name == "lr" and its is optimizer for name, its in zip(names, optimizers, strict=True)
    )


# ------------------------------------------------------------------ refusals


def check(handler: Callable[..., Any], event: Any, updates: int, probe: Any, saves: bool) -> None:
    """Refuse a handler of Ignite that would not do here what it does on a plain engine.

    Args:
        handler: as it is attached.
        event: the event that it is attached to.
        updates: how often the event fires in the run, at most.
        probe: an output of a training step.
        saves: whether the run saves checkpoints.

    Raises:
        ConfigError: with the reason and the way to do it here.
    """
    owner = owner_of(handler)
    name = type(owner).__name__
    if isinstance(owner, BatchSizeScheduler):
        raise ConfigError(
            f"Ignite's {name} cannot be attached: the batch of a step is a function of seed, epoch"
            " and step, and a resumed run could not find it if its size changed on the way",
            fix="set batch_size and accumulation_steps for the whole run, and warm up the learning"
            " rate instead",
        )
    if isinstance(owner, FastaiLRFinder) and saves:
        raise ConfigError(
            f"Ignite's {name} cannot be attached to a trainer that saves checkpoints: the steps of"
            " its search would be kept as steps of the run",
            fix="run the search before checkpointing is attached: `with finder.attach(trainer,"
            " to_save): trainer.run(max_iters=...)`, then trainer.train()",
        )
    if isinstance(owner, ParamScheduler | ParamGroupScheduler):
        for scheduler, is_part in _torch_schedulers(owner):
            is_early = event.name.endswith("STARTED")  # its call is for the step that follows
            _check_trace(scheduler, updates, (0, 1) if is_part else (0,) if is_early else (1,))
    if isinstance(owner, Metric):
        _check_input(owner, probe)


def _check_input(metric: Metric, probe: Any) -> None:
    """Refuse a metric of predictions that is left with the number that a training step returns."""
    parts = metric.__dict__.get("metrics") if isinstance(metric, MetricGroup) else None
    if parts:
        for part in parts.values():
            _check_input(part, probe)
        return
    of_numbers = (Frequency, GpuInfo, MetricsLambda)  # what the last is made of comes here as well
    if metric.required_output_keys is None or isinstance(metric, of_numbers):
        return
    try:
        is_left_with_it = metric._output_transform(probe) is probe
    except Exception:  # a transform that asks for more than an output, as the trainer's own state
        return
    if is_left_with_it:
        name = type(metric).__name__
        raise ConfigError(
            f"Ignite's {name} compares predictions with targets, and the output of a training step"
            " is its loss: the logits are not kept",
            fix=f"attach {name} to trainer.evaluator, which has both, or give it an"
            " output_transform that returns (predictions, targets)",
        )


def _torch_schedulers(owner: Any, is_part: bool = False) -> Iterator[tuple[LRScheduler, bool]]:
    """Yield each wrapper of a torch scheduler, and whether it is part of a chain or a group."""
    if isinstance(owner, LRScheduler):
        yield owner, is_part
    for part in getattr(owner, "schedulers", ()):
        yield from _torch_schedulers(part, is_part=True)


def _check_trace(wrapper: LRScheduler, updates: int, offsets: tuple[int, ...]) -> None:
    """Compare what Ignite's wrapper makes of a torch scheduler with that scheduler's own rates.

    The wrapper calls `get_lr` where torch calls `step`; for several of torch's classes the
    results differ (pytorch/ignite#2465, #2462).

    Args:
        wrapper: around a scheduler that has not been stepped yet.
        updates: so many updates are compared, up to MOST_UPDATES.
        offsets: the wrapper's first call may give torch's rate for one of these updates, from 0.

    Raises:
        ConfigError: they differ.
    """
    inner: Any = wrapper.lr_scheduler
    scheduler = getattr(inner, "_lr_scheduler", inner)
    if isinstance(scheduler, _ExponentialLR):  # of FastaiLRFinder, which knows what it does
        return
    name = type(scheduler).__name__
    updates = min(updates, MOST_UPDATES)
    try:
        expected = _rates_of_torch(scheduler, updates + 1)
        got = _rates_of_wrapper(scheduler, min(updates, len(expected) - 1))
    except Exception as error:
        why = f"{type(error).__name__} {error}".strip()
    else:
        differences = [_first_difference(got, expected[offset:]) for offset in offsets]
        if None in differences:
            return
        first = differences[0] or 0
        why = (
            f"at update {first + 1} it gives {got[first][0]:.6g}, torch"
            f" {expected[first + offsets[0]][0]:.6g}"
        )
    raise ConfigError(
        f"Ignite's LRScheduler does not follow torch's {name}: its rates are others",
        got=why,
        expected="the rates of the scheduler in a loop of torch",
        fix=f"use this package's schedule: {_SCHEDULES.get(name, 'list schedules names them')}"
        " (training.scheduler in a file, scheduler= in Python)",
    )


def _twin(scheduler: Any) -> Any:
    """Return a copy of a torch scheduler on an optimizer with the same options and no model."""
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, "params": [_weight()]}
        for group in scheduler.optimizer.param_groups
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    return copy.deepcopy(scheduler, {id(scheduler.optimizer): optimizer})


def _weight() -> torch.Tensor:
    return torch.zeros(1, requires_grad=True)


def _rates_of_torch(scheduler: Any, updates: int) -> list[list[float]]:
    twin = _twin(scheduler)
    twin.last_epoch = twin._step_count - 1  # Ignite has moved it, where the wrapper is a legacy one
    rates = [_rates(twin)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimizer has taken a step
        for _ in range(updates - 1):
            try:
                twin.step()
            except ValueError:  # the end of a schedule with an end
                break
            rates.append(_rates(twin))
    return rates


def _rates_of_wrapper(scheduler: Any, updates: int) -> list[list[float]]:
    twin = _twin(scheduler)
    wrapper = LRScheduler(twin)
    rates = []
    for _ in range(updates):
        wrapper(None)
        rates.append(_rates(twin))
    return rates


def _rates(scheduler: Any) -> list[float]:
    return [float(group["lr"]) for group in scheduler.optimizer.param_groups]


def _first_difference(got: list[list[float]], expected: list[list[float]]) -> int | None:
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=False)):
        if any(
            not math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-15)
            for a, b in zip(mine, theirs, strict=True)
        ):
            return index
    return None


# ------------------------------------------------------------------ functions in a state


def _without_functions(state: Any) -> Any:
    """Return a state without the functions that some of Ignite's handlers put into theirs."""
    if isinstance(state, Mapping):
        return {
            key: _without_functions(value) for key, value in state.items() if not callable(value)
        }
    if isinstance(state, list | tuple):
        return type(state)(_without_functions(value) for value in state)
    return state


def _with_functions(saved: Any, present: Any) -> Any:
    """Return a saved state with the functions of the present one."""
    if isinstance(saved, Mapping) and isinstance(present, Mapping):
        functions = {key: value for key, value in present.items() if callable(value)}
        merged = {key: _with_functions(value, present.get(key)) for key, value in saved.items()}
        return {**merged, **functions}
    both_are_lists = isinstance(saved, list | tuple) and isinstance(present, list | tuple)
    if both_are_lists and len(saved) == len(present):
        pairs = zip(saved, present, strict=True)
        return type(saved)(_with_functions(one, other) for one, other in pairs)
    return saved
