"""The data of one optimizer step: a step batch of micro-batches.

Shapes: T sequence length, B batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the target of a token that counts for nothing
_REQUIRED, _OPTIONAL = ("input_ids", "target_ids"), ("document_ids",)

Batch = dict[str, Tensor]
"""`input_ids` and `target_ids`, int64 (B, T); if documents are masked also `document_ids`,
int64 (B, T): the number of the document that a token belongs to, rising along a row from 0."""


@dataclass(frozen=True, slots=True)
class Window:
    """The data of one optimizer step, as far as this rank has it.

    Attributes:
        micro_batches: each `{"input_ids", "target_ids"}`, int64 (B, T); the last may have fewer
            rows.
        num_tokens: valid targets in them, counted on the host.
    """

    micro_batches: list[Batch]
    num_tokens: int


def as_window(batch: Any) -> Window:
    """Return a batch as a step batch of one micro-batch; a step batch unchanged."""
    if isinstance(batch, Window):
        return batch
    micro = as_batch(batch)
    return Window([micro], count_valid(micro["target_ids"]))


def as_batch(batch: Any) -> Batch:
    """Return `{"input_ids", "target_ids"}` of a mapping or an (inputs, targets) pair.

    Raises:
        ValueError: it is neither.
    """
    found = f"a {type(batch).__name__}"
    if isinstance(batch, Mapping):
        if {"input_ids", "target_ids"} <= batch.keys():
            return {key: batch[key] for key in (*_REQUIRED, *_OPTIONAL) if key in batch}
        found += " with the keys " + ", ".join(map(str, batch))
    elif isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return {"input_ids": batch[0], "target_ids": batch[1]}
        found += f" of {len(batch)}"
    raise ValueError(
        f"a batch must be {{'input_ids': ..., 'target_ids': ...}} or (inputs, targets), got {found}"
    )


def add_documents(batch: Batch, end_id: int | None) -> Batch:
    """Number the documents of each row, in place; without an end there is nothing to number.

    The token behind a document is the first of the next: what follows it is what a document begins
    with. So every target counts, and each is predicted only from its own document.
    """
    if end_id is not None:
        batch["document_ids"] = (batch["input_ids"] == end_id).cumsum(dim=1)
    return batch


def count_valid(targets: Tensor) -> int:
    """Return the number of targets that count: those not below 0."""
    return int((targets >= 0).sum())


def count_computed(window: Window) -> int:
    """Return the tokens that a model computes for a window, masked targets and padding included."""
    return sum([batch["input_ids"].numel() for batch in window.micro_batches])


def check_batch(batch: Any, vocab_size: int, sequence_length: int) -> None:
    """Check a batch that comes from a file: its form, its sizes and each id.

    Args:
        batch: what should be a `Batch`.
        vocab_size: V, above every id.
        sequence_length: T at most.

    Raises:
        ValueError: a key that is missing or unknown, a tensor that is not int64 (B, T), or an id
            that no model of this vocabulary takes.
    """
    known = {*_REQUIRED, *_OPTIONAL}
    if not isinstance(batch, Mapping) or not set(_REQUIRED) <= batch.keys() <= known:
        raise ValueError(f"a micro-batch has the keys {', '.join(_REQUIRED)}")
    shapes = set()
    for name, tensor in batch.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.ndim != 2:
            raise ValueError(f"{name} is not an int64 tensor (B, T)")
        shapes.add(tuple(tensor.shape))
    if len(shapes) != 1:
        raise ValueError(f"the tensors have different shapes: {sorted(shapes)}")
    rows, time = shapes.pop()
    if not rows or not 1 <= time <= sequence_length:
        raise ValueError(
            f"{rows} rows of {time} tokens, where a row has 1 to {sequence_length} tokens"
        )
    inputs, targets = batch["input_ids"], batch["target_ids"]
    if bool(((inputs < 0) | (inputs >= vocab_size)).any()):
        raise ValueError(f"input_ids has an id outside 0 to {vocab_size - 1}")
    if bool((((targets < 0) & (targets != IGNORED)) | (targets >= vocab_size)).any()):
        raise ValueError(f"target_ids has an id outside 0 to {vocab_size - 1}")
    documents = batch.get("document_ids")
    if documents is not None and (
        bool((documents < 0).any()) or bool((documents.diff(dim=1) < 0).any())
    ):
        raise ValueError("document_ids does not rise along a row from 0")
