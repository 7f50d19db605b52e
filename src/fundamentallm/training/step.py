"""One optimizer step: the only code that touches gradients.

- The loss of a window is the sum over its valid targets divided by their count N over all
  micro-batches and ranks, so that any split of the same tokens gives the same gradient
  (huggingface/transformers#34191 tells what a mean of means costs).
  For a single batch with `labels` it equals the loss that a model of `transformers` computes.
- Gradients are checked before the update. A refused update leaves weights and optimizer
  untouched.
- One host read a step: loss and gradient norm, packed, after they were summed over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision
from fundamentallm.compute.rng import capture_rng, restore_rng
from fundamentallm.data.batch import Window
from fundamentallm.events import TrainingEvents
from fundamentallm.models.calling import inputs_for, logits_of, needed_by
from fundamentallm.training.losses import compute_loss, takes_hidden_states

Batch = dict[str, Tensor]


class StepOutput(float):
    """What one optimizer step did, in host numbers.

    It is a float, the loss: handlers that take the engine's output for a number, as most of
    Ignite's do, need no transform.

    Attributes:
        loss: negative log-likelihood in nats per valid token of the window, over all ranks;
            for any objective (for example with label smoothing).
        grad_norm: global L2 norm of the gradient before clipping.
        num_tokens: valid target tokens of the window over all ranks.
        num_sequences: sequences of the window over all ranks.
        rejection: empty if the update was applied, else why not: "nonfinite" (loss or gradient),
            "overflow" (the fp16 loss scale was too large, which is expected now and then),
            "empty" (no valid token), "ledger" (a window to be skipped), "learning rate" (it is not
            finite), or a controller's reason.
        details: what the controller saw, in words; empty without one.
    """

    __slots__ = ("details", "grad_norm", "loss", "num_sequences", "num_tokens", "rejection")

    loss: float
    grad_norm: float
    num_tokens: int
    num_sequences: int
    rejection: str
    details: str

    def __new__(
        cls,
        loss: float,
        grad_norm: float,
        num_tokens: int,
        num_sequences: int,
        rejection: str = "",
        details: str = "",
    ) -> StepOutput:
        """Return an output that counts as the number `loss`."""
        output = super().__new__(cls, loss)
        output.loss = loss
        output.grad_norm = grad_norm
        output.num_tokens = num_tokens
        output.num_sequences = num_sequences
        output.rejection = rejection
        output.details = details
        return output

    def __getnewargs__(self) -> tuple[float, float, int, int, str, str]:  # type: ignore[override]
        """Return what a copy is made from."""
        return (
            self.loss,
            self.grad_norm,
            self.num_tokens,
            self.num_sequences,
            self.rejection,
            self.details,
        )


class TrainStep:
    """Forward, backward, guard, clip, update.

    Args:
        forward: takes `input_ids` (B, T) int64 and returns logits (B, T, V): the model, or the
            model wrapped for compilation or in `DistributedDataParallel`.
        model: the model itself.
        optimizer: updates the model's parameters.
        loss_fn: `loss_fn(logits, targets, reduction="sum")`. Attribute `is_nll` (default False)
            says that the value is the plain negative log-likelihood, so that it need not be
            computed again for the log; `takes_hidden_states` (default False) asks for
            `loss_fn(hidden, model, targets, reduction="sum")`.
        precision: compute type and loss scaling.
        ranks: the ranks over which loss and votes are summed.
        max_grad_norm: clip the global gradient norm to this; None leaves it.
        max_grad_value: clip each element of the gradient to this; None leaves it.
        notify: called with each event as it happens.

    Attributes:
        loss: of the current step batch in nats per token over all ranks. It is there from
            FLLM_GRADIENTS_READY on, before the step is accepted.
        norm: of its gradient, before clipping, as a host number; likewise.
        clip_norm: the norm that the current update is clipped to; None for no clipping.
        veto: a controller's reason to refuse the current update; set at FLLM_GRADIENTS_READY.
        veto_details: what it saw, in words.
        vetoes_possible: whether some rank has such a controller, so that all must vote.
    """

    def __init__(
        self,
        forward: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., Tensor],
        precision: Precision,
        ranks: Ranks,
        max_grad_norm: float | None,
        notify: Callable[[TrainingEvents], None],
        max_grad_value: float | None = None,
    ) -> None:
        self.forward = forward
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.precision = precision
        self.ranks = ranks
        self.max_grad_norm = max_grad_norm
        self.notify = notify
        self.max_grad_value = max_grad_value
        self.grad_norm: Tensor | None = None
        self.loss = math.nan
        self.norm = math.nan
        self.clip_norm = max_grad_norm
        self.veto = self.veto_details = ""
        self.vetoes_possible = False
        self._bad_rate_somewhere = False
        self._seed: tuple[float, Tensor] | None = None
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        kinds = {(p.device.type, p.dtype) for p in self._parameters}
        self._norm = _plain_norm if kinds <= _FOREACH_KINDS else nn.utils.get_total_norm

    def __call__(self, window: Window, num_tokens: int, num_sequences: int) -> StepOutput:
        """Take one step on this rank's share of a window.

        Args:
            window: this rank's micro-batches; every rank has equally many.
            num_tokens: N, valid targets of the window over all ranks.
            num_sequences: sequences of the window over all ranks.
        """
        if num_tokens == 0:
            return self._refused(StepOutput(math.nan, math.nan, 0, num_sequences, "empty"))
        self.veto = self.veto_details = ""
        self.clip_norm = self.max_grad_norm
        nll = self._accumulate(window, num_tokens)
        self.precision.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self.grad_norm = self._norm(gradients)
        self.loss, self.norm = self._agree(nll, self.grad_norm, num_tokens)
        self.notify(TrainingEvents.FLLM_GRADIENTS_READY)

        rejection = self._judge()
        details = self.veto_details if rejection == self.veto else ""
        output = StepOutput(self.loss, self.norm, num_tokens, num_sequences, rejection, details)
        if rejection:
            self.precision.update(adapt=rejection == "overflow")
            return self._refused(output)
        # A norm safely below the limit would be a multiplication by 1.
        if self.clip_norm is not None and not self.norm * 1.001 + 1e-5 < self.clip_norm:
            nn.utils.clip_grads_with_norm_(self._parameters, self.clip_norm, self.grad_norm)
        if self.max_grad_value is not None:
            nn.utils.clip_grad_value_(self._parameters, self.max_grad_value)
        self.precision.step(self.optimizer)
        self.precision.update()
        self.notify(TrainingEvents.FLLM_OPTIMIZER_STEPPED)
        return output

    def clip_to(self, norm: float) -> None:
        """Clip the current update to a gradient norm, if that is less than it would be clipped to.

        Call it at FLLM_GRADIENTS_READY.

        Raises:
            ValueError: the norm is not a number above 0.
        """
        if not norm > 0.0:
            raise ValueError(f"the norm must be a number above 0, got {norm}")
        self.clip_norm = norm if self.clip_norm is None else min(norm, self.clip_norm)

    def _accumulate(self, window: Window, num_tokens: int) -> Tensor:
        """Add up the window's gradient; return this rank's summed NLL, a scalar."""
        self._clear_gradients()
        # DDP averages over the ranks, so the world size makes the sum whole again.
        scale = self.ranks.world_size / num_tokens
        device = next(iter(self._parameters)).device
        total: Tensor | None = None
        last = len(window.micro_batches) - 1
        for index, batch in enumerate(window.micro_batches):
            with self._gradient_sync(index == last), self.precision.weights(self.model):
                on_device = to_device(needed_by(self.model, batch), device)
                objective, nll = self._objective(on_device)
                self._backward(objective, scale)
            total = nll if total is None else total.to(accumulator(device)) + nll
            self.notify(TrainingEvents.FLLM_MICRO_BATCH_COMPLETED)
        assert total is not None, "a window has at least one micro-batch"
        return total

    def _backward(self, objective: Tensor, scale: float) -> None:
        """Add the gradient of the objective times `scale`."""
        if self.precision.scaler is not None:
            self.precision.scale(objective * scale).backward()  # type: ignore[no-untyped-call]
            return
        # The scale enters as the gradient of the objective: the product itself is not asked for.
        kept = self._seed
        if kept is None or kept[0] != scale or kept[1].dtype != objective.dtype:
            kept = self._seed = (scale, torch.full_like(objective.detach(), scale))
        objective.backward(kept[1])  # type: ignore[no-untyped-call]

    def _objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed objective, with its graph, and the summed NLL, without."""
        targets = batch["target_ids"]
        with self.precision.autocast():
            states = states_for(self.loss_fn, self.model, batch, self.forward)
            objective = summed_objective(states, self.model, targets, self.loss_fn)
        if getattr(self.loss_fn, "is_nll", False):
            return objective, objective.detach()
        with torch.no_grad(), self.precision.autocast():
            return objective, summed_nll(states.detach(), self.model, targets, self.loss_fn)

    def _gradient_sync(self, wanted: bool) -> AbstractContextManager[None]:
        if isinstance(self.forward, DistributedDataParallel) and not wanted:
            return self.forward.no_sync()
        return nullcontext()

    def _agree(self, nll: Tensor, grad_norm: Tensor, num_tokens: int) -> tuple[float, float]:
        """Sum over the ranks and read once. NaN and infinity survive a sum: that is the vote."""
        if self.ranks.alone and nll.device.type == "cpu":  # nothing to wait for: packing costs more
            return nll.item() / num_tokens, grad_norm.item()
        nll = nll.to(accumulator(nll.device))
        bad_rate = torch.full_like(nll, not self._rates_are_finite())
        mine = [nll / num_tokens, grad_norm.to(nll.dtype) / self.ranks.world_size, bad_rate]
        loss, norm, bad_rates = self.ranks.sum_tensor(torch.stack(mine)).tolist()
        self._bad_rate_somewhere = bad_rates > 0
        return loss, norm

    def _rates_are_finite(self) -> bool:
        for group in self.optimizer.param_groups:  # noqa: SIM110 (all() would make a generator)
            if not math.isfinite(group["lr"]):
                return False
        return True

    def _judge(self) -> str:
        # A single rank may check this late; several ranks can only act on what they agreed on.
        if not self._rates_are_finite() if self.ranks.alone else self._bad_rate_somewhere:
            return "learning rate"
        if not math.isfinite(self.loss):
            return "nonfinite"
        if not math.isfinite(self.norm):
            # With a finite loss an infinite scaled gradient says that the loss scale is too high.
            return "overflow" if self.precision.may_overflow else "nonfinite"
        if self.vetoes_possible and not self.ranks.alone and self.ranks.any(bool(self.veto)):
            return self.veto or "rejected on another rank"
        return self.veto

    def _refused(self, output: StepOutput) -> StepOutput:
        self._clear_gradients()
        return output

    def _clear_gradients(self) -> None:
        # As zero_grad does, which looks for a profiler and for hooks first: 0.1 ms with the cold
        # caches that a step leaves behind.
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def states_for(
    loss_fn: Callable[..., Tensor] | None,
    model: nn.Module,
    batch: Batch,
    forward: nn.Module | None = None,
) -> Tensor:
    """Compute what a loss takes: hidden states (B, T, D), or logits (B, T, V).

    Args:
        loss_fn: the objective.
        model: the model; its `forward` tells what of the batch it takes.
        batch: a micro-batch on the model's device.
        forward: the model as it is wrapped for compilation or ranks; None for the model itself.
    """
    options = {"return_hidden": True} if takes_hidden_states(loss_fn) else {}
    call = model if forward is None else forward
    return logits_of(call(batch["input_ids"], **options, **inputs_for(model, batch)))


def summed_objective(
    states: Tensor, model: nn.Module, targets: Tensor, loss_fn: Callable[..., Tensor]
) -> Tensor:
    """Return the objective summed over the valid targets; arguments as for `summed_nll`."""
    head = (model,) if takes_hidden_states(loss_fn) else ()
    return loss_fn(states, *head, targets, reduction="sum")


def summed_nll(
    states: Tensor, model: nn.Module, targets: Tensor, loss_fn: Callable[..., Tensor] | None
) -> Tensor:
    """Return the summed negative log-likelihood, for any objective.

    Args:
        states: hidden states (B, T, D) if the loss takes those, else logits (B, T, V).
        model: holds the head.
        targets: (B, T) int64; negative ones are left out.
        loss_fn: the objective; one that takes hidden states has `nll(hidden, model, targets)`.
    """
    if takes_hidden_states(loss_fn):
        return loss_fn.nll(states, model, targets)  # type: ignore[union-attr, no-any-return]
    return compute_loss(states, targets, reduction="sum")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode; restore each module's mode and every RNG after."""
    modes = [(module, module.training) for module in model.modules()]
    rng = capture_rng()
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        restore_rng(rng)


def to_device(batch: Any, device: torch.device) -> Batch:
    """Move a batch's tensors; asynchronously where the host memory is pinned."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def perplexity_of(loss: float) -> float:
    """Return exp(loss), infinity where that is beyond float64, NaN for NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per(nll: float, size: float) -> float:
    """Return the bits for each of so many bytes or characters, from nats for all of them."""
    return nll / math.log(2) / size


# A mixture of kinds must be sorted first.
_FOREACH_KINDS = {("cpu", torch.float32)}


@torch.no_grad()
def _plain_norm(gradients: list[Tensor]) -> Tensor:
    """Return what `nn.utils.get_total_norm` does, without its sorting by device and type."""
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients, 2.0)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), 2.0)
    return norm


def accumulator(device: torch.device) -> torch.dtype:
    """Return the type that sums are taken in on a device."""
    return torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
