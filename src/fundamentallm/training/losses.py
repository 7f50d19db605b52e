"""Cross-entropy over a vocabulary, in nats.

- A negative target is masked: it adds nothing to the loss, the gradient or the count.
- Without a valid target the loss is 0 and zero gradients, never NaN.
- Half-precision logits are widened to float32 first; a sum of thousands of bfloat16 terms keeps
  two or three digits.
- `ChunkedCrossEntropy` gives the same numbers without ever holding the logits of a whole batch.

Shapes: B batch, T time, D model width, V vocabulary; `...` any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fundamentallm.config.base import Count, NonNegative, Share
from fundamentallm.registry import Registry

Reduction = Literal["mean", "sum", "none", "sample"]

LOSSES: Registry[Callable[..., Tensor]] = Registry("loss")

_MASKED = -1  # what every negative target is made, since `F.cross_entropy` ignores one value
_CHUNK_TOKENS = 1024


class Head(Protocol):
    """A model that can turn final hidden states into logits."""

    def logits_from_hidden(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., D) to logits (..., V)."""
        ...


def takes_hidden_states(loss_fn: Callable[..., Tensor] | None) -> bool:
    """Whether a loss is called with hidden states and the model in place of logits."""
    return bool(getattr(loss_fn, "takes_hidden_states", False))


def compute_loss(
    logits: Tensor,
    targets: Tensor,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the cross-entropy of targets under softmax(logits).

    With smoothing eps the target distribution is the mixture (1 - eps) * one-hot + eps * uniform
    (Szegedy et al. 2016, section 7): (1 - eps) * nll + eps * mean over V of -log p. The z-term
    adds z_loss * (log of the sum of exp(logits))^2, which keeps logits from drifting away
    (Chowdhery et al. 2022, "PaLM", section 5, with 1e-4).

    Args:
        logits: (..., V) floating point.
        targets: (...) integers below V; every negative one is masked.
        reduction: "mean" over valid targets, "sum", "none" (one loss a target, 0 where masked),
            or "sample" (each sequence's mean over its valid targets: (B, T) gives (B,)).
        label_smoothing: eps in [0, 1).
        z_loss: weight of the z-term, 0 for none.

    Returns:
        Nats, in float64 for float64 logits, else in float32.

    Raises:
        ValueError: an unknown reduction, a smoothing or weight out of range, or shapes or types
            that do not belong together.
    """
    _check_terms(label_smoothing, z_loss)
    _check_targets("logits", logits, targets, reduction)
    if reduction == "sum" and not (label_smoothing or z_loss):
        # The common case of training: one operation, without a loss per token.
        return _cross_entropy(logits, targets, "sum")
    losses = _token_losses(logits, targets, label_smoothing, z_loss)
    return _reduce(losses, targets, reduction)


@LOSSES.register("cross_entropy")
class LanguageModelingLoss:
    """Cross-entropy, in nats a token, from logits: `compute_loss` with its options chosen once.

    Args:
        label_smoothing: weight of the uniform distribution in the target, in [0, 1).
        z_loss: weight of the z-term, as 1e-4; 0 for none. See `compute_loss`.

    Attributes:
        is_nll: whether the value is the plain negative log-likelihood (neither of the two).
        takes_hidden_states: False; the loss is called with logits.
    """

    takes_hidden_states = False

    def __init__(self, label_smoothing: Share = 0.0, z_loss: NonNegative = 0.0) -> None:
        _check_terms(label_smoothing, z_loss)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.is_nll = label_smoothing == 0 and z_loss == 0

    def __call__(self, logits: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the loss of logits (..., V) for targets (...); see `compute_loss`."""
        return compute_loss(logits, targets, reduction, self.label_smoothing, self.z_loss)


@LOSSES.register("chunked_cross_entropy")
class ChunkedCrossEntropy:
    """Cross-entropy from hidden states, a few tokens' logits at a time.

    Each chunk's logits live only while its loss is computed and are computed again in the
    backward pass, so that memory grows with chunk_tokens * V in place of B * T * V. Value and
    gradients equal those of `LanguageModelingLoss`, at the cost of one more head multiplication.

    Args:
        chunk_tokens: tokens whose logits exist at one time, >= 1.
        label_smoothing: weight of the uniform distribution in the target, in [0, 1).
        z_loss: weight of the z-term, as 1e-4; 0 for none. See `compute_loss`.

    Attributes:
        is_nll: whether the value is the plain negative log-likelihood (neither of the two).
        takes_hidden_states: True; the loss is called with hidden states and the model.
    """

    takes_hidden_states = True

    def __init__(
        self,
        chunk_tokens: Count = _CHUNK_TOKENS,
        label_smoothing: Share = 0.0,
        z_loss: NonNegative = 0.0,
    ) -> None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        _check_terms(label_smoothing, z_loss)
        self.chunk_tokens = chunk_tokens
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.is_nll = label_smoothing == 0 and z_loss == 0

    def __call__(
        self, hidden: Tensor, model: Head, targets: Tensor, reduction: Reduction = "sum"
    ) -> Tensor:
        """Return the loss of the model's head on hidden states.

        Args:
            hidden: (..., D), the model's output before its head.
            model: owns the head; without a wrapper for ranks, which would hide the method.
            targets: (...) integers; every negative one is masked.
            reduction: as in `compute_loss`.

        Raises:
            ValueError: as in `compute_loss`.
        """
        return self._loss(hidden, model, targets, reduction, self.label_smoothing, self.z_loss)

    def nll(self, hidden: Tensor, model: Head, targets: Tensor) -> Tensor:
        """Return the summed negative log-likelihood, without other terms, as a scalar."""
        return self._loss(hidden, model, targets, "sum", 0.0, 0.0)

    def _loss(
        self,
        hidden: Tensor,
        model: Head,
        targets: Tensor,
        reduction: Reduction,
        smoothing: float,
        z_loss: float,
    ) -> Tensor:
        _check_targets("hidden states", hidden, targets, reduction)

        def chunk_losses(hidden_chunk: Tensor, target_chunk: Tensor) -> Tensor:
            logits = model.logits_from_hidden(hidden_chunk)
            return _token_losses(logits, target_chunk, smoothing, z_loss)

        chunks = zip(
            torch.split(hidden.reshape(-1, hidden.size(-1)), self.chunk_tokens),
            torch.split(targets.reshape(-1), self.chunk_tokens),
            strict=True,
        )
        losses = [cast(Tensor, checkpoint(chunk_losses, *c, use_reentrant=False)) for c in chunks]
        return _reduce(torch.cat(losses).reshape(targets.shape), targets, reduction)


def token_nll(
    states: Tensor, model: nn.Module, targets: Tensor, loss_fn: Callable[..., Tensor]
) -> Tensor:
    """Return the negative log-likelihood of each target, in its shape (...), 0 where it is masked.

    Args:
        states: hidden states (..., D) if the loss takes those, else logits (..., V).
        model: owns the head.
        targets: (...) integers; every negative one is masked.
        loss_fn: the objective; one that takes hidden states never has all logits made here either.
    """
    if not takes_hidden_states(loss_fn):
        return compute_loss(states, targets, "none")
    chunk_tokens = getattr(loss_fn, "chunk_tokens", _CHUNK_TOKENS)
    return ChunkedCrossEntropy(chunk_tokens)(states, cast(Head, model), targets, "none")


def _token_losses(logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Return one loss per target, in its shape (...), 0 where it is masked."""
    losses = _cross_entropy(logits, targets, "none", label_smoothing).reshape(targets.shape)
    if z_loss:
        losses = losses + z_loss * (widened(logits).logsumexp(-1) ** 2).masked_fill(
            targets < 0, 0.0
        )
    return losses


def _cross_entropy(
    logits: Tensor, targets: Tensor, reduction: str, label_smoothing: float = 0.0
) -> Tensor:
    return F.cross_entropy(
        widened(logits).reshape(-1, logits.size(-1)),
        targets.long().clamp_min(_MASKED).reshape(-1),
        ignore_index=_MASKED,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def widened(logits: Tensor) -> Tensor:
    """Return logits in float32 where they are in half precision, else as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _reduce(losses: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    valid = targets >= 0
    # Without a valid target the sum is 0 already, and 0 / 1 keeps it so.
    if reduction == "sample":
        return losses.sum(-1) / valid.sum(-1).clamp(min=1)
    return losses.sum() / valid.sum().clamp(min=1)


def _check_terms(label_smoothing: float, z_loss: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, got {z_loss}")


def _check_targets(name: str, scores: Tensor, targets: Tensor, reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"unknown reduction {reduction!r}, expected one of {', '.join(get_args(Reduction))}"
        )
    if scores.ndim == 0 or scores.shape[:-1] != targets.shape:
        raise ValueError(
            f"{name} of shape {tuple(scores.shape)} do not fit targets of shape "
            f"{tuple(targets.shape)}: all but the last dimension must be equal"
        )
    if reduction == "sample" and targets.ndim == 0:
        raise ValueError("reduction 'sample' needs targets with a time dimension, got a scalar")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, got {targets.dtype}")
