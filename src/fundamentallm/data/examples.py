"""Prompts and responses, one JSON object a line: the data of fine-tuning.

    {"prompt": "Translate: dog\\n", "response": "Hund\\n"}

The loss counts only the response; the targets inside the prompt are -100. One example is one row,
from its first token, padded to T with masked targets, so nothing is read across examples. A causal
model cannot see the padding behind a token, so the loss is exactly that of the examples one by one,
and weighted by tokens as everywhere. What separates prompt and response stands in the file; the
text that ends a response is added where it is not there, and behind it the tokenizer's own end of a
document, if it has one, so that the model learns to stop. Both are encoded separately, as a prompt
alone.

Shapes: N tokens of all examples, n examples, T sequence length, B batch size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fundamentallm.data.batch import IGNORED, Batch
from fundamentallm.data.file_kinds import kind_of
from fundamentallm.data.text_file import read_text, to_utf8
from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.errors import DataError

_FORM = '{"prompt": "...", "response": "..."}'


@dataclass(frozen=True, slots=True)
class Example:
    """One line of a file.

    Attributes:
        prompt: the text that is given; may be empty.
        response: the text to learn, its end included.
        where: file and line.
    """

    prompt: str
    response: str
    where: str


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as tokens.

    Attributes:
        ids: (N,) prompt and response of the first example, of the second, and so on.
        starts: (n + 1,) where each example starts in `ids`, and N.
        prompt_lengths: (n,) tokens of each prompt.
    """

    ids: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray

    def __len__(self) -> int:
        """Return n."""
        return len(self.prompt_lengths)

    @property
    def num_targets(self) -> np.ndarray:
        """Tokens of each example that are predicted, (n,): the response's.

        With an empty prompt nothing comes before the first, which is then not predicted.
        """
        counts: np.ndarray = np.diff(self.starts) - np.maximum(self.prompt_lengths, 1)
        return counts

    def part(self, numbers: np.ndarray) -> EncodedExamples:
        """Return the examples of some numbers, in that order."""
        pieces = [self.ids[self.starts[n] : self.starts[n + 1]] for n in numbers]
        starts = np.cumsum([0, *map(len, pieces)])
        ids = np.concatenate([self.ids[:0], *pieces])
        return EncodedExamples(ids, starts, self.prompt_lengths[numbers])

    def batch(self, numbers: np.ndarray, sequence_length: int) -> Batch:
        """Return some examples as rows, `input_ids` and `target_ids`, int64 (B, T)."""
        inputs = np.zeros((len(numbers), sequence_length), dtype=np.int64)
        targets = np.full((len(numbers), sequence_length), IGNORED, dtype=np.int64)
        for row, number in enumerate(numbers):
            tokens = self.ids[self.starts[number] : self.starts[number + 1]]
            masked = max(int(self.prompt_lengths[number]) - 1, 0)
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, masked : len(tokens) - 1] = tokens[masked + 1 :]
        return {"input_ids": torch.from_numpy(inputs), "target_ids": torch.from_numpy(targets)}


def read_examples(path: Path, end: str | None = None) -> list[Example]:
    """Read the examples of a file; lines of white space are passed over, other keys too.

    A .json file holds an array of records, or is read as lines.

    Args:
        path: the file.
        end: ends every response, added where it is not there; None adds nothing.

    Raises:
        DataError: the file cannot be read, or a line is not an example: `where` is file and
            line, or record.
    """
    return [_ended(_example(value, where), end) for value, where in _values(path)]


def _values(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield each record of a file and where it stands."""
    text = read_text(path)
    if kind_of(path) == "json" and text.lstrip().startswith("["):
        for number, value in enumerate(_parsed(text, str(path), "file"), start=1):
            yield value, f"{path}: record {number}"
        return
    # JSON text may hold other line separators of Unicode than this one.
    for number, line in enumerate(text.split("\n"), start=1):
        if line and not line.isspace():
            where = f"{path}:{number}"
            yield _parsed(line, where, "line"), where


def digest(examples: Sequence[Example]) -> str:
    """Return a SHA-256 that two lists share if they hold the same texts in the same order."""
    result = hashlib.sha256()
    for example in examples:
        result.update(json.dumps([example.prompt, example.response]).encode() + b"\n")
    return result.hexdigest()


def encode_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, sequence_length: int
) -> EncodedExamples:
    """Encode examples, each of which must fit into one row.

    Raises:
        DataError: one has no token to learn, more than T + 1 tokens, or cannot be encoded; `where`
            is its file and line.
    """
    pieces: list[np.ndarray] = []
    starts, prompt_lengths = [0], []
    for example in examples:
        try:
            prompt, response = tokenizer.encode(example.prompt), tokenizer.encode(example.response)
        except DataError as error:
            error.where = f"{example.where}: {error.where}" if error.where else example.where
            raise
        if len(prompt) + len(response) - max(len(prompt), 1) < 1:
            raise DataError(
                "this example has no token to learn",
                where=example.where,
                got=f"{len(prompt)} tokens of prompt and {len(response)} of response",
                expected="a token of response that follows another token",
                fix="remove the line, or complete it",
            )
        if tokenizer.end_id is not None:
            response = np.append(response, response.dtype.type(tokenizer.end_id))
        num_tokens = len(prompt) + len(response)
        if num_tokens > sequence_length + 1:
            raise DataError(
                "this example is longer than the context",
                where=example.where,
                got=f"{num_tokens:,} tokens, {len(prompt):,} of them prompt",
                expected=f"at most {sequence_length + 1:,} (data.sequence_length + 1)",
                fix="raise data.sequence_length, or shorten or remove the example",
            )
        pieces += [prompt, response]
        starts.append(starts[-1] + num_tokens)
        prompt_lengths.append(len(prompt))
    ids = np.concatenate(pieces) if pieces else np.empty(0, np.uint8)
    return EncodedExamples(ids, np.array(starts), np.array(prompt_lengths, dtype=np.int64))


def _ended(example: Example, end: str | None) -> Example:
    """Return an example whose response ends with a text and does not hold it earlier."""
    # An empty response is refused later: a model would learn only the end from it.
    if end is None or not example.response:
        return example
    response = example.response + end[_already_there(example.response, end) :]
    # Also one that begins in the response and reaches into its end.
    first = response.index(end)
    if first + len(end) < len(response):
        raise DataError(
            "this response contains data.response_end before its end, so a model would stop there",
            where=example.where,
            got=f"{end!a} after {first:,} characters",
            expected=f"{end!a} only at the end",
            fix="set data.response_end to a text that no response holds, or to null"
            " if the tokenizer has an end token (bpe, most tokenizer.json)",
        )
    return replace(example, response=response)


def _already_there(response: str, end: str) -> int:
    """Return how many characters of the end a response has: all, or a beginning of white space.

    A response that ends with a line feed needs but one more for an end of two. Of other texts a
    beginning is the response's own, which a reader who stops before the end would miss.
    """
    if response.endswith(end):
        return len(end)
    blank = len(end) - len(end.lstrip())
    return next((n for n in range(blank, 0, -1) if response.endswith(end[:n])), 0)


def _parsed(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"this {what} is not JSON", where=where, got=str(error), expected=_FORM
        ) from error


def _example(value: Any, where: str) -> Example:
    if not isinstance(value, dict):
        raise DataError(
            "this line is not a JSON object", where=where, got=type(value).__name__, expected=_FORM
        )
    for key in ("prompt", "response"):
        if not isinstance(value.get(key), str):
            raise DataError(
                f"this line has no text under '{key}'",
                where=where,
                got=f"{type(value[key]).__name__}" if key in value else "no such key",
                expected=_FORM,
                fix="for lines of plain text use: fundamentallm prepare" if "text" in value else "",
            )
        try:
            to_utf8(value[key])  # JSON can spell half of a surrogate pair
        except DataError as error:
            error.where = f"{where}: {key}: {error.where}"
            raise
    return Example(value["prompt"], value["response"], where)
