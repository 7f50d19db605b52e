"""Examples of prompt and response, from files of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from fundamentallm.data.examples import (
    EncodedExamples,
    Example,
    digest,
    encode_examples,
    read_examples,
)
from fundamentallm.data.file_kinds import kind_of
from fundamentallm.data.loaders import Batching, ExampleLoader, ExampleValidationLoader
from fundamentallm.data.paths import existing
from fundamentallm.data.sources.base import (
    MANY,
    Loaders,
    Passage,
    Source,
    draw_parts,
    split_tokens,
    within,
)
from fundamentallm.data.tokenizer import Tokenizer, changes_texts
from fundamentallm.errors import DataError


@dataclass(frozen=True)
class ExampleSource(Source):
    """Examples.

    Attributes:
        examples: at least one.
        end: ends every response; None adds nothing.
        counts: of the examples of each file.
        by_position: split by their number, however many there are.
    """

    examples: list[Example]
    end: str | None
    counts: list[int]
    by_position: bool = False

    @classmethod
    def read(cls, names: Sequence[str], end: str | None) -> ExampleSource:
        """Read files of examples.

        Args:
            names: of the files.
            end: as in `read_examples`.

        Raises:
            DataError: a file does not exist, a line is not an example, or there are no examples.
        """
        others = [name for name in names if not is_examples(name)]
        if others:
            raise DataError(
                "examples cannot be joined with plain text, which has no prompts to mask",
                where=", ".join(others),
                fix="name only .jsonl files in data.source",
            )
        files = [read_examples(existing(name), end) for name in names]
        examples = [one for file in files for one in file]
        if not examples:
            raise DataError(
                "the source holds no examples",
                where=", ".join(names),
                got="0 lines",
                fix="name a file with one JSON object a line in data.source",
            )
        return cls(", ".join(names), digest(examples), examples, end, list(map(len, files)))

    @property
    def text(self) -> str:
        """All prompts and responses, joined."""
        return "".join(example.prompt + example.response for example in self.examples)

    @property
    def response_end(self) -> str | None:
        """The end of every response."""
        return self.end

    def beginning(self, tokenizer: Tokenizer) -> str:
        """Return the first 1,000 characters of its text."""
        return self.text[:1_000]

    def loaders(
        self,
        tokenizer: Tokenizer,
        fractions: Sequence[float],
        batching: Batching,
        end_id: int | None = None,
    ) -> Loaders:
        """Split the examples; each is a row, so no documents need a mask."""
        encoded = encode_examples(self.examples, tokenizer, batching.sequence_length)
        train, held_out = (self.part(encoded, fractions, part)[0] for part in ("train", "val"))
        return Loaders(
            ExampleLoader(train, batching),
            ExampleValidationLoader(held_out, batching),
            len(encoded.ids),
        )

    def part(
        self, encoded: EncodedExamples, fractions: Sequence[float], part: str
    ) -> tuple[EncodedExamples, list[Example]]:
        """Return the examples of a part, as tokens and as text."""
        own = self.numbers(fractions, part)
        return encoded.part(own), [self.examples[number] for number in own]

    def numbers(self, fractions: Sequence[float], part: str) -> np.ndarray:
        """Return the numbers of the examples of a part: as files in `TextSource.units`."""
        whole = np.arange(len(self.examples))
        if self.by_position:
            return np.asarray(split_tokens(whole, fractions)[part])
        if len(whole) < MANY:
            files = np.split(whole, np.cumsum(self.counts)[:-1])
            return np.concatenate([split_tokens(file, fractions)[part] for file in files])
        parts = draw_parts([(digest([one]), 1) for one in self.examples], fractions)
        return np.flatnonzero(np.array(parts) == part)

    def texts(
        self, part: str, tokenizer: Tokenizer, fractions: Sequence[float], limit: int
    ) -> Iterator[tuple[str, str]]:
        """Yield the examples of a part, prompt and response joined."""
        changes = changes_texts(tokenizer)
        own = (self.examples[number] for number in self.numbers(fractions, part))
        texts = ((one.where, one.prompt + one.response) for one in own)
        for name, text in within(texts, limit):
            yield name, tokenizer.decode(tokenizer.encode(text)) if changes else text

    def validation_in_words(self, fractions: Sequence[float]) -> str:
        """Say how many examples of which kind it has."""
        own, whole = len(self.numbers(fractions, "val")), len(self.examples)
        drawn = whole >= MANY and not self.by_position
        return f"{own:,} of {whole:,} examples, " + (
            "drawn by a hash of their text" if drawn else "at the end of each file"
        )

    def passages(
        self, part: str, tokenizer: Tokenizer, fractions: Sequence[float]
    ) -> Iterator[Passage]:
        """Yield the examples of a part."""
        for number in self.numbers(fractions, part):
            example = self.examples[number]
            pair = json.dumps([example.prompt, example.response]).encode()
            yield Passage(1, blake2b(pair, digest_size=12).digest())


def is_examples(name: str) -> bool:
    """Tell whether a name is that of a file of examples."""
    return kind_of(name) in ("lines", "json")
