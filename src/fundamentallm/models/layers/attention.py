"""Attention: what a block lets a position read from itself and the positions before it.

Shapes: B batch, T time, D model width, H query heads, G key and value heads, K head width
(D = H * K).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm.models.layers.normalization import RMSNorm
from fundamentallm.models.layers.positions import Marks

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
            with RMSNorm as in Qwen3). It bounds the scores for any size of the weights.
        dropout: probability of dropping an attention weight, in training only.

    Attributes:
        kernel: the name in `KERNELS` of how the attention is computed; set it at any time, the
            result is the same but for rounding.

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
        self.kernel = "flash"
        kv_width = num_kv_heads * self.head_width
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, kv_width, bias=bias)
        self.value = nn.Linear(width, kv_width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.query_norm = RMSNorm(self.head_width) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_width) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, positions: Marks, attend: Attend | None = None) -> Tensor:
        """Return (B, T, D) from (B, T, D); row t depends only on rows 0 to t.

        Args:
            x: (B, T, D).
            positions: marks the queries and keys with their positions. It is passed in, not held,
                because all layers share one.
            attend: replaces `flash_attention` if x continues a text whose keys and
                values were kept (see `fundamentallm.models.generation.cache`).
        """
        batch, time, width = x.shape
        query = self.query_norm(self._heads(self.query(x)))  # (B, H, T, K)
        key = self.key_norm(self._heads(self.key(x)))  # (B, G, T, K)
        value = self._heads(self.value(x))  # (B, G, T, K)
        query, key = positions.rotate(query, key)
        # Asked in this order, so that code compiled for training serves evaluation too.
        dropout = self.dropout if self.dropout and self.training else 0.0
        if attend is None:
            heads = KERNELS[self.kernel](query, key, value, dropout)  # (B, H, T, K)
        else:
            heads = attend(query, key, value)
        return self.output(  # type: ignore[no-any-return]
            heads.transpose(1, 2).reshape(batch, time, width)
        )

    def _heads(self, x: Tensor) -> Tensor:
        """Split (B, T, heads * K) into (B, heads, T, K)."""
        batch, time, _ = x.shape
        return x.view(batch, time, -1, self.head_width).transpose(1, 2)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Return softmax(query key^T / sqrt(K)) value over the past and the present.

    Torch's fused kernel: it holds no T x T scores (Dao et al. 2022).

    Args:
        query: (B, H, T, K).
        key, value: (B, G, T, K), where G divides H; head g serves query heads g H/G to
            (g + 1) H/G - 1.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, H, T, K).
    """
    key, value = _shared(query, key, value)
    grouped = query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=grouped
    )


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Compute `flash_attention` by batched products and a softmax in float32.

    On CPUs, whose fused kernel is slow backwards in bfloat16, this is the faster way where the
    context is short. Queries go in spans of `_SPAN` rows, each against the keys up to its own end:
    of the square of scores little more than the causal half is computed.

    Args:
        query, key, value, dropout: as for `flash_attention`.
    """
    time, head_width = query.shape[-2:]
    key, value = _repeated(query, key, value)
    query = query * head_width**-0.5
    spans = []
    for start in range(0, time, _SPAN):
        end = min(start + _SPAN, time)
        # A product in bfloat16 adds in float32; its softmax must not be in bfloat16 either.
        scores = query[..., start:end, :] @ key[..., :end, :].transpose(-1, -2)
        row = torch.arange(start, end, device=query.device).unsqueeze(1)
        future = torch.arange(end, device=query.device) > row
        scores = scores.to(_softmax_type(scores)).masked_fill(future, -torch.inf)
        weights = F.dropout(scores.softmax(dim=-1), dropout).to(value.dtype)
        spans.append(weights @ value[..., :end, :])
    return torch.cat(spans, dim=-2) if len(spans) > 1 else spans[0]


# Measured at context 256 on a CPU: spans of 128 rows save a quarter of the whole square's time. 64
# save a tenth more, but each span is separate code, and four take 1.5 times as long to compile
# as the whole square.
_SPAN = 128

Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]

KERNELS: dict[str, Kernel] = {"flash": flash_attention, "explicit": explicit_attention}


def use_kernel(model: nn.Module, name: str) -> None:
    """Set the kernel of every `Attention` in the model.

    Raises:
        ValueError: no kernel has that name.
    """
    if name not in KERNELS:
        raise ValueError(f"unknown attention kernel {name!r}, expected {', '.join(KERNELS)}")
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = name


def choose_kernel(choice: str, device: torch.device, bf16_weights: bool, context: int) -> str:
    """Return the name of a kernel.

    Args:
        choice: a name, or "auto": flash, but on a CPU in bfloat16 with a context up to 1,024 tokens
            explicit, which is faster there and still holds its scores.
        device: where the model computes.
        bf16_weights: whether queries, keys and values are bfloat16 throughout.
        context: T, tokens in a sequence.
    """
    if choice != "auto":
        return choice
    return "explicit" if device.type == "cpu" and bf16_weights and context <= 1024 else "flash"


def _softmax_type(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def document_attention(
    visible: Tensor, dropout: float, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Return `flash_attention` in which a position reads only positions visible to it.

    Args:
        visible: (B, 1, T, T) bool, true where row t may read column u; see `own_document`.
        dropout, query, key, value: as for `flash_attention`.

    Returns:
        (B, H, T, K).
    """
    key, value = _shared(query, key, value, masked=True)
    grouped = query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, dropout_p=dropout, enable_gqa=grouped
    )


def _shared(
    query: Tensor, key: Tensor, value: Tensor, masked: bool = False
) -> tuple[Tensor, Tensor]:
    """Return keys and values as torch's fused kernels take them: as they are, or a copy a head.

    On CUDA only the flash kernel shares heads; it needs a half type and takes no mask. Where it is
    out of the question, shared heads would go to the kernel that holds all T x T scores, and copied
    ones go to the memory-efficient kernel (torch 2.13, `can_use_mem_efficient_attention` in
    ATen/native/transformers/cuda/sdp_utils.cpp). GPUs from before flash have no bfloat16 either.

    Args:
        query: (B, H, T, K).
        key, value: (B, G, T, K). Under autocast the value has the type of the products already.
        masked: whether there is a mask.

    Returns:
        Both, (B, G, T, K) or (B, H, T, K).
    """
    flash = value.dtype == torch.bfloat16 and not masked
    return (key, value) if flash or not query.is_cuda else _repeated(query, key, value)


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values with a copy of each head for every query head, (B, H, T, K)."""
    copies = query.size(1) // key.size(1)
    if copies == 1:
        return key, value
    return key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)


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
        keys, values: (B, G, L, K), where G divides H, as in `flash_attention`.
        visible: (B, 1, 1, L) bool, at least one true in each row; None: all.

    Returns:
        (B, H, 1, K).
    """
    batch, _, _, width = query.shape
    grouped = query.view(batch, keys.size(1), -1, width)  # (B, G, H/G, K)
    read = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible)
    return read.view_as(query)
