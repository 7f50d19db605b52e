"""The validation metric that says which of two evaluations is the better one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fundamentallm.config.evaluation import TAKEN_NAMES
from fundamentallm.errors import ConfigError
from fundamentallm.events import TrainingEvents
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.metrics import numbers_in

Mode = Literal["min", "max"]

DEFAULT = "val/loss"
_LOWER_IS_BETTER = tuple(f"val/{name}" for name in TAKEN_NAMES)


@dataclass(frozen=True)
class Criterion:
    """A metric of the evaluation, and which of its values is better.

    Attributes:
        metric: its name in the log, `val/NAME`.
        lower: whether a lower value is better.
    """

    metric: str = DEFAULT
    lower: bool = True

    @classmethod
    def of(cls, metric: str, mode: Mode | None) -> Criterion:
        """Return the criterion that two options of a handler describe.

        Raises:
            ConfigError: the direction of a metric of one's own is not told.
        """
        if mode is None and metric not in _LOWER_IS_BETTER:
            raise ConfigError(
                f"nothing says whether a lower or a higher {metric} is better",
                key="mode",
                expected="min or max",
                fix=f"write {{metric: {metric}, mode: max}} if higher is better",
            )
        return cls(metric, mode != "max")

    @property
    def in_words(self) -> str:
        """A better value, in words."""
        metric = "validation loss" if self.metric == DEFAULT else self.metric
        return f"{'lower' if self.lower else 'higher'} {metric}"

    def attach(self, trainer: TrainingLoop) -> None:
        """Look for the metric when the run starts; what measures it may be attached until then."""
        if self.metric != DEFAULT:
            trainer.add_event_handler(TrainingEvents.FLLM_RUN_STARTED, self.require)

    def score(self, trainer: TrainingLoop) -> float | None:
        """Return a number that is higher for a better value; None of a step without evaluation.

        Raises:
            ConfigError: as `value`.
        """
        state = trainer.state
        if DEFAULT not in state.metrics or state.evaluated_step != state.iteration:
            return None
        value = self.value(trainer)
        return -value if self.lower else value

    def value(self, trainer: TrainingLoop) -> float:
        """Return the metric of the last evaluation, the same on all ranks.

        Raises:
            ConfigError: the evaluation has no such number.
        """
        if self.metric in _LOWER_IS_BETTER and self.metric in trainer.state.metrics:
            return float(trainer.state.metrics[self.metric])  # summed over the ranks
        # A metric of one's own may forget to; the ranks have to decide alike.
        return float(trainer.ranks.first_decides(lambda: self._own_value(trainer)))

    def _own_value(self, trainer: TrainingLoop) -> float:
        measured = numbers_in(trainer.state.metrics)
        if self.metric not in measured:
            raise _unknown(self.metric, [name for name in measured if name.startswith("val/")])
        return measured[self.metric]

    def require(self, trainer: TrainingLoop) -> None:
        """Refuse a metric that the evaluation is known not to have.

        Raises:
            ConfigError: there is no such metric, and nothing attached could add it.
        """
        if self.metric == DEFAULT:
            return
        names, is_complete = trainer.evaluator.measured_names()
        known = [f"val/{name}" for name in names]
        if self.metric not in known and is_complete and not _is_replaced(trainer):
            raise _unknown(self.metric, known)

    def state_of(self) -> dict[str, Any]:
        """Return what a handler's saved state has of it: nothing of the default."""
        if self == Criterion():
            return {}
        return {"metric": self.metric, "lower": self.lower}

    def is_of(self, state: Mapping[str, Any]) -> bool:
        """Return whether a handler's saved state was made with it."""
        return (state.get("metric", DEFAULT), state.get("lower", True)) == (self.metric, self.lower)


def _is_replaced(trainer: TrainingLoop) -> bool:
    """Return whether a handler from outside evaluates; it measures what it likes."""
    owners = trainer.owners_of_role("evaluation")
    return any(not type(owner).__module__.startswith("fundamentallm.") for owner in owners)


def _unknown(metric: str, known: list[str]) -> ConfigError:
    return ConfigError(
        f"the evaluation does not measure '{metric}'",
        key="metric",
        got=metric,
        expected=", ".join(known),
        fix=f"add it under evaluation.metrics, as {{{metric.removeprefix('val/')}: {{}}}}",
    )
