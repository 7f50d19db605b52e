"""Pieces to ids, on all cores and in order.

Threads and not processes: numpy and the `tokenizers` library let go of Python's lock while they
encode, and a few batches under way are all that is ever held.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from fundamentallm.data.preparing.pieces import Pieces, reads_whole
from fundamentallm.data.tokenizer import SubwordTokenizer, Tokenizer
from fundamentallm.errors import DataError


def encoded(
    batches: Iterator[Pieces], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the ids of each batch by the file that they belong to, in order."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    # The library of subwords uses all cores for one batch; the second is read out meanwhile.
    workers = 2 if isinstance(tokenizer, SubwordTokenizer) else min(cores, 8)
    if reads_whole(tokenizer):
        workers = 1
    waiting: deque[Future[dict[str, np.ndarray]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode, batch, tokenizer, dtype))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _encode(batch: Pieces, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> dict[str, np.ndarray]:
    try:
        encoded = tokenizer.encode_many(batch.texts)
    except DataError:
        _find_fault(batch, tokenizer)
        raise
    end = np.array([tokenizer.end_id], dtype)
    ids: dict[str, list[np.ndarray]] = {}
    for part, piece, ends in zip(batch.parts, encoded, batch.ends, strict=True):
        own = ids.setdefault(part, [])
        own.append(piece)
        if ends:
            own.append(end)
    return {part: np.concatenate(pieces) for part, pieces in ids.items()}


def _find_fault(batch: Pieces, tokenizer: Tokenizer) -> None:
    """Raise the fault of a batch with the document that it lies in."""
    for text, where in zip(batch.texts, batch.wheres, strict=True):
        try:
            tokenizer.encode(text)
        except DataError as error:
            around = text[:30].encode("unicode_escape").decode()
            error.where = f"{where}: in the text that begins with '{around}'"
            raise
