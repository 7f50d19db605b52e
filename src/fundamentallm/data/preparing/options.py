"""The options of `prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fundamentallm.config.component import Component
from fundamentallm.config.yaml.source import parse_yaml
from fundamentallm.data.tokenizer import TOKENIZERS
from fundamentallm.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """The options of `prepare`.

    Attributes:
        tokenizer: as in `data.tokenizer`.
        field: the key or column of the text, in JSON lines and Parquet.
        records_on_input: whether standard input is JSON lines; else it is text.
        split: "position": one file, which a run cuts by `data.split`; "document": each document
            goes to training, validation or test as a whole.
        fractions: of train, val and test, for the latter.
    """

    tokenizer: Component
    field: str = "text"
    records_on_input: bool = False
    split: str = "position"
    fractions: tuple[float, float, float] = (0.9, 0.1, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return them as plain values."""
        fractions = {"fractions": list(self.fractions)} if self.split == "document" else {}
        return {
            "tokenizer": self.tokenizer.to_plain(),
            "field": self.field,
            "records_on_input": self.records_on_input,
            "split": self.split,
            **fractions,
        }


def check_options(options: Options) -> None:
    """Check the options before anything is read.

    Raises:
        ConfigError: a name, an option or a number that cannot be.
    """
    chosen = options.tokenizer
    try:
        TOKENIZERS.check(chosen.name, chosen.options)
    except ConfigError as error:
        error.where = error.where or "--tokenizer"
        raise
    fractions = options.fractions
    if not fractions[0] > 0 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(
            "the fractions are invalid",
            where="--fractions",
            got=" ".join(map(str, fractions)),
            expected="three from 0 that sum to 1, the first above 0",
        )


def tokenizer_choice(text: str, vocab_size: int | None) -> Component:
    """Return the tokenizer that a command line names.

    Args:
        text: a registered name, the path of a tokenizer.json, or `{name: ..., option: ...}`.
        vocab_size: the option of that name, if it was given separately.

    Raises:
        ConfigError: it is not valid.
    """
    if text.endswith(".json"):
        choice: Any = {"name": "file", "path": str(Path(text).absolute())}
    else:
        choice = parse_yaml(f"tokenizer: {text}").data["tokenizer"]
    if vocab_size is not None:
        if isinstance(choice, str):
            choice = {"name": choice}
        if isinstance(choice, dict):  # else it is refused below
            choice = {**choice, "vocab_size": vocab_size}
    try:
        return Component.model_validate(choice)
    except ValueError as error:
        raise ConfigError(
            "this is not a tokenizer",
            where="--tokenizer",
            got=text,
            expected="a name, a tokenizer.json, or {name: bpe, vocab_size: 4096}",
        ) from error
