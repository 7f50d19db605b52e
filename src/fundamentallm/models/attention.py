"""Attention: what a block lets a position read from itself and the positions before it.

Shapes: B batch, T time, D model width, H query heads, G key and value heads, K head width
(D = H * K).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm.models.normalization import RMSNorm
from fundamentallm.models.positions import Marks

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query (B, H, T, K), key and value (B, G, T, K) to what is read, (B, H, T, K)."""


class Attention(nn.Module):
    """Causal multi-head attention (Vaswani et al. 2017, section 3.2), with optional sharing.

    With G < H, each key and value head serves H / G consecutive query heads (grouped-query
    attention, Ainslie et al. 2023); G = 1 is multi-query attention.

    Args:
        width: D.
        num_heads: H; divides D.
        num_kv_heads: G; divides H.
        bias: whether the linear layers have biases.
        qk_norm: whether each head's queries and keys are brought to root mean square 1, times a
            trained gain that the heads share, before positions are marked (Henry et al. 2020;
            with RMSNorm as in Qwen3). It bounds the scores, whatever the weights grow to.
        dropout: probability of dropping an attention weight, in training only.

    Raises:
        ValueError: heads that do not divide.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        bias: bool = False,
        qk_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must divide width and num_kv_heads must divide num_heads, "
                f"got width {width}, num_heads {num_heads}, num_kv_heads {num_kv_heads}"
            )
        self.head_width = width // num_heads
        self.dropout = dropout
        kv_width = num_kv_heads * self.head_width
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, kv_width, bias=bias)
        self.value = nn.Linear(width, kv_width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.query_norm = RMSNorm(self.head_width) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_width) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, positions: Marks, attend: Attend | None = None) -> Tensor:
        """Return (B, T, D) from (B, T, D); row t depends on rows 0 to t alone.

        Args:
            x: (B, T, D).
            positions: marks the queries and keys with their positions. It is passed in, not held,
                because all layers share one.
            attend: stands in for `causal_attention`, where x continues a text whose keys and
                values were kept (see `fundamentallm.models.cache`).
        """
        batch, time, width = x.shape
        query = self.query_norm(self._heads(self.query(x)))  # (B, H, T, K)
        key = self.key_norm(self._heads(self.key(x)))  # (B, G, T, K)
        value = self._heads(self.value(x))  # (B, G, T, K)
        query, key = positions.rotate(query, key)
        if attend is None:
            dropout = self.dropout if self.training else 0.0
            heads = causal_attention(query, key, value, dropout)  # (B, H, T, K)
        else:
            heads = attend(query, key, value)
        return self.output(  # type: ignore[no-any-return]
            heads.transpose(1, 2).reshape(batch, time, width)
        )

    def _heads(self, x: Tensor) -> Tensor:
        """Split (B, T, heads * K) into (B, heads, T, K)."""
        batch, time, _ = x.shape
        return x.view(batch, time, -1, self.head_width).transpose(1, 2)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Return softmax(query key^T / sqrt(K)) value over the past and the present.

    Args:
        query: (B, H, T, K).
        key, value: (B, G, T, K), where G divides H; head g serves query heads g H/G to
            (g + 1) H/G - 1.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, H, T, K).
    """
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        enable_gqa=query.size(1) != key.size(1),
    )


def document_attention(
    visible: Tensor, dropout: float, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Return `causal_attention` in which a position reads what is visible to it alone.

    Args:
        visible: (B, 1, T, T) bool, true where row t may read column u; see `own_document`.
        dropout, query, key, value: as for `causal_attention`.

    Returns:
        (B, H, T, K).
    """
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        dropout_p=dropout,
        enable_gqa=query.size(1) != key.size(1),
    )


def own_document(document_ids: Tensor) -> Tensor:
    """Return the block-causal mask of rows that hold several documents.

    Args:
        document_ids: (B, T) int64, which document a token belongs to.

    Returns:
        (B, 1, T, T) bool: true where column u is in the document of row t and not after it.
    """
    time = document_ids.size(1)
    causal = torch.ones(time, time, dtype=torch.bool, device=document_ids.device).tril()
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return (same & causal)[:, None]


def places_in_documents(document_ids: Tensor) -> Tensor:
    """Return the position of each token in its document, (B, T) int64.

    Args:
        document_ids: (B, T) int64, rising along a row.
    """
    columns = torch.arange(document_ids.size(1), device=document_ids.device)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return columns - (columns * begins).cummax(dim=1).values


def cached_attention(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None
) -> Tensor:
    """Return what one query a row reads from all keys that are visible to it.

    The query heads that share a key head stand in the place of time, so no key is copied for them.

    Args:
        query: (B, H, 1, K).
        keys, values: (B, G, L, K), where G divides H, as in `causal_attention`.
        visible: (B, 1, 1, L) bool, at least one true in each row; None: all.

    Returns:
        (B, H, 1, K).
    """
    batch, _, _, width = query.shape
    grouped = query.view(batch, keys.size(1), -1, width)  # (B, G, H/G, K)
    read = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible)
    return read.view_as(query)
