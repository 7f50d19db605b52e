"""The text, its tokens and its batches."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from fundamentallm.config.base import BaseConfig, Count, NonNegative, Seed, Text
from fundamentallm.config.component import Component
from fundamentallm.config.problems import problem

_SPLIT = "three fractions from 0 that sum to 1, the first above 0, as [0.9, 0.1, 0.0]"


class DataConfig(BaseConfig):
    """Where the text comes from and how it is cut."""

    source: Text | Annotated[list[Text], Field(min_length=1)] = "python-docs"
    """A built-in name (python-docs, tinyshakespeare), a file, a folder, or a list of files; .jsonl
    files hold prompts and responses for fine-tuning."""

    tokenizer: Component = Component(name="character")
    """How text becomes tokens: character, byte, {name: bpe, vocab_size: 2048} trained on the text,
    or {name: file, path: tokenizer.json}."""

    sequence_length: Count = 128
    """Tokens in one window; the model's context length."""

    batch_size: Count = 16
    """Sequences in one micro-batch of one rank."""

    split: tuple[NonNegative, NonNegative, NonNegative] = (0.9, 0.1, 0.0)
    """Fractions of the tokens for training, validation and test, by position; they sum to 1."""

    seed: Seed = 42
    """Seed of the windows' order."""

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
