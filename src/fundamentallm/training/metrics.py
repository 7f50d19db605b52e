"""Metrics of the validation pass that a configuration chooses by name.

A metric is one of Ignite's, or a subclass of `ignite.metrics.Metric` with the same three methods:

```python
@METRICS.register("mean_rank")
class MeanRank(Metric):
    def __init__(self, device="cpu") -> None: ...      # further parameters are its options
    def reset(self) -> None: ...
    def update(self, output) -> None: ...              # y_pred (N, V) logits, y (N,) targets
    def compute(self) -> float: ...                    # decorated with @sync_all_reduce
```

and `evaluation: {metrics: {mean_rank: {}}}` writes `val/mean_rank` wherever `val/loss` goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

import torch
from ignite.metrics import Accuracy, Entropy, Metric, TopKCategoricalAccuracy

from fundamentallm.config.base import Count
from fundamentallm.config.evaluation import TAKEN_NAMES
from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.registry import Registry

METRICS: Registry[Metric] = Registry("metric", supplied=("device", "tokenizer"))


@METRICS.register("accuracy")
def accuracy(device: torch.device) -> Metric:
    """The share of targets that are the most probable token."""
    return Accuracy(device=device)


@METRICS.register("top_k")
def top_k(device: torch.device, tokenizer: Tokenizer, k: Count = 5) -> Metric:
    """The share of targets among the k most probable tokens.

    Args:
        device: where the share is summed.
        tokenizer: the one of the run.
        k: how many tokens count, 1 to the size of the vocabulary.

    Raises:
        ValueError: k is below 1 or above the size of the vocabulary.
    """
    if not 1 <= k <= tokenizer.vocab_size:
        raise ValueError(f"k must be 1 to {tokenizer.vocab_size}, the vocabulary, got {k}")
    return TopKCategoricalAccuracy(k, device=device)


@METRICS.register("entropy")
def entropy(device: torch.device) -> Metric:
    """The mean entropy of the predicted distribution, in nats.

    A calibrated model's entropy equals its loss; less means that it is too certain.
    """
    return Entropy(device=device)


def named_metrics(metrics: Mapping[str, object]) -> str:
    """Return the numbers among the metrics of a validation pass besides its own, for a line."""
    own = [f"val/{name}" for name in TAKEN_NAMES]
    return "".join(
        f", {name.removeprefix('val/')} {number:.4g}"
        for name, number in numbers_in(metrics).items()
        if name.startswith("val/") and name not in own
    )


def numbers_in(results: Mapping[str, object]) -> dict[str, float]:
    """Return the results that are numbers, in their order; a metric may give a tensor or text."""
    return {name: float(value) for name, value in results.items() if isinstance(value, Real)}
