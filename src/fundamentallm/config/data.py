"""Where the text comes from, how it becomes tokens, and how tokens become batches."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from fundamentallm.config.base import BaseConfig, Count, NonNegative, Positive, Seed, Text
from fundamentallm.config.component import Component
from fundamentallm.config.yaml.problems import problem
from fundamentallm.redaction import redacted

_SPLIT = "three fractions of at least 0 that sum to 1, the first above 0: [0.9, 0.1, 0.0]"


_KINDS = ("path", "url", "name")


class SourceConfig(BaseConfig):
    """One of several sources: exactly one of `path`, `url` and `name`."""

    path: Text | None = None
    """A file, a folder of text, or a folder that `prepare` wrote."""

    url: Text | None = Field(default=None, repr=False)
    """An http or https address of a file, downloaded once and kept in the cache. It is stored and
    shown without secrets; they are best passed by the environment: for example.org in
    FUNDAMENTALLM_AUTHORIZATION_EXAMPLE_ORG, as user:password, a token, or ?name=value."""

    name: Text | None = None
    """A built-in source (python-docs, tinyshakespeare)."""

    weight: Positive | None = None
    """Its share of the sequences, relative to the other weights. Set it for all or none."""

    sha256: Text | None = None
    """The file's SHA-256, 64 hexadecimal digits; a `url` needs it."""

    @model_validator(mode="after")
    def _one_kind(self) -> SourceConfig:
        named = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(named) != 1:
            raise problem(
                "",
                "a source needs exactly one of path, url and name",
                got=named,
                expected="one of them",
                fix="add path: ..." if not named else "write a separate source for each",
            )
        if self.url is not None and self.sha256 is None:
            raise problem(
                "url",
                "a download needs the SHA-256 of the file",
                fix="add sha256: with the output of `sha256sum` for a copy that you trust",
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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, the address without its secrets."""
        plain = super().to_dict()
        return {**plain, "url": redacted(self.url)} if self.url else plain

    @field_serializer("url")
    def _without_secrets(self, url: str | None) -> str | None:
        return url and redacted(url)

    def _unwritten(self) -> Collection[str]:
        return [name for name in type(self).model_fields if getattr(self, name) is None]


class DataConfig(BaseConfig):
    """Where the text comes from and how it is split into sequences."""

    source: Text | Annotated[list[Text], Field(min_length=1)] = "python-docs"
    """A built-in name (python-docs, tinyshakespeare), a file, a folder, a folder that `prepare`
    wrote, or a list of files; .jsonl files hold prompts and responses for fine-tuning."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)] | None = None
    """In place of `source`: several, downloads too. With weights they are a mixture; without
    weights they are joined in this order."""

    response_end: Text | None = "\n"
    """Text that ends each response of a .jsonl file. It is added where it is missing; the model
    learns it, and `generate` stops at it. No response may hold it earlier. With null nothing is
    added. A tokenizer's own end token, if it has one, always follows."""

    tokenizer: Component = Component(name="character")
    """How text becomes tokens: character, byte, {name: bpe, vocab_size: 2048} trained on the text,
    or {name: file, path: tokenizer.json}."""

    sequence_length: Count = 128
    """Tokens in one sequence; the model's context length."""

    batch_size: Count = 16
    """Sequences in one micro-batch of one rank."""

    global_batch: Count | None = None
    """Sequences in an optimizer step over all ranks; `training.accumulation_steps` follows from it,
    and a run may be resumed on another number of ranks, or with another `batch_size`."""

    packing: Literal["continuous", "document"] = "continuous"
    """Whether tokens attend across document ends in a sequence (continuous), or only within their
    document (document; for text that `prepare` wrote)."""

    split: tuple[NonNegative, NonNegative, NonNegative] = (0.9, 0.1, 0.0)
    """Shares of the text for training, validation and test, in this order; they sum to 1. Of a
    single text the end is held out; of up to 49 files or examples, the end of each file; of 50
    and more, whole ones, chosen by a hash of their text."""

    seed: Seed = 42
    """Seed of the order of the sequences."""

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
                "this source has no weight, but another source has one",
                fix="give every source a weight, or give none a weight",
            )
        return self

    @field_validator("split", mode="before")
    @classmethod
    def _three_in_a_list(cls, split: Any) -> Any:
        if not isinstance(split, (list, tuple)) or len(split) != 3:
            raise problem("", "the split is invalid", got=split, expected=_SPLIT)
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
