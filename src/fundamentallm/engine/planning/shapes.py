"""The models that a plan chooses from: the configured one, narrower and wider."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fundamentallm.config import RunConfig, TransformerConfig
from fundamentallm.models.build import estimate_model

MOST_HEADS, WIDEST = 12, 3  # heads; times the configured width, if that is more
GROWTH = 1.19  # in width, from one model to the next: about 1.7 in parameters


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of some size.

    Attributes:
        values: the fields of `model` that give it this size; empty for the configured one.
        parameters: their number, embeddings included.
        flops: floating-point operations of training for a token.
    """

    values: Mapping[str, Any]
    parameters: int
    flops: int

    def applied_to(self, config: RunConfig) -> RunConfig:
        """Return a configuration with a model of this size."""
        return config.model_copy(
            update={"model": config.model.model_copy(update=dict(self.values))}
        )


def shapes_of(config: RunConfig) -> list[Shape]:
    """Return the models to choose from, the smallest first.

    The width of a head, the ratio of width to depth, and the widths of the feed-forward and the
    keys in relation to the model's are those of the configured model. A family without a known
    shape has one size.

    Args:
        config: with `vocab_size` and `sequence_length` resolved.
    """
    model = config.model
    if not isinstance(model, TransformerConfig):
        return [shape_of(config, {})]
    group = model.num_heads // model.kv_heads
    widest = max(MOST_HEADS, WIDEST * model.num_heads) // group
    counts, count = {model.kv_heads}, 1
    while count <= widest:
        counts.add(count)
        count = max(count + 1, round(GROWTH * count))
    shapes = []
    for count in counts:
        heads = count * group
        scale = heads / model.num_heads
        values = {
            "d_model": model.head_width * heads,
            "num_layers": max(1, round(model.num_layers * scale)),
            "num_heads": heads,
        }
        if model.num_kv_heads is not None:
            values["num_kv_heads"] = count
        if model.d_ff is not None:
            values["d_ff"] = max(8, 8 * round(model.d_ff * scale / 8))
        shapes.append(shape_of(config, {} if heads == model.num_heads else values))
    return sorted(shapes, key=lambda shape: shape.parameters)


def shape_of(config: RunConfig, values: Mapping[str, Any]) -> Shape:
    """Return the configured model with some fields of its own."""
    sized = config.model.model_copy(update=dict(values))
    cost = estimate_model(sized, batch_size=1, optimizer_states=0)
    return Shape(values, cost.parameters, cost.flops_per_token)
