"""Positions: how a token's place in the text enters the computation.

Attention sees an unordered set. A `Positions` may act at two places, and leaves the one that
it does not need as it is: `embed` adds to the embeddings, once; `rotate` turns the queries and
keys of every layer. Generation with a cache computes tokens that do not start at position 0; `at`
gives it the same two methods for the positions that it names.

Shapes: B batch, T time, D model width, H query heads, G key heads, K head width.

A position encoding of yours is one decorated subclass that overrides either:

```python
@POSITIONS.register("none")
class NoPositions(Positions): ...
```
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from fundamentallm.config.base import Positive
from fundamentallm.errors import ConfigError
from fundamentallm.models.layers.initialization import EMBEDDING_STD
from fundamentallm.registry import Registry


class Marks(Protocol):
    """What marks positions: a `Positions` those from 0 on, its `at` those it was given."""

    def embed(self, x: Tensor) -> Tensor:
        """Return the embeddings (B, T, D) with their positions marked."""

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (B, H, T, K) and keys (B, G, T, K) with their positions marked."""


class Positions(nn.Module):
    """The interface; without a subclass the model has no positions."""

    def embed(self, x: Tensor) -> Tensor:
        """Return the embeddings (B, T, D) with positions 0 to T - 1 marked."""
        return x

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (B, H, T, K) and keys (B, G, T, K) with positions 0 to T - 1 marked."""
        return query, key

    def at(self, places: Tensor) -> Marks | None:
        """Return what marks the positions `places`, (B, T) or (1, T) for all rows, int64.

        None says that this encoding cannot: generation then recomputes the context for each token.
        """
        return None


@dataclass(frozen=True)
class AddedMarks:
    """Rows (B, T, D) or (1, T, D) that are added to the embeddings."""

    rows: Tensor

    def embed(self, x: Tensor) -> Tensor:
        """Return (B, T, D) with the rows added."""
        return x + self.rows.to(x.dtype)

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as they are."""
        return query, key


@dataclass(frozen=True)
class TurnedMarks:
    """Angles by which queries and keys are turned, as cosines and sines (B or 1, 1, T, K/2)."""

    cosines: Tensor
    sines: Tensor

    def embed(self, x: Tensor) -> Tensor:
        """Return the embeddings as they are."""
        return x

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, H, T, K) and (B, G, T, K) turned."""
        return _turn(query, self.cosines, self.sines), _turn(key, self.cosines, self.sines)


POSITIONS: Registry[Positions] = Registry(
    "position encoding", supplied=("width", "head_width", "sequence_length")
)


@POSITIONS.register("learned")
class LearnedPositions(Positions):
    """One trained vector a position, added to the embeddings (Gehring et al. 2017, section 3.1).

    Args:
        width: D.
        sequence_length: the number of positions.
    """

    def __init__(self, width: int, sequence_length: int) -> None:
        super().__init__()
        self.table = nn.Embedding(sequence_length, width)

    def embed(self, x: Tensor) -> Tensor:
        """Return (B, T, D) with row t of the table added at position t."""
        _, num_positions, _ = x.shape
        return x + self.table.weight[:num_positions].to(x.dtype)

    def at(self, places: Tensor) -> Marks:
        """Return what adds row `places[b, t]` of the table."""
        return AddedMarks(self.table.weight[places])


@POSITIONS.register("sinusoidal")
class SinusoidalPositions(Positions):
    """Fixed sine and cosine waves, added to the embeddings (Vaswani et al. 2017, section 3.5).

    Args:
        width: D.
        sequence_length: the number of positions.
        scale: amplitude of the waves, > 0. The default is the standard deviation that embeddings
            start with: waves of amplitude 1 would drown them.

    Raises:
        ConfigError: scale is not above 0.
    """

    table: Tensor

    def __init__(
        self, width: int, sequence_length: int, *, scale: Positive = EMBEDDING_STD
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ConfigError(
                "scale must be above 0", key="scale", got=repr(scale), expected="a number > 0"
            )
        angles = _angles(sequence_length, width, base=10_000.0)
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]
        # Not persistent: it follows from the arguments, so no checkpoint needs it.
        self.register_buffer(
            "table", (scale * waves).to(torch.get_default_dtype()), persistent=False
        )

    def embed(self, x: Tensor) -> Tensor:
        """Return (B, T, D) with the waves added: sines at even columns, cosines at odd ones."""
        _, num_positions, _ = x.shape
        return x + self.table[:num_positions].to(x.dtype)

    def at(self, places: Tensor) -> Marks:
        """Return what adds the waves at `places[b, t]`."""
        return AddedMarks(self.table[places])


@POSITIONS.register("rotary")
class RotaryPositions(Positions):
    """Queries and keys turned by angles proportional to their position (Su et al. 2021, eq. 34).

    A product of a query and a key then depends on the positions only through their distance.
    The pairs that turn together are columns i and i + K/2, the layout of GPT-NeoX and Llama.

    Args:
        head_width: K, even.
        sequence_length: the number of positions.
        base: pair i turns by base^(-2i/K) radians a position; > 1.

    Raises:
        ConfigError: an odd head width, or a base that is not above 1.
    """

    cosines: Tensor
    sines: Tensor

    def __init__(
        self,
        head_width: int,
        sequence_length: int,
        *,
        base: Annotated[float, Field(gt=1)] = 10_000.0,
    ) -> None:
        super().__init__()
        if head_width % 2:
            raise ConfigError(
                "rotary positions turn pairs of columns, so they need an even head width",
                got=f"d_model / num_heads = {head_width}",
                expected="an even number",
                fix="change d_model or num_heads",
            )
        if not base > 1:
            raise ConfigError(
                "base must be above 1", key="base", got=repr(base), expected="a number > 1"
            )
        angles = _angles(sequence_length, head_width, base)  # (T, K/2)
        dtype = torch.get_default_dtype()
        self.register_buffer("cosines", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sines", angles.sin().to(dtype), persistent=False)

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, H, T, K) and (B, G, T, K) with row t turned by the angles of position t."""
        num_positions = query.size(-2)
        cosines, sines = self.cosines[:num_positions], self.sines[:num_positions]
        return _turn(query, cosines, sines), _turn(key, cosines, sines)

    def at(self, places: Tensor) -> Marks:
        """Return what turns column t of row b by the angles of position `places[b, t]`."""
        return TurnedMarks(self.cosines[places].unsqueeze(1), self.sines[places].unsqueeze(1))


def _turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]) of (..., T, K) by the angles of (..., T, K/2)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    # The tables stay float32 beside narrow values; the result must match their type again.
    return turned.type_as(x)


def _angles(num_positions: int, width: int, base: float) -> Tensor:
    """Return the float64 table (T, ceil(width / 2)) of position * base^(-2i / width)."""
    # float32 would lose a thousandth of a radian at position 10,000.
    pairs = torch.arange(math.ceil(width / 2), dtype=torch.float64)
    frequencies = base ** (-2 * pairs / width)
    return torch.outer(torch.arange(num_positions, dtype=torch.float64), frequencies)
