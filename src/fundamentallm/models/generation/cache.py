"""The KV cache: the keys and values of earlier tokens, so that a step computes only the new token.

A cache lives for one generation. Its buffers are allocated once, for the whole context; nothing is
ever concatenated. There are two uses, each made for one forward pass:

```python
cache = model.new_cache(batch=2, capacity=256)
model(ids, cache=cache.fill([0, 1], [5, 3]))    # (2, 5): prompts, padded at the right
model(token, cache=cache.step())                # (2, 1): one token more in each row
```

- A fill restarts rows. Its tokens attend only to one another, so it is the plain causal forward;
  no token of a row sees the padding at its right, and the row's next token overwrites it.
- A step adds one token to every row, each at its own length.

Shapes: B rows, L columns in use, C capacity, T tokens a row, H query heads, G key and value heads,
K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fundamentallm.models.layers.attention import Attend, cached_attention, flash_attention
from fundamentallm.models.layers.token_shift import one_before


@dataclass(frozen=True)
class CacheUse:
    """One forward pass that keeps its keys and values.

    Attributes:
        places: positions of the tokens, (B, T) or (1, T) for all rows, int64.
        layers: the attention of each layer.
        before: from the embeddings of the tokens, (B, T, D), those one place before each. Keeps the
            last ones: call it once.
    """

    places: Tensor
    layers: Sequence[Attend]
    before: Callable[[Tensor], Tensor]


class KVCache:
    """Keys and values of the tokens of B rows, each of its own length.

    Args:
        batch: B.
        capacity: C, tokens a row.
        num_layers: number of blocks.
        num_kv_heads: G.
        head_width: K.
        dtype, device: of the keys and values.

    Attributes:
        lengths: tokens that each row holds.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch, num_kv_heads, capacity, head_width)
        # Zeros: a masked column has weight 0, and 0 times what memory held may be NaN.
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        self._last: Tensor | None = None  # embeddings (B, 1, D), where a model asks for them
        self._columns = torch.arange(capacity, device=device)
        self.capacity = capacity
        self.lengths = [0] * batch

    def fill(self, rows: Sequence[int], lengths: Sequence[int]) -> CacheUse:
        """Restart rows with tokens that are padded at the right to the longest.

        The tokens of the pass are (len(rows), T), or (1, T) where all rows begin alike.

        Args:
            rows: distinct; their old contents are dropped.
            lengths: tokens of each of them without padding; T is the largest.
        """
        time = max(lengths)
        assert time <= self.capacity
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        index = None
        if list(rows) != list(range(len(self.lengths))):
            index = self._index(rows)
        layers = [
            partial(_fill, keys, values, index)
            for keys, values in zip(self._keys, self._values, strict=True)
        ]
        self._last = (
            None if self._last is None else self._last.index_fill(0, self._index(rows), 0.0)
        )
        begin = partial(self._begin, [*zip(rows, lengths, strict=True)])
        return CacheUse(self._columns[None, :time], layers, begin)

    def step(self) -> CacheUse:
        """Add one token to every row; none may be full."""
        most = max(self.lengths)
        assert most < self.capacity
        attend: partial[Tensor]
        if min(self.lengths) == most:
            places = self._columns[None, most : most + 1]
            attend = partial(_step, most)
        else:
            places = torch.tensor(self.lengths, device=self._columns.device)[:, None]
            visible = self._columns[: most + 1] <= places  # (B, L)
            rows = torch.arange(len(self.lengths), device=places.device)
            attend = partial(_ragged_step, rows, places[:, 0], visible[:, None, None])
        self.lengths = [length + 1 for length in self.lengths]
        layers = [
            partial(attend, keys, values)
            for keys, values in zip(self._keys, self._values, strict=True)
        ]
        return CacheUse(places, layers, self._go_on)

    def advance(self) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Add one token to every row, whose keys and values the caller writes.

        Returns:
            The keys and the values of each layer, (B, G, C, K); the tokens that each row held.
        """
        lengths = self.lengths
        assert max(lengths) < self.capacity
        self.lengths = [length + 1 for length in lengths]
        return self._keys, self._values, lengths

    def last_embeddings(self, width: int) -> Tensor:
        """Return what is kept of the embeddings of the last tokens, (B, 1, D), to be kept up."""
        if self._last is None:
            self._last = self._keys[0].new_zeros(len(self.lengths), 1, width)
        return self._last

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, renumbered in this order."""
        index = self._index(rows)
        self._keys = [keys[index] for keys in self._keys]
        self._values = [values[index] for values in self._values]
        if self._last is not None:
            self._last = self._last[index]
        self.lengths = [self.lengths[row] for row in rows]

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._columns.device)

    def _begin(self, lengths: Sequence[tuple[int, int]], x: Tensor) -> Tensor:
        """Return the embeddings before those of rows that restart; keep those at their ends."""
        last = torch.zeros_like(x[:1, :1]).repeat(len(self.lengths), 1, 1)
        if self._last is not None:
            last.copy_(self._last)
        for number, (row, length) in enumerate(lengths):
            if length:
                last[row, 0] = x[number if len(x) > 1 else 0, length - 1]
        self._last = last
        return one_before(x)

    def _go_on(self, x: Tensor) -> Tensor:
        """Return the embeddings of the tokens before, 0 for none; keep these, (B, 1, D)."""
        before = torch.zeros_like(x) if self._last is None else self._last
        self._last = x
        return before


def _fill(
    keys: Tensor, values: Tensor, rows: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    time = key.size(2)
    for kept, new in ((keys, key), (values, value)):
        if rows is None:
            kept[:, :, :time] = new
        else:
            kept[rows, :, :time] = new.to(kept.dtype)
    return flash_attention(query, key, value)


def _step(
    column: int, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Attend where all rows have the same length: plain slices, no mask."""
    keys[:, :, column : column + 1] = key
    values[:, :, column : column + 1] = value
    return cached_attention(query, keys[:, :, : column + 1], values[:, :, : column + 1])


def _ragged_step(
    rows: Tensor,
    columns: Tensor,
    visible: Tensor,
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    keys[rows, :, columns] = key[:, :, 0].to(keys.dtype)
    values[rows, :, columns] = value[:, :, 0].to(values.dtype)
    end = visible.size(-1)
    return cached_attention(query, keys[:, :, :end], values[:, :, :end], visible)
