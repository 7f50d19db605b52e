"""The validation pass: an Ignite engine whose process function measures one micro-batch.

It always measures `loss` and `perplexity`. Any metric of `ignite.metrics` may be attached, and is
computed in the same pass from the same logits:

```python
Accuracy().attach(trainer.evaluator, "accuracy")      # val/accuracy, wherever val/loss goes
```

`state.output` of a micro-batch is the pair that such metrics take, `Predictions(y_pred, y)`: the
logits of its valid targets, and those targets. It is made only while something listens at
ITERATION_COMPLETED, as every metric does, since it takes 4 * N * V bytes: a loss on hidden states
otherwise never has all logits of a micro-batch at once.

Shapes: B batch, T time, D model width, V vocabulary, N valid targets of a micro-batch.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from ignite.engine import Engine, Events, State
from ignite.engine.events import RemovableEventHandle
from ignite.metrics import Metric, MetricGroup, MetricsLambda
from torch import Tensor, nn

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision
from fundamentallm.config.evaluation import ALWAYS_MEASURED, TAKEN_NAMES
from fundamentallm.data.batch import Batch, as_window
from fundamentallm.errors import DataError
from fundamentallm.models.calling import needed_by
from fundamentallm.training.foreign import owner_of
from fundamentallm.training.losses import Head, takes_hidden_states, widened
from fundamentallm.training.recovery.data_faults import DataFaults
from fundamentallm.training.step import (
    accumulator,
    perplexity_of,
    states_for,
    summed_nll,
    to_device,
    undisturbed,
)

# A micro-batch is timed at least so often, and until its mean is known to this part of itself.
_LEAST, _ENOUGH = 3, 0.1


class Predictions(NamedTuple):
    """What a metric takes of a micro-batch.

    Attributes:
        y_pred: logits (N, V), float32 or wider.
        y: the targets (N,), int64.
    """

    y_pred: Tensor
    y: Tensor


class Evaluator(Engine):
    """Measures a model on batches, and leaves modes and random numbers as they were.

    Sums are in float64 and over all ranks, which may hold different numbers of batches. A
    micro-batch without a valid target is passed over.

    Args:
        model: takes `input_ids` (B, T); without a wrapper for ranks.
        precision: the compute type, as in training.
        ranks: over which sums are taken at the end.
        loss_fn: the training objective; one that avoids the full logits in training avoids them
            here as well.

    Attributes:
        nll: summed negative log-likelihood of the last whole pass, in nats.
        num_tokens: its valid targets.
        data: of the pass under way; None between passes.
        weights: a context that puts the weights to evaluate into the model.
        leaves: asked after each micro-batch; on True the pass is cut short.
        faults: holds back an error of this rank's data until all ranks have heard of it.
        admit: called with each handler that is not a metric; the trainer keeps its state.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        ranks: Ranks | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__(lambda _, batch: self._measure(batch))
        self.model = model
        self.precision = precision
        self.ranks = ranks or Ranks()
        self.loss_fn = loss_fn
        self.nll, self.num_tokens = 0.0, 0
        self.data: Iterable[Any] | None = None
        self.weights: Callable[[], AbstractContextManager[None]] = nullcontext
        self.leaves: Callable[[], bool] = lambda: False
        self.faults = DataFaults(self.ranks)
        self.admit: Callable[[Any], None] = lambda handler: None
        self._is_cut = self._is_whole = False

    def run(  # type: ignore[override]
        self, data: Iterable[Any], max_epochs: int | None = None, *, epoch_length: int | None = None
    ) -> State:
        """Measure this rank's batches in one pass; every rank must call it.

        Args:
            data: batches or step batches, as of a validation loader.
            max_epochs: 1.
            epoch_length: micro-batches of this rank to take; all if None.

        Returns:
            The engine's state. Its `metrics` are empty if the pass was cut short.

        Raises:
            DataError: some rank cannot read its data.
            ValueError: more than one pass.
        """
        if max_epochs not in (None, 1):
            raise ValueError(f"an evaluation is one pass, got max_epochs={max_epochs}")
        state, device = self.state, self.precision.device
        self.data = data
        state.metrics.clear()
        # Ignite would go on with a pass that was cut short, and keep the length of the last one.
        state.max_epochs = state.max_iters = state.epoch_length = None
        self._nll = torch.zeros((), dtype=accumulator(device), device=device)
        self._num_tokens = 0
        self._is_cut = self._is_whole = False
        try:
            with self.weights(), undisturbed(self.model):
                super().run(self._micro_batches(data), max_epochs=1, epoch_length=epoch_length)
        finally:
            # As in `TrainingLoop.run`; and the logits are large.
            self._internal_run_generator = self._dataloader_iter = self.data = None
            state.output = state.batch = state.dataloader = None
        if not self._is_whole:
            state.metrics.clear()
        return state

    def seconds_for(self, data: Collection[Any], within: float) -> float:
        """Estimate the seconds of a pass over this rank's batches from one micro-batch.

        A first call prepares something and does not count. Then the micro-batch is timed until the
        standard error of the mean is a tenth of it: three times where the machine is quiet. That
        error is added, since what is kept free for a pass must suffice. Data that cannot be read
        take none: the pass itself reports that.

        Args:
            data: batches or step batches, as of a validation loader.
            within: the seconds of these calls after which no other is made.
        """
        with self.weights(), undisturbed(self.model):
            try:
                window = as_window(next(iter(data)))
            except (DataError, StopIteration):
                return 0.0
            batch = window.micro_batches[0]

            def timed() -> float:
                started = time.perf_counter()
                float(evaluate_batch(self.model, batch, self.precision, self.loss_fn)[0])
                return time.perf_counter() - started

            timed()
            taken, error = [timed()], math.inf
            while sum(taken) < within and error > _ENOUGH * statistics.mean(taken):
                taken.append(timed())
                if len(taken) >= _LEAST:
                    error = statistics.stdev(taken) / math.sqrt(len(taken))
        seconds = statistics.mean(taken) + (error if math.isfinite(error) else 0.0)
        return seconds * len(window.micro_batches) * len(data)

    def terminate(self, skip_completed: bool = False) -> None:
        """Cut the pass short, after this micro-batch; one rank does so for all.

        The pass is not counted: its metrics are not computed, COMPLETED is not fired.
        """
        self._is_cut = True

    def add_event_handler(
        self, event_name: Any, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Attach a handler or a metric's method, as Ignite does.

        Raises:
            ValueError: the metric's name is one that the evaluator measures itself.
        """
        if not isinstance(getattr(handler, "__self__", handler), Metric):
            self.admit(handler)
        elif args and args[0] in TAKEN_NAMES:
            raise ValueError(
                f"the evaluator measures '{args[0]}' itself, per token and in float64; attach the"
                " metric under another name"
            )
        return super().add_event_handler(event_name, handler, *args, **kwargs)

    def measured_names(self) -> tuple[list[str], bool]:
        """Return the names of what a pass measures, and whether no others are possible.

        Others are: a metric may give several results under names of its own, and a handler may
        add any.
        """
        names, is_complete = list(ALWAYS_MEASURED), True
        for handler, args, _ in self._event_handlers[Events.EPOCH_COMPLETED]:
            owner = owner_of(handler)
            if isinstance(owner, Metric):
                names += [name for name in args if isinstance(name, str)]
                is_ignites = type(owner).__module__.startswith("ignite.")
                is_complete &= is_ignites and not isinstance(owner, MetricGroup | MetricsLambda)
            elif own := getattr(owner, "measures", ()):
                names += own
            else:
                is_complete = False
        return names, is_complete

    def _micro_batches(self, data: Iterable[Any]) -> Iterator[Batch]:
        for window in map(as_window, self.faults.kept_from(data)):
            for batch in window.micro_batches:
                if (batch["target_ids"] >= 0).any():
                    yield batch
                self._is_cut = self._is_cut or self.leaves()
                if self._is_cut:
                    return

    def _measure(self, batch: Batch) -> Predictions | None:
        listened_to = bool(self._event_handlers[Events.ITERATION_COMPLETED])
        nll, num_tokens, predictions = evaluate_batch(
            self.model, batch, self.precision, self.loss_fn, listened_to
        )
        self._nll += nll
        self._num_tokens += num_tokens
        return predictions

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        """Fire as Ignite does; the end of the data ends the pass only if all ranks have it whole.

        A metric sums over the ranks when it is computed, so all of them must get there.
        """
        if event_name == Events.EPOCH_COMPLETED:
            self._is_whole = self._sum_up()
            if not self._is_whole:
                super().terminate(skip_completed=True)
                return
        super()._fire_event(event_name, *event_args, **event_kwargs)

    def _sum_up(self) -> bool:
        """Write the pass's own metrics, unless some rank has cut it short."""
        self.ranks.sum_tensor(self._nll)
        num_tokens, num_cut = self.ranks.sum_counts([self._num_tokens, self._is_cut])
        self.faults.raise_everywhere()
        if num_cut:
            return False
        self.nll, self.num_tokens = float(self._nll), num_tokens
        loss = self.nll / num_tokens if num_tokens else math.nan
        self.state.metrics.update(zip(ALWAYS_MEASURED, (loss, perplexity_of(loss)), strict=True))
        return True


def evaluate_batch(
    model: nn.Module,
    batch: Batch,
    precision: Precision,
    loss_fn: Callable[..., Tensor] | None = None,
    with_predictions: bool = False,
) -> tuple[Tensor, int, Predictions | None]:
    """Return the summed NLL (a scalar on the device), the count of valid targets, and predictions.

    Args:
        model: without a wrapper for ranks.
        batch: a micro-batch.
        precision: the compute type.
        loss_fn: the training objective, as in `summed_nll`.
        with_predictions: whether to return `Predictions`; None is returned otherwise.
    """
    num_tokens = int((batch["target_ids"] >= 0).sum())
    batch = to_device(needed_by(model, batch), precision.device)
    targets = batch["target_ids"]
    with torch.no_grad(), precision.weights(model), precision.autocast():
        states = states_for(loss_fn, model, batch)
        nll = summed_nll(states, model, targets, loss_fn)
        predictions = None
        if with_predictions:
            head = cast(Head, model).logits_from_hidden if takes_hidden_states(loss_fn) else None
            predictions = predictions_of(states, targets, head)
        return nll, num_tokens, predictions


def predictions_of(
    states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor] | None = None
) -> Predictions:
    """Return the logits of the valid targets, and those targets.

    Args:
        states: logits (..., V), or hidden states (..., D) with a head.
        targets: (...) int64; negative ones are left out.
        head: maps hidden states to logits.
    """
    states, targets = states.flatten(0, -2), targets.flatten()
    valid = targets >= 0
    if not valid.all():  # a copy
        states, targets = states[valid], targets[valid]
    return Predictions(widened(states if head is None else head(states)), targets)
