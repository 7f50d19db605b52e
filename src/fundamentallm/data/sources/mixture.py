"""Several sources, each with its share of the sequences."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fundamentallm.data.loaders import (
    Batching,
    MixtureLoader,
    MixtureValidationLoader,
    ValidationLoader,
)
from fundamentallm.data.sources.base import Loaders, Passage, SequenceSource, Source, within
from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.errors import DataError
from fundamentallm.files.run_layout import corpus_of


@dataclass(frozen=True)
class MixtureSource(Source):
    """Weighted sources.

    Attributes:
        weights: of each.
        members: the sources.
    """

    weights: Sequence[float]
    members: Sequence[SequenceSource]

    @classmethod
    def of(cls, weights: Sequence[float], members: Sequence[Source]) -> MixtureSource:
        """Return the mixture of some sources.

        Raises:
            DataError: one has examples, or they were made with different tokenizers.
        """
        mixed = [member for member in members if isinstance(member, SequenceSource)]
        if len(mixed) < len(members):
            raise DataError(
                "examples cannot be mixed by weight",
                where=", ".join(member.name for member in members if member not in mixed),
                fix="remove the weights, and name only files of examples",
            )
        tokenizers = [(one.name, one.tokenizer) for one in mixed if one.tokenizer is not None]
        for name, own in tokenizers[1:]:
            first_name, first = tokenizers[0]
            if own.fingerprint() != first.fingerprint():
                raise DataError(
                    "the sources were made with different tokenizers",
                    where=f"{first_name} and {name}",
                    got=f"tokenizer {own.fingerprint()[:16]}",
                    expected=f"tokenizer {first.fingerprint()[:16]}",
                    fix="prepare all of them with one tokenizer: --tokenizer FOLDER/tokenizer.json",
                )
        pairs = [[weight, one.sha256] for weight, one in zip(weights, mixed, strict=True)]
        ends = {member.end_id for member in mixed}
        return cls(
            ", ".join(member.name for member in mixed),
            hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
            weights,
            mixed,
            tokenizer=tokenizers[0][1] if tokenizers else None,
            end_id=ends.pop() if len(ends) == 1 else None,
        )

    @property
    def text(self) -> str:
        """That of all members that are text, joined."""
        return "".join(member.text for member in self.members)

    @property
    def has_own_split(self) -> bool:
        """Whether a member has."""
        return any(member.has_own_split for member in self.members)

    def beginning(self, tokenizer: Tokenizer) -> str:
        """Return the beginning of its text, or of the first member."""
        return self.text[:1_000] or self.members[0].beginning(tokenizer)

    def loaders(
        self,
        tokenizer: Tokenizer,
        fractions: Sequence[float],
        batching: Batching,
        end_id: int | None = None,
    ) -> Loaders:
        """Mix the training parts by weight; measure on all of each validation part."""
        splits = [member.parts(tokenizer, fractions) for member in self.members]
        train = MixtureLoader(
            [parts["train"] for parts in splits],
            self.weights,
            [member.name for member in self.members],
            batching,
            end_id,
        )
        held_out = [ValidationLoader(parts["val"], batching, end_id) for parts in splits]
        num_tokens = sum(len(tokens) for parts in splits for tokens in parts.values())
        return Loaders(train, MixtureValidationLoader(held_out), num_tokens)

    def passages(
        self, part: str, tokenizer: Tokenizer, fractions: Sequence[float]
    ) -> Iterator[Passage]:
        """Yield those of each member."""
        for member in self.members:
            yield from member.passages(part, tokenizer, fractions)

    def texts(
        self, part: str, tokenizer: Tokenizer, fractions: Sequence[float], limit: int
    ) -> Iterator[tuple[str, str]]:
        """Yield those of each member."""
        each = (member.texts(part, tokenizer, fractions, limit) for member in self.members)
        yield from within(itertools.chain.from_iterable(each), limit)

    def validation_in_words(self, fractions: Sequence[float]) -> str:
        """Say what the validation part of each member consists of."""
        return "; ".join(
            f"{member.name}: {member.validation_in_words(fractions)}" for member in self.members
        )

    def kept_texts(self) -> dict[str, str]:
        """Return the text of each member that is built in."""
        kept: dict[str, str] = {}
        for member in self.members:
            for text in member.kept_texts().values():
                kept[corpus_of(member.name)] = text
        return kept
