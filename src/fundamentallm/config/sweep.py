"""A sweep: runs of one configuration that differ in some of its keys."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from fundamentallm.config.base import (
    BaseConfig,
    Count,
    CountOrZero,
    Seed,
    Text,
    directory_name,
    name_pattern,
)
from fundamentallm.config.load import replaced
from fundamentallm.config.run import RunConfig
from fundamentallm.config.yaml.key_path import excerpt
from fundamentallm.config.yaml.problems import problem, shown, to_config_error
from fundamentallm.config.yaml.source import YamlDocument, read_yaml
from fundamentallm.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

LONGEST_NAME = 60  # its runs are named after it
MOST_TRIALS = 10_000
MOST_SEEDS = 100

OF_THE_SWEEP = {
    "name": "runs are named after the sweep",
    "seed": "write how many seeds under `seeds`; the first is that of the configuration",
    "training.total_steps": "write the budget of each run under `steps`",
    "handlers.pruning": "write `prune`",
}
"""Keys of a run that a sweep sets itself, each with what to do instead."""

Settings = Mapping[str, Any]
"""Values by dotted key of a run's configuration."""


class Range(BaseConfig):
    """The numbers between two bounds; whole numbers if both bounds are."""

    low: int | float
    """The lowest value."""

    high: int | float
    """The highest value."""

    log: bool = False
    """Whether the logarithm is drawn evenly, and not the value itself."""

    @property
    def is_whole(self) -> bool:
        """Whether its values are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def rounded(self, value: float) -> int | float:
        """Return a value of the range near a number: six digits, or an integer."""
        near = round(value) if self.is_whole else float(f"{value:.6g}")
        return min(max(near, self.low), self.high)

    def at(self, share: float) -> int | float:
        """Return the value at a share of the way from low to high; shares are in [0, 1)."""
        # Each whole number has a stretch of the same length, around it.
        half = 0.5 if self.is_whole else 0.0
        low, high = self.low - half, self.high + half
        if self.log:
            return self.rounded(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))
        return self.rounded(low + share * (high - low))

    @model_validator(mode="after")
    def _has_values(self) -> Range:
        if not self.low < self.high:
            raise problem("high", "the range is empty", got=self.high, expected="more than `low`")
        if self.log and self.low <= 0:
            raise problem("low", "a logarithm needs positive values", got=self.low, expected="> 0")
        return self


class Prune(BaseConfig):
    """When a run ends early: at an evaluation, with a loss above the median of earlier trials.

    The first seed of a trial is compared with the first seeds of earlier ones at the same step. A
    pruned trial has no further seeds.
    """

    trials: Annotated[int, Field(ge=2)] = 4
    """Earlier trials that were evaluated at the step, at least."""

    from_step: CountOrZero = 0
    """No run ends before this step."""


class SweepConfig(BaseConfig):
    """A sweep: what SWEEP.yaml says."""

    name: Annotated[
        str, Field(json_schema_extra={"pattern": f"^{name_pattern(LONGEST_NAME)}$"})
    ] = "sweep"
    """Name of the sweep and of its directory under sweeps/: letters, digits, ., _ and -."""

    config: Text
    """The configuration of all runs: a file, or the name of a packaged one."""

    fixed: dict[str, Any] = Field(default_factory=dict)
    """Values by dotted key that replace those of the configuration in all runs."""

    keys: Annotated[dict[str, list[Any] | dict[str, Any]], Field(min_length=1)]
    """What differs: by dotted key a list of values, or a range {low: 1e-4, high: 1e-2, log: true}
    from which random and optuna draw."""

    method: Literal["grid", "random", "optuna"] = "grid"
    """How settings are chosen: every combination, at random, or from the results of earlier trials
    by optuna's tree-structured Parzen estimator."""

    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = None
    """The number of settings of random and optuna; a grid has all combinations."""

    steps: Count
    """Optimizer steps of each run."""

    seeds: Annotated[int, Field(ge=1, le=MOST_SEEDS)] = 1
    """Runs of each setting, with successive seeds from the configuration's on."""

    seed: Seed = 0
    """Seed of the choice of settings."""

    prune: Prune | None = None
    """When runs end early; null: never."""

    _document: YamlDocument = PrivateAttr(default_factory=lambda: YamlDocument("SWEEP.yaml", {}))

    @classmethod
    def from_document(cls, document: YamlDocument) -> Self:
        """Validate a document and remember where each of its keys was written.

        Raises:
            ConfigError: as in `from_yaml`.
        """
        sweep = super().from_document(document)
        sweep._document = document
        for key, values in sweep.keys.items():
            if isinstance(values, dict):
                _checked_range(document, key, values)
                if sweep.method == "grid":
                    raise ConfigError(
                        "a grid has no values of a range",
                        where=sweep.locate("keys", key),
                        got=shown(values),
                        fix="write a list of values, or choose the method random or optuna",
                    )
        if sweep.method == "grid" and sweep.number_of_trials > MOST_TRIALS:
            raise ConfigError(
                "the grid is too large",
                where=sweep.locate("keys"),
                got=f"{sweep.number_of_trials:,} combinations",
                expected=f"at most {MOST_TRIALS:,}",
                fix="write fewer values, or choose the method random or optuna",
            )
        return sweep

    @property
    def axes(self) -> dict[str, list[Any] | Range]:
        """The values of each key."""
        return {
            key: values if isinstance(values, list) else Range.model_validate(values)
            for key, values in self.keys.items()
        }

    @property
    def number_of_trials(self) -> int:
        """How many settings are tried."""
        return self.trials or math.prod(len(values) for values in self.keys.values())

    def locate(self, *path: str) -> str:
        """Return where a key was written, as `sweep.yaml:7: keys.training.learning_rate`."""
        return self._document.locate(path)

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Yield the settings of a grid; the last key changes fastest."""
        for values in itertools.product(*self.keys.values()):
            yield dict(zip(self.keys, values, strict=True))

    def base(self) -> YamlDocument:
        """Read the configuration of all runs, with the fixed values and the budget.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            document = read_yaml(self.config)
        except ConfigError as error:
            if error.where == self.config:  # the file itself, and not a line of it
                error.where = f"{self.locate('config')}: {error.where}"
            raise
        for key, value in self.fixed.items():
            document = replaced(document, _path(key), value, self.locate("fixed", key))
        return replaced(document, ("training", "total_steps"), self.steps, self.locate("steps"))

    def run_config(self, base: YamlDocument, settings: Settings) -> RunConfig:
        """Return the configuration of all runs with some settings.

        Args:
            base: what `base` returned.
            settings: values by key.

        Raises:
            ConfigError: a key or a value is invalid; `where` names its line in the sweep's file.
        """
        document = base
        for key, value in settings.items():
            document = replaced(document, _path(key), value, self.locate("keys", key))
        return RunConfig.from_document(document)

    @field_validator("name")
    @classmethod
    def _path_component(cls, name: str) -> str:
        return directory_name(name, "sweep", LONGEST_NAME)

    @model_validator(mode="after")
    def _keys_of_a_run(self) -> SweepConfig:
        for key, values in self.keys.items():
            has_values = isinstance(values, list) or bool(values.keys() & Range.model_fields)
            if "." not in key and not has_values:
                inner = next(iter(values), "learning_rate")
                raise problem(
                    "keys",
                    "a key stands below another",
                    got=key,
                    expected="dotted keys",
                    fix=f"write {key}.{inner}: and its values",
                )
        for section, keys in (("fixed", self.fixed), ("keys", self.keys)):
            for key in keys:
                of_sweep = next((own for own in OF_THE_SWEEP if _touches(key, own)), None)
                if not all(key.split(".")) or of_sweep:
                    raise problem(
                        section,
                        f"the sweep sets {of_sweep} itself" if of_sweep else "this is not a key",
                        got=key,
                        expected="" if of_sweep else "a dotted key, as training.learning_rate",
                        fix=OF_THE_SWEEP[of_sweep] if of_sweep else "",
                    )
        for key, other in itertools.combinations([*self.keys, *self.fixed], 2):
            if _touches(key, other):
                raise problem("keys", f"{excerpt(key)} and {excerpt(other)} set the same value")
        return self

    @model_validator(mode="after")
    def _values_to_choose(self) -> SweepConfig:
        for key, values in self.keys.items():
            if isinstance(values, list) and not values:
                raise problem("keys", "a key has no values", got=key, fix="write a list of values")
            if isinstance(values, list) and (twice := _first_twice(values)) is not None:
                raise problem(
                    "keys",
                    f"{excerpt(key)} has a value twice",
                    got=values[twice],
                    fix="write it once",
                )
        if (self.method == "grid") != (self.trials is None):
            is_grid = self.method == "grid"
            raise problem(
                "trials",
                "a grid tries all combinations" if is_grid else "the number of trials is missing",
                got=self.trials,
                fix="remove `trials`, or choose the method random" if is_grid else "write `trials`",
            )
        return self


def _first_twice(values: Sequence[Any]) -> int | None:
    """Return the place of the first value that stands before it too; None without one."""
    for place, value in enumerate(values):
        # 1, 1.0 and true are equal in Python, and not for a configuration.
        if any(type(value) is type(other) and value == other for other in values[:place]):
            return place
    return None


def _checked_range(document: YamlDocument, key: str, values: Mapping[str, Any]) -> None:
    try:
        Range.model_validate(values)
    except ValidationError as error:
        raise to_config_error(
            error, Range, values, lambda path: document.locate(("keys", key, *path))
        ) from None


def _path(key: str) -> tuple[str, ...]:
    return tuple(key.split("."))


def _touches(key: str, other: str) -> bool:
    """Return whether one of two keys is the other, or above it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def load_sweep(path: Path) -> SweepConfig:
    """Read SWEEP.yaml.

    Raises:
        ConfigError: a fault in the file; `where` names the line.
    """
    return SweepConfig.from_document(read_yaml(path))
