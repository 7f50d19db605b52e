"""The data of one optimizer step: a step batch of micro-batches.

Shapes: T sequence length, B batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fundamentallm.errors import DataError

IGNORED = -100  # the target of a token that counts for nothing
_REQUIRED, _OPTIONAL = ("input_ids", "target_ids"), ("document_ids",)
# What a tokenizer of `transformers` may add; `models.calling` hands it to the model.
_OF_A_TOKENIZER = ("attention_mask", "position_ids", "token_type_ids")

Batch = dict[str, Tensor]
"""`input_ids` and `target_ids`, int64 (B, T); if documents are masked also `document_ids`,
int64 (B, T): the number of the document that a token belongs to, rising along a row from 0.
A batch of `transformers` also has its `attention_mask`, `position_ids` and `token_type_ids`."""


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

    `labels` stand in for `target_ids` that are shifted here: as in `transformers`, the label of a
    token is the token itself, and the one before it predicts it.

    Raises:
        ValueError: it is neither.
        DataError: labels that are not one for each token, or a value that is no tensor.
    """
    found = f"a {type(batch).__name__}"
    if isinstance(batch, Mapping):
        keys = (*_REQUIRED, *_OPTIONAL, *_OF_A_TOKENIZER)
        if {"input_ids", "target_ids"} <= batch.keys():
            return {key: batch[key] for key in keys if key in batch}
        if {"input_ids", "labels"} <= batch.keys():
            targets = _shifted(batch["input_ids"], batch["labels"])
            return {"input_ids": batch["input_ids"], "target_ids": targets} | {
                key: batch[key] for key in keys if key in batch
            }
        found += " with the keys " + ", ".join(map(str, batch))
    elif isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return {"input_ids": batch[0], "target_ids": batch[1]}
        found += f" of {len(batch)}"
    raise ValueError(
        "a batch must be {'input_ids': ..., 'target_ids': ...}, (inputs, targets), or"
        f" {{'input_ids': ..., 'labels': ...}} of DataCollatorForLanguageModeling(mlm=False), got"
        f" {found}"
    )


def _shifted(input_ids: Any, labels: Any) -> Tensor:
    """Return the label of the next token for each token, (B, T); the last has none."""
    for name, value in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise DataError(
                f"{name} of a batch is not a tensor",
                got=f"a {type(value).__name__}",
                fix="give the DataLoader a collate_fn (DefaultDataCollator, or"
                " DataCollatorForLanguageModeling(tokenizer, mlm=False)), or call"
                " dataset.set_format('torch')",
            )
    if labels.ndim != 2 or labels.shape != input_ids.shape:
        raise DataError(
            "labels must be one for each token of a batch",
            got=f"labels {tuple(labels.shape)} for input_ids {tuple(input_ids.shape)}",
            expected="both (B, T)",
            fix="collate with DataCollatorForLanguageModeling(tokenizer, mlm=False)",
        )
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


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


def count_computed(window: Window) -> tuple[int, int]:
    """Return the rows of a window, and its tokens with masked targets and padding included."""
    rows = tokens = 0
    for micro in window.micro_batches:
        num_rows, length = micro["input_ids"].shape  # one access: each costs microseconds
        rows += num_rows
        tokens += num_rows * length
    return rows, tokens


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
