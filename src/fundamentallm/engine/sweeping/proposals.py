"""Which settings a trial has: a function of the sweep and of the trials before it.

So nothing but the trials is kept on the disk. A random trial follows from the seed, its number and
the key; an informed one from a study of optuna that is built again from the recorded trials, with a
sampler whose seed follows from the trial's number.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Sequence
from typing import Any

from fundamentallm.config.sweep import Range, SweepConfig
from fundamentallm.engine.sweeping.record import TrialRecord
from fundamentallm.errors import MachineError


def proposed(sweep: SweepConfig, past: Sequence[TrialRecord]) -> dict[str, Any]:
    """Return the settings of the next trial, by key.

    Args:
        sweep: the sweep.
        past: all trials before it.

    Raises:
        MachineError: optuna is needed and not installed.
    """
    if sweep.method == "grid":
        return next(itertools.islice(sweep.combinations(), len(past), None))
    if sweep.method == "random":
        return at_random(sweep, len(past) + 1)
    return _informed(sweep, past)


def at_random(sweep: SweepConfig, number: int) -> dict[str, Any]:
    """Return the settings of a random trial."""
    settings: dict[str, Any] = {}
    for key, values in sweep.axes.items():
        share = random.Random(f"{sweep.seed}/{number}/{key}").random()
        if isinstance(values, list):
            settings[key] = values[int(share * len(values))]
        else:
            settings[key] = values.at(share)
    return settings


def check_method(sweep: SweepConfig) -> None:
    """Check that what chooses the settings is installed.

    Raises:
        MachineError: it is not.
    """
    if sweep.method == "optuna":
        _optuna(sweep)


def _optuna(sweep: SweepConfig) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MachineError(
            "the method optuna needs a package that is not installed",
            where=sweep.locate("method"),
            got=str(error),
            fix="pip install 'fundamentallm[optuna]', or choose the method random",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _informed(sweep: SweepConfig, past: Sequence[TrialRecord]) -> dict[str, Any]:
    optuna = _optuna(sweep)
    axes = sweep.axes
    distributions = {key: _distribution(optuna, values) for key, values in axes.items()}
    seed = random.Random(f"{sweep.seed}/{len(past) + 1}").randrange(2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of features that are experimental there
        sampler = optuna.samplers.TPESampler(seed=seed)
        study = optuna.create_study(sampler=sampler, direction="minimize")
        for trial in past:
            study.add_trial(_known(optuna, trial, axes, distributions))
        asked = study.ask(distributions).params
    return {
        key: values[asked[key]] if isinstance(values, list) else values.rounded(asked[key])
        for key, values in axes.items()
    }


def _distribution(optuna: Any, values: list[Any] | Range) -> Any:
    """Return the distribution of a key; that of a list is over its indices."""
    kinds = optuna.distributions
    if isinstance(values, list):
        return kinds.CategoricalDistribution(range(len(values)))
    kind = kinds.IntDistribution if values.is_whole else kinds.FloatDistribution
    return kind(values.low, values.high, log=values.log)


def _known(
    optuna: Any,
    trial: TrialRecord,
    axes: dict[str, list[Any] | Range],
    distributions: dict[str, Any],
) -> Any:
    """Return a recorded trial as one of optuna's."""
    params = {
        key: values.index(trial.settings[key]) if isinstance(values, list) else trial.settings[key]
        for key, values in axes.items()
    }
    states = optuna.trial.TrialState
    if trial.is_pruned:
        losses = {
            step: math.inf if loss is None else loss for step, loss in trial.runs[0].evaluations
        }
        return optuna.trial.create_trial(
            state=states.PRUNED,
            params=params,
            distributions=distributions,
            intermediate_values=losses,
        )
    value = trial.value
    return optuna.trial.create_trial(
        state=states.FAIL if value is None else states.COMPLETE,
        value=value,
        params=params,
        distributions=distributions,
    )
