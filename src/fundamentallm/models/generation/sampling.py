"""From logits to tokens.

A draw has two halves: `probabilities` applies the rules to the logits, and `draw` picks a token by
one uniform number a row. So a row's token depends only on its own logits and number,
not on the rest of the batch.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fundamentallm.errors import NumericalError


@dataclass(frozen=True)
class SamplingRules:
    """How the next token is chosen. The rules apply in the order of the fields.

    Args:
        repetition_penalty: lowers the logits of tokens that the text holds already, > 0: positive
            ones are divided by it, negative ones multiplied (Keskar et al. 2019, "CTRL", section
            4.1, arXiv 1909.05858; it divides both, which would favour a repetition whose logit is
            negative). 1 changes nothing.
        temperature: divides the logits; 0 takes the likeliest token, the first of equals.
        top_k: keep this many of the likeliest tokens, >= 1 (Fan et al. 2018).
        top_p: keep the fewest likeliest tokens whose probability together reaches this, in
            (0, 1] (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751).
        min_p: keep the tokens at least this times as likely as the likeliest, in [0, 1]
            (Nguyen et al. 2024, arXiv 2407.01082).

    Raises:
        ValueError: a rule is out of range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        for name, fine, expected in (
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "finite and above 0"),
            ("temperature", 0 <= self.temperature < math.inf, "finite and at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")


def sample_next(
    logits: Tensor,
    rules: SamplingRules,
    uniforms: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Draw one token a row.

    Args:
        logits: (B, V), unnormalized log-probabilities; -inf rules a token out.
        rules: how to choose.
        uniforms: (B,) float64 in [0, 1), the random numbers; not read at temperature 0.
        seen: (B, V) bool, the tokens that each row's text holds; None: no repetition penalty.

    Returns:
        Token ids (B,) int64.

    Raises:
        ValueError: the logits have another shape, or the random numbers are missing.
        NumericalError: a row has a NaN, a +inf or no finite logit.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (batch, vocabulary), got {tuple(logits.shape)}")
    # Half precision would merge neighbouring probabilities.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    highest = logits.amax(dim=-1, keepdim=True)
    if seen is not None and rules.repetition_penalty != 1:
        logits = torch.where(seen, _penalized(logits, rules.repetition_penalty), logits)
    if rules.temperature == 0:
        tokens = logits.argmax(dim=-1)
    elif uniforms is None:
        raise ValueError("a temperature above 0 needs random numbers, got uniforms None")
    else:
        tokens = draw(probabilities(logits, rules), uniforms)
    # Asked last: the question waits for a GPU, and its work is queued by now.
    if not all(map(math.isfinite, highest.flatten().tolist())):
        raise NumericalError(
            "the model's logits are not finite, so no token can be drawn",
            got=f"a highest logit of {highest[~torch.isfinite(highest)][0].item()}",
            fix="use an earlier checkpoint",
        )
    return tokens


def probabilities(logits: Tensor, rules: SamplingRules) -> Tensor:
    """Return the probabilities (B, V) to draw from, after temperature, top-k, top-p and min-p.

    Args:
        logits: (B, V), finite but for -inf.
        rules: temperature above 0; the repetition penalty is not applied here.
    """
    # Less the maximum, a quotient by a tiny temperature is 0 or -inf, never NaN.
    tiny = torch.finfo(logits.dtype).tiny
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / max(rules.temperature, tiny)
    if rules.top_k is not None:
        scores = _keep_top_k(scores, rules.top_k)
    if rules.top_p is not None and rules.top_p < 1:
        scores = _keep_top_p(scores, rules.top_p)
    if rules.min_p:
        # The highest score is 0: a probability relative to the likeliest is exp(score).
        scores = scores.masked_fill(scores < math.log(rules.min_p), -torch.inf)
    return scores.softmax(dim=-1)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token at which the cumulated probability passes the row's uniform number.

    A token of probability 0 is never drawn.

    Args:
        probabilities: (B, V), each row with a positive sum, which need not be 1.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        Token ids (B,) int64.
    """
    # float32 would lose what the rare tokens of a large vocabulary add.
    cumulated = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulated[:, -1]
    # The product can round up to the total, which no token passes.
    bound = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, bound.unsqueeze(-1), right=True).squeeze(-1)


def _penalized(logits: Tensor, penalty: float) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Set all but the k highest scores of each row to -inf."""
    values, indices = scores.topk(min(top_k, scores.size(-1)), dim=-1)
    return torch.full_like(scores, -torch.inf).scatter(-1, indices, values)


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Set the scores outside the nucleus of each row to -inf."""
    ordered, indices = scores.sort(dim=-1, descending=True, stable=True)
    # The sum of a large vocabulary reaches the bound too early in float32.
    probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
    reached_before = probabilities.cumsum(dim=-1) - probabilities >= top_p
    kept = ordered.masked_fill(reached_before, -torch.inf)
    return torch.empty_like(scores).scatter(-1, indices, kept)
