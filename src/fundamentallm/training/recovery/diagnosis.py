"""Why is a step not finite? The step is replayed under control, and the first bad place named.

Nothing here changes the training: weights, moments, gradients and random numbers are as before.
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

transient           the same batch from the same state is finite: the machine erred
precision           it is finite in float32
divergence          another batch, which was good, is bad at these weights too
data                this batch alone is bad, at earlier weights as well
data_with_weights   this batch alone is bad, and only at these weights
state               the optimizer's state or the learning rate is not finite
spike               finite, but far above what was usual
overflow            the fp16 loss scale overflowed too often in a row
unexplained         transient, but twice at the same step
"""


@dataclass(frozen=True)
class TensorStatistics:
    """One tensor as it passed by.

    Attributes:
        module: dotted name of the module; "loss" for the objective itself.
        kind: "output" in the forward pass, "gradient" (of the loss by the module's output) in the
            backward pass, or "parameter" (a gradient that only a weight has).
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
        """Whether it holds anything that is not finite."""
        return self.num_nan + self.num_inf > 0

    def __str__(self) -> str:
        """Return one line for people."""
        return (
            f"{self.kind} of {self.module} {list(self.shape)}: {self.num_nan} NaN,"
            f" {self.num_inf} infinite, others {self.smallest:.4g} to {self.largest:.4g}"
        )


@dataclass
class Replay:
    """A step that was computed once more and not applied.

    Attributes:
        loss: nats per valid token of this rank's share.
        grad_norm: of this rank's gradient.
        statistics: of every module's output and gradient, in the order of the passes, if asked for.
    """

    loss: float = math.nan
    grad_norm: float = math.nan
    statistics: list[TensorStatistics] = field(default_factory=list)

    @property
    def is_finite(self) -> bool:
        """Whether both figures are."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def first_bad(self, *kinds: str) -> TensorStatistics | None:
        """Return the first statistic of these kinds that is not finite."""
        return next((r for r in self.statistics if r.is_bad and r.kind in kinds), None)

    def table(self) -> list[dict[str, Any]]:
        """Return the statistics as plain values."""
        return [asdict(statistic) for statistic in self.statistics]


@dataclass(frozen=True)
class BadRow:
    """A sequence that is bad on its own.

    Attributes:
        micro_batch: its micro-batch in this rank's window.
        row: its row there.
        position: the first of its tokens whose loss is not finite; -1 if only gradients are not.
    """

    micro_batch: int
    row: int
    position: int


@dataclass(frozen=True)
class Diagnosis:
    """What the replays say.

    Attributes:
        verdict: one of the verdicts above.
        replay: the first replay, with its statistics.
        bad_rows: sequences that are bad on their own, on this rank; of a spike the worst.
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
    """A refused step or a damaged state, judged.

    Attributes:
        step: at which it was noticed.
        fault: what was seen, in words.
        verdict: that of the diagnosis, or "overflow", "unexplained", "spike".
        decision: what is done about it, in words.
        diagnosis: the replays; None where none were needed.
    """

    step: int
    fault: str
    verdict: str
    decision: str
    diagnosis: Diagnosis | None = None

    def __str__(self) -> str:
        """Return the one line that the log has of it."""
        return f"step {self.step}: {self.fault}; verdict: {self.verdict}; {self.decision}"


@dataclass(frozen=True)
class StepReplayer:
    """All that a replay needs.

    Attributes:
        model: without a wrapper for ranks; blocks that are compiled are called as they are where
            modules are watched.
        loss_fn: `loss_fn(logits, targets, reduction="sum")`, or on hidden states, as in training.
        precision: autocast as in training.
        ranks: who must agree on what was seen.
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
        """Compute loss and gradient of a window and leave everything as it was.

        Args:
            window: this rank's share.
            rng: random numbers to begin with; the current ones if None.
            narrow: False computes in float32 whatever the precision of the training.
            watch: record every module's output and gradient.
        """
        model = self.model
        precision = self.precision if narrow else Precision("fp32", self.precision.device)
        result = Replay()
        parameters = [p for p in model.parameters() if p.requires_grad]
        kept = [p.grad for p in parameters]
        before, was_training = capture_generators(self.precision.device), model.training
        buffers = StateBuffers(model)
        values = buffers.copied()
        try:
            if rng is not None:
                restore_generators(rng)
            model.train()
            for parameter in parameters:
                parameter.grad = None
            # Compiled code calls no hook, and in another precision it would be compiled again.
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
            restore_generators(before)
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
                # The loss scale of fp16 is left out: what it alone breaks is an overflow, no fault.
                (objective / max(window.num_tokens, 1)).backward()  # type: ignore[no-untyped-call]
            total += float(objective.detach())
        return total

    def _objective(self, model: nn.Module, batch: Batch) -> Tensor:
        states = states_for(self.loss_fn, model, batch)
        return summed_objective(states, model, batch["target_ids"], self.loss_fn)

    def bad_rows(self, window: Window, rng: Mapping[str, Any]) -> list[BadRow]:
        """Bisect a window to the sequences of this rank that are not finite on their own."""
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
        """Return the first token whose loss is not finite; dropout is off, so it is a hint."""
        bad = ~torch.isfinite(self._token_losses(batch).flatten())
        return int(bad.nonzero()[0]) if bool(bad.any()) else -1

    def worst_rows(self, window: Window, count: int = 3) -> list[BadRow]:
        """Return the sequences of this rank with the highest mean loss, the worst first.

        Dropout is off. The position is that of the token with the highest loss.
        """
        found = []
        for number, batch in enumerate(window.micro_batches):
            for row, losses in enumerate(self._token_losses(batch)):
                place = BadRow(number, row, int(losses.argmax()))
                found.append((float(losses.mean()), place))
        found.sort(key=lambda entry: -entry[0])
        return [place for _, place in found[:count]]

    def _token_losses(self, batch: Batch) -> Tensor:
        """Return one loss a token, (B, T), without dropout."""
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
        """Find out why a step was not finite; every rank must call it.

        Args:
            window: the step's.
            rng: the random numbers before it.
            good_window: one that was finite shortly before, None if there was none.
            earlier_weights: a context in which the model holds weights of an earlier good state;
                it yields False if there is none. Entered only if it matters.
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
            # Nothing was ever good: where every sequence is bad, the weights are.
            return Diagnosis(DIVERGENCE, first, rows)
        with earlier_weights() as are_there:
            if are_there and not self._any_bad(self.replay(window, rng)):
                return Diagnosis(DATA_WITH_WEIGHTS, first, rows)
        return Diagnosis(DATA, first, rows)

    def _any_bad(self, replay: Replay) -> bool:
        return self.ranks.any(not replay.is_finite)


def window_of(batch: Batch) -> Window:
    """Return one micro-batch as a window."""
    return Window([batch], int((batch["target_ids"] >= 0).sum()))


def read(module: str, kind: str, tensor: Tensor) -> TensorStatistics:
    """Take down what matters of a tensor."""
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
    """Record each module's output as it is made, and the gradient that comes back to it.

    A module's hook runs after those of the modules inside it, so the first bad output in the list
    is that of the innermost module that made it.
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
    """Return the bad gradients that only weights have: no gradient that passed by shows them."""
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
