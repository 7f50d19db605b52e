"""From logits to tokens.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fundamentallm.errors import NumericalError


def sample_next(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row.

    The rules apply in this order: temperature, top-k, top-p.

    Args:
        logits: (B, V), unnormalized log-probabilities; -inf rules a token out.
        temperature: divides the logits; 0 takes the likeliest token, the first of equals.
        top_k: keep this many of the likeliest tokens, >= 1 (Fan et al. 2018).
        top_p: keep the fewest likeliest tokens whose probability together reaches this, in
            (0, 1] (nucleus sampling, Holtzman et al. 2020).
        generator: draws the random numbers, on the device of the logits; torch's global one if
            None.

    Returns:
        Token ids (B,) int64.

    Raises:
        ValueError: an argument is out of range.
        NumericalError: a row has a NaN, a +inf or no finite logit.
    """
    _check_rules(temperature, top_k, top_p)
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (batch, vocabulary), got {tuple(logits.shape)}")
    # Half precision would merge neighbouring probabilities.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    highest = logits.amax(dim=-1, keepdim=True)
    if not torch.isfinite(highest).all():
        raise NumericalError(
            "the model's logits are not finite, so no token can be drawn",
            got=f"a highest logit of {highest[~torch.isfinite(highest)][0].item()}",
            fix="use an earlier checkpoint",
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Less the maximum, a quotient by a tiny temperature is 0 or -inf, never NaN.
    tiny = torch.finfo(logits.dtype).tiny
    scores = (logits - highest) / max(temperature, tiny)
    if top_k is not None:
        scores = _keep_top_k(scores, top_k)
    if top_p is not None:
        scores = _keep_top_p(scores, top_p)
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def generate_tokens(
    model: nn.Module,
    prompt_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue prompts, one token at a time.

    Each step runs without gradients and in evaluation mode; between steps the modes of all
    modules are as they were. The global random state is never touched.

    Args:
        model: maps (B, T) int64 ids to logits (B, T, V). It sees the last `model.sequence_length`
            tokens, or all of them if it has no such attribute.
        prompt_ids: (B, T0) int64 on the model's device, T0 >= 1; any length.
        max_new_tokens: tokens to draw for each prompt, >= 0.
        temperature, top_k, top_p: as in `sample_next`.
        generator: on the device of the prompt; a fresh one with a seed of chance if None.

    Returns:
        An iterator over `max_new_tokens` tensors of ids (B,) int64.

    Raises:
        ValueError: an argument is out of range, at the call, before the first token.
        NumericalError: as in `sample_next`, while iterating.
    """
    _check_rules(temperature, top_k, top_p)
    if prompt_ids.ndim != 2 or prompt_ids.size(1) == 0:
        raise ValueError(
            f"prompt_ids must have shape (batch, time) with at least one token, "
            f"got {tuple(prompt_ids.shape)}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if generator is None:
        generator = torch.Generator(device=prompt_ids.device)
        generator.seed()
    context: int | None = getattr(model, "sequence_length", None)

    def steps() -> Iterator[Tensor]:
        ids = prompt_ids
        for _ in range(max_new_tokens):
            if context is not None:
                ids = ids[:, -context:]
            # The contexts close before the yield: the caller must not find itself inside them.
            with torch.no_grad(), _evaluation_mode(model):
                token = sample_next(
                    model(ids)[:, -1],
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    generator=generator,
                )
            ids = torch.cat((ids, token.unsqueeze(1)), dim=1)
            yield token

    return steps()


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Set all but the k highest scores of each row to -inf."""
    values, indices = scores.topk(min(top_k, scores.size(-1)), dim=-1)
    return torch.full_like(scores, -torch.inf).scatter(-1, indices, values)


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Set the scores outside the nucleus of each row to -inf."""
    ordered, indices = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    reached_before = probabilities.cumsum(dim=-1) - probabilities >= top_p
    kept = ordered.masked_fill(reached_before, -torch.inf)
    return torch.empty_like(scores).scatter(-1, indices, kept)


def _check_rules(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
