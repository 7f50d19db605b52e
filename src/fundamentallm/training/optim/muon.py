"""Muon: momentum whose matrices are orthogonalized (Jordan et al. 2024, kellerjordan.github.io/
posts/muon).

The gradient of a linear layer is nearly of low rank: a few directions dominate it. Muon replaces
the update by the nearest orthogonal matrix, which a few matrix products approximate. AdamW updates
the parameters that do not map one hidden space to another: embeddings, the head, vectors, scalars.

Matrices of one shape are orthogonalized in one batched product. One call for each matrix would cost
more than the arithmetic on a CPU, and leave a GPU idle.

Shapes: N matrices of R rows and C columns; `...` any leading dimensions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from fundamentallm.compute.precision import has_bf16

Scale = Literal["spectral", "adamw"]

# Jordan's quintic: after 5 steps singular values from 0.01 to 1 lie within about [0.7, 1.2]. Its
# large slope at 0 matters more than the exact 1 that a convergent polynomial would reach.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_EPS = 1e-10  # for rows and matrices of zeros


def orthogonalize(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """Bring all singular values of each matrix near 1, by a Newton-Schulz iteration.

    X <- a X + (b A + c A^2) X with A = X X^T. It maps each singular value s to
    a s + b s^3 + c s^5 and keeps the singular vectors.

    Args:
        matrices: (..., R, C) floating point; the products are computed in its dtype.
        num_steps: iterations, >= 1.

    Returns:
        (..., R, C); a matrix of zeros stays 0.
    """
    a, b, c = _QUINTIC
    *_, rows, columns = matrices.shape
    tall = rows > columns
    x = (matrices.mT if tall else matrices).reshape(-1, min(rows, columns), max(rows, columns))
    # The iteration needs singular values of at most 1; the Frobenius norm bounds the largest.
    # Squares of numbers below 1e-18 underflow in float32; such a matrix is left near 0.
    x = x / torch.linalg.matrix_norm(x.float(), keepdim=True).clamp(min=1e-18).to(x.dtype)
    for _ in range(num_steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


class Muon(Optimizer):
    """Muon for one parameter group, AdamW for the others, with one common state.

    For a matrix with gradient g and momentum m: m <- mu m + (1 - mu) g. The update is
    `orthogonalize` of (1 - mu) g + mu m with Nesterov, else of m. Then
    w <- (1 - lr decay) w - lr s update, with a scale s that depends on the shape.

    With `row_beta` each row of the update is divided by the root of a running mean of its squares,
    and the matrix keeps its norm: neurons whose rows stay short get as much of the step as the
    others (NorMuon, Li et al. 2025, arXiv 2510.05491, algorithm 1, which scales to a fixed norm).

    Args:
        matrices: a parameter group, of weights with at least two dimensions (the last two are the
            matrix), with `lr` and `weight_decay`.
        others: parameter groups for `torch.optim.AdamW`, with its options.
        momentum: mu, in [0, 1).
        nesterov: use Nesterov momentum.
        num_steps: iterations of `orthogonalize`, >= 1.
        scale: "spectral": s = sqrt(max(1, R / C)), as Jordan; "adamw": s = 0.2 sqrt(max(R, C)),
            which gives the root mean square of a usual AdamW update, so that AdamW's learning
            rates can be used (Liu et al. 2025, "Muon is scalable", section 2.2).
        dtype: in which matrices are orthogonalized; None: bfloat16 on a GPU that has it, else the
            gradient's, at least float32.
        row_beta: share of the past in the mean square of a row, in [0, 1); None: rows stay as they
            are.

    Raises:
        ValueError: an argument is out of range, or a parameter in `matrices` has fewer than two
            dimensions.
    """

    def __init__(
        self,
        matrices: dict[str, Any],
        others: list[dict[str, Any]],
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        num_steps: int = 5,
        scale: Scale = "spectral",
        dtype: torch.dtype | None = None,
        row_beta: float | None = None,
    ) -> None:
        if not 0 <= (row_beta or 0) < 1:
            raise ValueError(f"row_beta must be in [0, 1), got {row_beta}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if any(weight.ndim < 2 for weight in matrices["params"]):
            raise ValueError("Muon updates matrices; vectors and scalars go to AdamW")
        # AdamW does the arithmetic; the state of its parameters is stored in this optimizer.
        self._adamw = optim.AdamW(others) if others else None
        group = {**matrices, "momentum": momentum, "nesterov": nesterov, "num_steps": num_steps}
        group["scale"] = scale
        super().__init__([group, *(self._adamw.param_groups if self._adamw else [])], {})
        self.dtype, self.row_beta = dtype, row_beta

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_matrices(self.param_groups[0])
        if self._adamw is not None:
            # `load_state_dict` replaces the groups and the state.
            self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state
            self._adamw.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        gradients = [weight.grad for weight in weights]
        momenta = [self._momentum(weight) for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates: Sequence[Tensor] = momenta
        if group["nesterov"]:
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])

        of_one_shape = defaultdict(list)
        for weight, update in zip(weights, updates, strict=True):
            of_one_shape[weight.shape, weight.device].append((weight, update))
        for (shape, device), pairs in of_one_shape.items():
            batch, raw = zip(*pairs, strict=True)
            stacked = torch.stack(raw).to(self._dtype_on(device, raw[0].dtype))
            orthogonal = orthogonalize(stacked, group["num_steps"]).to(batch[0].dtype)
            if self.row_beta is not None:
                orthogonal = self._with_even_rows(batch, orthogonal, self.row_beta)
            step = group["lr"] * _scale(group["scale"], shape)
            torch._foreach_mul_(batch, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(batch, list(orthogonal.unbind()), alpha=-step)

    def _with_even_rows(self, weights: Sequence[Tensor], updates: Tensor, beta: float) -> Tensor:
        """Return updates (N, ..., R, C), their rows divided by running root mean squares."""
        means = [self._row_squares(weight) for weight in weights]
        squares = updates.square().mean(dim=-1, keepdim=True)
        torch._foreach_lerp_(means, list(squares.unbind()), 1 - beta)
        even = updates / (torch.stack(means).sqrt() + _EPS)
        before, after = (torch.linalg.matrix_norm(x, keepdim=True) for x in (updates, even))
        scaled: Tensor = even * (before / (after + _EPS))
        return scaled

    def _row_squares(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "row_squares" not in state:
            state["row_squares"] = torch.zeros_like(weight[..., :1])
        squares: Tensor = state["row_squares"]
        return squares

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        momentum: Tensor = state["momentum"]
        return momentum

    def _dtype_on(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        if device.type == "cuda" and has_bf16(device):
            return torch.bfloat16
        return torch.promote_types(dtype, torch.float32)


def hidden_matrices(model: nn.Module, linear_weights: list[nn.Parameter]) -> list[nn.Parameter]:
    """Return those linear weights that map one hidden space to another.

    `model.head` and weights shared with an embedding are left out: each of their rows belongs to
    one token. In a model without `head`, the last linear layer counts as the head if it has as many
    rows as an embedding.

    Args:
        model: the model.
        linear_weights: candidates; those of one dimension are left out.
    """
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    tables = {id(embedding.weight) for embedding in embeddings}
    head = getattr(model, "head", None)
    if head is None:
        sizes = {embedding.num_embeddings for embedding in embeddings}
        *_, last = [None, *(m for m in model.modules() if isinstance(m, nn.Linear))]
        head = last if last is not None and last.out_features in sizes else None
    if isinstance(head, nn.Module):
        tables |= {id(parameter) for parameter in head.parameters()}
    return [weight for weight in linear_weights if id(weight) not in tables and weight.ndim >= 2]


def _scale(scale: Scale, shape: torch.Size) -> float:
    rows, columns = shape[-2:]
    return (
        math.sqrt(max(1.0, rows / columns))
        if scale == "spectral"
        else 0.2 * math.sqrt(max(rows, columns))
    )
