"""The text, its tokens and its batches."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fundamentallm.config.base import BaseConfig, Count, NonNegative, Positive, Seed, Text
from fundamentallm.config.component import Component
from fundamentallm.config.yaml.problems import problem

_SPLIT = "three fractions from 0 that sum to 1, the first above 0, as [0.9, 0.1, 0.0]"


_KINDS = ("path", "url", "name")


class SourceConfig(BaseConfig):
    """One of several sources: exactly one of `path`, `url` and `name`."""

    path: Text | None = None
    """A file, a folder of text, or a folder that `prepare` wrote."""

    url: Text | None = None
    """An http or https address of a file, downloaded once and kept in the cache."""

    name: Text | None = None
    """A built-in source (python-docs, tinyshakespeare)."""

    weight: Positive | None = None
    """Its share of the sequences, against the other weights; for all sources or for none."""

    sha256: Text | None = None
    """Of the file, in 64 hexadecimal digits; a `url` needs it."""

    @model_validator(mode="after")
    def _one_kind(self) -> SourceConfig:
        named = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(named) != 1:
            raise problem(
                "",
                "a source is one of path, url and name",
                got=named,
                expected="one of them",
                fix="add path: ..." if not named else "make a source of each",
            )
        if self.url is not None and self.sha256 is None:
            raise problem(
                "url",
                "a download needs the hash of what it should be",
                fix="add sha256: with what `sha256sum` says of a copy that you trust",
            )
        if self.name is not None and self.sha256 is not None:
            raise problem("sha256", "a built-in source has no file to hash", fix="remove it")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise problem(
                "sha256",
                "this is not a SHA-256",
                got=self.sha256,
                expected="64 of the digits 0-9a-f",
            )
        return self

    @property
    def text(self) -> str:
        """The path, address or name."""
        return self.path or self.url or self.name or ""

    def _unwritten(self) -> Collection[str]:
        return [name for name in type(self).model_fields if getattr(self, name) is None]


class DataConfig(BaseConfig):
    """Where the text comes from and how it is cut."""

    source: Text | Annotated[list[Text], Field(min_length=1)] = "python-docs"
    """A built-in name (python-docs, tinyshakespeare), a file, a folder, a folder that `prepare`
    wrote, or a list of files; .jsonl files hold prompts and responses for fine-tuning."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)] | None = None
    """In place of `source`: several, with downloads, and with weights as a mixture; without
    weights they are joined in this order."""

    response_end: Text | None = "\n"
    """Text with which each response of a .jsonl file ends, added where it is not there; the model
    learns it, and `generate` stops at it. No response may hold it earlier. null adds nothing, and
    the model learns no end but the tokenizer's own, which stands behind it where there is one."""

    tokenizer: Component = Component(name="character")
    """How text becomes tokens: character, byte, {name: bpe, vocab_size: 2048} trained on the text,
    or {name: file, path: tokenizer.json}."""

    sequence_length: Count = 128
    """Tokens in one window; the model's context length."""

    batch_size: Count = 16
    """Sequences in one micro-batch of one rank."""

    packing: Literal["continuous", "document"] = "continuous"
    """Whether a sequence reads on across the ends of documents (continuous), or each document in it
    reads itself alone (document; for text that `prepare` wrote)."""

    split: tuple[NonNegative, NonNegative, NonNegative] = (0.9, 0.1, 0.0)
    """Fractions of the tokens for training, validation and test, by position; they sum to 1."""

    seed: Seed = 42
    """Seed of the windows' order."""

    @property
    def chosen_sources(self) -> list[str] | list[SourceConfig]:
        """The sources, whichever way they were written."""
        if self.sources is not None:
            return self.sources
        return [self.source] if isinstance(self.source, str) else self.source

    def _unwritten(self) -> Collection[str]:
        return ("sources",) if self.sources is None else ("source",)

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> DataConfig:
        if self.sources is None:
            return self
        if "source" in self.model_fields_set and self.source != "python-docs":
            raise problem("sources", "source and sources are both set", fix="keep one of them")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise problem(
                f"sources.{weighted.index(False)}",
                "this source has no weight and another has one",
                fix="give each source a weight, or none",
            )
        return self

    @field_validator("split", mode="before")
    @classmethod
    def _three_in_a_list(cls, split: Any) -> Any:
        if not isinstance(split, (list, tuple)) or len(split) != 3:
            raise problem("", "this is not a split", got=split, expected=_SPLIT)
        return tuple(split)

    @field_validator("split")
    @classmethod
    def _fractions(cls, split: tuple[float, float, float]) -> tuple[float, float, float]:
        if not split[0] > 0:
            raise problem("", "the training fraction is 0", got=list(split), expected=_SPLIT)
        if abs(sum(split) - 1) > 1e-6:
            raise problem(
                "", f"the fractions sum to {sum(split):.6g}", got=list(split), expected=_SPLIT
            )
        return split
