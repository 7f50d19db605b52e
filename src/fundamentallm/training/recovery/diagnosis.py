"""Why is a step not finite? The step is replayed, and the first bad module is found.

Nothing here changes the training: weights, optimizer state, gradients and random generators are as
before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fundamentallm.compute.compilation import uncompiled
from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision
from fundamentallm.compute.rng import capture_generators, restore_generators
from fundamentallm.data.batch import Window
from fundamentallm.training.buffers import StateBuffers
from fundamentallm.training.losses import token_nll
from fundamentallm.training.step import states_for, summed_objective, to_device

Batch = dict[str, Tensor]

TRANSIENT = "transient"
PRECISION = "precision"
DIVERGENCE = "divergence"
DATA = "data"
DATA_WITH_WEIGHTS = "data_with_weights"
STATE = "state"
SPIKE = "spike"
OVERFLOW = "overflow"
UNEXPLAINED = "unexplained"
VERDICTS = frozenset(
    (
        TRANSIENT,
        PRECISION,
        DIVERGENCE,
        DATA,
        DATA_WITH_WEIGHTS,
        STATE,
        SPIKE,
        OVERFLOW,
        UNEXPLAINED,
    )
)
"""The verdicts:

transient           the same batch from the same state is finite: a hardware fault
precision           it is finite in float32
divergence          a batch that was finite earlier is not finite at these weights either
data                only this batch is not finite, with earlier weights too
data_with_weights   only this batch is not finite, and only with these weights
state               the optimizer's state or the learning rate is not finite
spike               finite, but far above the values of earlier steps
overflow            the fp16 loss scale overflowed too often in a row
unexplained         transient, but twice at the same step
"""


@dataclass(frozen=True)
class TensorStatistics:
    """Statistics of one tensor of a forward or backward pass.

    Attributes:
        module: dotted name of the module; "loss" for the objective itself.
        kind: "output" in the forward pass, "gradient" (of the loss with respect to the module's
            output) in the backward pass, or "parameter" (the gradient of a weight).
        shape: of the tensor.
        dtype: of the tensor.
        smallest: over its finite values; NaN if none is.
        largest: likewise.
        num_nan: NaNs in it.
        num_inf: infinities in it.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    smallest: float
    largest: float
    num_nan: int
    num_inf: int

    @property
    def is_bad(self) -> bool:
        """Whether it holds NaN or infinity."""
        return self.num_nan + self.num_inf > 0

    def __str__(self) -> str:
        """Return a line for the terminal."""
        return (
            f"{self.kind} of {self.module} {list(self.shape)}: {self.num_nan} NaN,"
            f" {self.num_inf} infinite, others {self.smallest:.4g} to {self.largest:.4g}"
        )


@dataclass
class Replay:
    """The result of computing a step again without updating the weights.

    Attributes:
        loss: nats per valid token of this rank's rows.
        grad_norm: norm of this rank's gradient.
        statistics: of every module's output and gradient in order of computation, if recorded.
    """

    loss: float = math.nan
    grad_norm: float = math.nan
    statistics: list[TensorStatistics] = field(default_factory=list)

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def first_bad(self, *kinds: str) -> TensorStatistics | None:
        """Return the first statistic of these kinds that is not finite."""
        return next((r for r in self.statistics if r.is_bad and r.kind in kinds), None)

    def table(self) -> list[dict[str, Any]]:
        """Return the statistics as plain values."""
        return [asdict(statistic) for statistic in self.statistics]


@dataclass(frozen=True)
class BadRow:
    """A sequence whose loss or gradient is not finite without the other sequences.

    Attributes:
        micro_batch: number of its micro-batch in this rank's step batch.
        row: its row in the micro-batch.
        position: the first of its tokens whose loss is not finite; -1 if only gradients are not.
    """

    micro_batch: int
    row: int
    position: int


@dataclass(frozen=True)
class Diagnosis:
    """The verdict of the replays.

    Attributes:
        verdict: one of the verdicts above.
        replay: the first replay, with its statistics.
        bad_rows: this rank's bad sequences; for a spike those with the highest loss.
    """

    verdict: str
    replay: Replay
    bad_rows: Sequence[BadRow] = ()

    @property
    def first_bad_forward(self) -> TensorStatistics | None:
        """The first output of the forward pass that is not finite."""
        return self.replay.first_bad("output")

    @property
    def first_bad_backward(self) -> TensorStatistics | None:
        """The first gradient of the backward pass that is not finite."""
        return self.replay.first_bad("gradient", "parameter")


@dataclass(frozen=True)
class Incident:
    """A refused step or a damaged state, with its verdict.

    Attributes:
        step: at which it was detected.
        fault: a description of what was detected.
        verdict: that of the diagnosis, or "overflow", "unexplained", "spike".
        decision: a description of what is done about it.
        diagnosis: the replays; None if none were needed.
    """

    step: int
    fault: str
    verdict: str
    decision: str
    diagnosis: Diagnosis | None = None

    def __str__(self) -> str:
        """Return the line for the log."""
        return f"step {self.step}: {self.fault}; verdict: {self.verdict}; {self.decision}"


@dataclass(frozen=True)
class StepReplayer:
    """Computes steps again without changing the training.

    Attributes:
        model: without a wrapper for ranks. Its blocks run uncompiled while modules are recorded.
        loss_fn: `loss_fn(logits, targets, reduction="sum")`, or on hidden states, as in training.
        precision: autocast as in training.
        ranks: the ranks of the run, which decide together.
    """

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    precision: Precision
    ranks: Ranks

    def replay(
        self,
        window: Window,
        rng: Mapping[str, Any] | None = None,
        *,
        narrow: bool = True,
        watch: bool = False,
    ) -> Replay:
        """Compute loss and gradient of a step batch; restore everything afterwards.

        Args:
            window: this rank's rows of the step batch.
            rng: state of the random generators to begin with; the current one if None.
            narrow: False computes in float32, also if the training does not.
            watch: record statistics of every module's output and gradient.
        """
        model = self.model
        precision = self.precision if narrow else Precision("fp32", self.precision.device)
        result = Replay()
        parameters = [p for p in model.parameters() if p.requires_grad]
        kept = [p.grad for p in parameters]
        device = self.precision.device
        before, was_training = capture_generators(device), model.training
        buffers = StateBuffers(model)
        values = buffers.copied()
        try:
            if rng is not None:
                restore_generators(rng, device)
            model.train()
            for parameter in parameters:
                parameter.grad = None
            # Compiled code calls no hooks, and another precision would compile it again.
            with (
                uncompiled(model) if watch or not narrow else nullcontext(),
                watched(model, result.statistics) if watch else nullcontext(),
            ):
                nll = self._accumulate(model, window, precision, result.statistics, watch)
            if watch:
                result.statistics += _parameter_statistics(model, result.statistics)
            gradients = [p.grad for p in parameters if p.grad is not None]
            result.grad_norm = float(nn.utils.get_total_norm(gradients))
            result.loss = nll / max(window.num_tokens, 1)
        finally:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient
            buffers.put_back(values)
            model.train(was_training)
            restore_generators(before, device)
        return result

    def _accumulate(
        self,
        model: nn.Module,
        window: Window,
        precision: Precision,
        statistics: list[TensorStatistics],
        watch: bool,
    ) -> float:
        total = 0.0
        for batch in window.micro_batches:
            moved = to_device(batch, precision.device)
            with precision.weights(model):
                with precision.autocast():
                    objective = self._objective(model, moved)
                if watch:
                    statistics.append(read("loss", "output", objective.detach()))
                # Without the loss scale of fp16: what only the scale breaks is an overflow.
                (objective / max(window.num_tokens, 1)).backward()  # type: ignore[no-untyped-call]
            total += float(objective.detach())
        return total

    def _objective(self, model: nn.Module, batch: Batch) -> Tensor:
        states = states_for(self.loss_fn, model, batch)
        return summed_objective(states, model, batch["target_ids"], self.loss_fn)

    def bad_rows(self, window: Window, rng: Mapping[str, Any]) -> list[BadRow]:
        """Bisect a step batch to those sequences of this rank that are not finite."""
        found = []
        for number, batch in enumerate(window.micro_batches):
            for row in self._bisect(batch, 0, len(batch["input_ids"]), rng):
                position = self._first_bad_position(_rows(batch, row, row + 1))
                found.append(BadRow(number, row, position))
        return found

    def _bisect(self, batch: Batch, begin: int, end: int, rng: Mapping[str, Any]) -> Iterator[int]:
        if begin >= end or self.replay(window_of(_rows(batch, begin, end)), rng).is_finite:
            return
        if end - begin == 1:
            yield begin
            return
        middle = (begin + end) // 2
        yield from self._bisect(batch, begin, middle, rng)
        yield from self._bisect(batch, middle, end, rng)

    def _first_bad_position(self, batch: Batch) -> int:
        """Return the first token whose loss is not finite, computed without dropout; else -1."""
        bad = ~torch.isfinite(self._token_losses(batch).flatten())
        return int(bad.nonzero()[0]) if bool(bad.any()) else -1

    def worst_rows(self, window: Window, count: int = 3) -> list[BadRow]:
        """Return the sequences of this rank with the highest mean loss, the highest first.

        Computed without dropout. The position is that of the token with the highest loss.
        """
        found = []
        for number, batch in enumerate(window.micro_batches):
            for row, losses in enumerate(self._token_losses(batch)):
                place = BadRow(number, row, int(losses.argmax()))
                found.append((float(losses.mean()), place))
        found.sort(key=lambda entry: -entry[0])
        return [place for _, place in found[:count]]

    def _token_losses(self, batch: Batch) -> Tensor:
        """Return the loss of each token, (B, T), without dropout."""
        precision, was_training = self.precision, self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), precision.weights(self.model), precision.autocast():
                moved = to_device(batch, precision.device)
                states = states_for(self.loss_fn, self.model, moved)
                return token_nll(states, self.model, moved["target_ids"], self.loss_fn)
        finally:
            self.model.train(was_training)

    def diagnose(
        self,
        window: Window,
        rng: Mapping[str, Any],
        good_window: Window | None,
        earlier_weights: Callable[[], AbstractContextManager[bool]],
    ) -> Diagnosis:
        """Find out why a step was not finite; every rank must call this.

        Args:
            window: the step batch.
            rng: state of the random generators before the step.
            good_window: a recent step batch that was finite; None if there was none.
            earlier_weights: a context in which the model holds the weights of an earlier finite
                state; it yields False if there is none. Entered only if the verdict depends on it.
        """
        first = self.replay(window, rng, watch=True)
        if not self._any_bad(first):
            return Diagnosis(TRANSIENT, first)
        if self.precision.name != "fp32" and not self._any_bad(
            self.replay(window, rng, narrow=False)
        ):
            return Diagnosis(PRECISION, first)
        rows = self.bad_rows(window, rng)
        if good_window is not None:
            if self._any_bad(self.replay(good_window, rng)):
                return Diagnosis(DIVERGENCE, first, rows)
        elif not self.ranks.any(len(rows) < _num_rows(window)):
            # No step was finite yet: if all sequences are bad, the cause is the weights.
            return Diagnosis(DIVERGENCE, first, rows)
        with earlier_weights() as available:
            if available and not self._any_bad(self.replay(window, rng)):
                return Diagnosis(DATA_WITH_WEIGHTS, first, rows)
        return Diagnosis(DATA, first, rows)

    def _any_bad(self, replay: Replay) -> bool:
        return self.ranks.any(not replay.is_finite)


def window_of(batch: Batch) -> Window:
    """Return a step batch of one micro-batch."""
    return Window([batch], int((batch["target_ids"] >= 0).sum()))


def read(module: str, kind: str, tensor: Tensor) -> TensorStatistics:
    """Return the statistics of a tensor."""
    values = tensor.detach()
    finite = values[torch.isfinite(values)].float()
    return TensorStatistics(
        module,
        kind,
        tuple(values.shape),
        str(values.dtype).removeprefix("torch."),
        float(finite.min()) if finite.numel() else math.nan,
        float(finite.max()) if finite.numel() else math.nan,
        int(torch.isnan(values).sum()),
        int(torch.isinf(values).sum()),
    )


@contextmanager
def watched(model: nn.Module, statistics: list[TensorStatistics]) -> Iterator[None]:
    """Record statistics of each module's output, and of the gradient with respect to it.

    A module's hook runs after those of its submodules, so the first bad output in the list is that
    of the innermost module which computed it.
    """

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            statistics.append(read(name, "output", output))
            if output.requires_grad:
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: statistics.append(read(name, "gradient", gradient))
                )

        return hook

    handles = [
        module.register_forward_hook(note(name or "model"))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parameter_statistics(
    model: nn.Module, statistics: Sequence[TensorStatistics]
) -> list[TensorStatistics]:
    """Return the bad gradients of weights if no recorded output or gradient is bad."""
    if any(statistic.is_bad for statistic in statistics):
        return []
    return [
        statistic
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
        and (statistic := read(name.rpartition(".")[0], "parameter", parameter.grad)).is_bad
    ]


def _rows(batch: Batch, begin: int, end: int) -> Batch:
    return {key: value[begin:end] for key, value in batch.items()}


def _num_rows(window: Window) -> int:
    return sum(len(batch["input_ids"]) for batch in window.micro_batches)
