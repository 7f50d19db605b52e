"""The loss of a trained model on a text, in units that compare across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from fundamentallm.data.examples import EncodedExamples, ExampleValidationLoader
from fundamentallm.data.loader import Batch, ValidationLoader
from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.training.precision import Precision
from fundamentallm.training.step import evaluate


@dataclass(frozen=True)
class Evaluated:
    """How well a model predicts a text.

    Attributes:
        loss: nats per token.
        perplexity: exp(loss).
        bits_per_character: bits to encode one character of the text with the model.
        bits_per_byte: bits to encode one byte of the text in UTF-8.
        num_tokens: predicted tokens: all of the text but the first.
        num_characters: characters of those tokens.
        num_bytes: UTF-8 bytes of those tokens.
    """

    loss: float
    perplexity: float
    bits_per_character: float
    bits_per_byte: float
    num_tokens: int
    num_characters: int
    num_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


def evaluate_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    sequence_length: int,
    batch_size: int,
    precision: Precision,
) -> Evaluated:
    """Measure a model on token ids, in non-overlapping windows of the context length.

    Args:
        model: on `precision.device`.
        tokenizer: to count the characters and bytes behind the tokens.
        tokens: (N,) token ids, N >= 2.
        sequence_length: the windows' length in tokens.
        batch_size: windows evaluated at once.
        precision: autocast as in training.
    """
    loader = ValidationLoader(tokens, sequence_length, batch_size)
    return _measured(model, loader, precision, tokenizer.decode(tokens[1:]))


def evaluate_examples(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: EncodedExamples,
    sequence_length: int,
    batch_size: int,
    precision: Precision,
) -> Evaluated:
    """Measure a model on the responses of examples, each given its prompt.

    Args:
        model, tokenizer, batch_size, precision: as for `evaluate_text`.
        examples: at least one.
        sequence_length: the context length in tokens.
    """
    loader = ExampleValidationLoader(examples, sequence_length, batch_size)
    text = "".join(tokenizer.decode(targets) for targets in examples.targets())
    return _measured(model, loader, precision, text)


def _measured(
    model: nn.Module, loader: Iterable[Batch], precision: Precision, text: str
) -> Evaluated:
    """Measure a model on batches whose targets are a text."""
    output = evaluate(model, loader, precision)
    assert output is not None
    num_characters, num_bytes = len(text), len(text.encode("utf-8", "surrogatepass"))
    bits = output.nll / math.log(2.0)
    return Evaluated(
        output.loss,
        output.perplexity,
        bits / max(num_characters, 1),
        bits / max(num_bytes, 1),
        output.num_tokens,
        num_characters,
        num_bytes,
    )
