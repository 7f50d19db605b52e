"""How much of the validation text a model has read in training: equal passages in both parts.

A passage is an example of prompt and response, what stands between two ends in prepared text, or a
file. Text that is not made of these is compared by its long paragraphs and lines; so verses,
dialogues and text that was changed in a single character are not found.
"""

from __future__ import annotations

from collections.abc import Sequence

from fundamentallm.data.sources import Source, SplitTokenSource
from fundamentallm.data.tokenizer import Tokenizer


def overlap(source: Source, tokenizer: Tokenizer, fractions: Sequence[float]) -> float:
    """Return the share of the validation split that stands in passages of the training split.

    In examples, characters, or tokens. NaN where nothing can be compared.

    Args:
        source: what is split.
        tokenizer: of the ids.
        fractions: of train, val and test.
    """
    if isinstance(source, SplitTokenSource):
        return 0.0  # equal documents went to the same part
    # What is to be found is held, and not what there is to search: that may be all of a disk.
    wanted = {
        digest
        for passage in source.passages("val", tokenizer, fractions)
        for digest in passage.digests()
    }
    repeated = {
        digest
        for passage in source.passages("train", tokenizer, fractions)
        for digest in passage.digests()
        if digest in wanted
    }
    found = size = 0
    for passage in source.passages("val", tokenizer, fractions):
        found += passage.size_within(repeated)
        size += passage.size
    return found / size if size else float("nan")
