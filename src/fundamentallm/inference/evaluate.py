"""The loss of a trained model on texts, in units that can be compared across tokenizers.

A text longer than the context T is read in sequences that start every S tokens (the stride). Each
token is predicted once, in the first sequence that reaches it, so from at least T - S + 1 tokens
before it, or from all of them if fewer. With S = T the sequences do not overlap, which is what
`val/loss` means and costs one pass; a smaller S costs T / S passes and gives every token a fuller
context (S = 1: always a full one), so its loss is lower.

Documents never read one another. The first token of a text is not predicted. For a
model that was trained on masked documents (`data.packing: document`), documents in a text are
masked as in training.

Shapes: N tokens of a document, T context length, B sequences at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.metrics import Metric
from torch import Tensor, nn

from fundamentallm.compute.precision import Precision
from fundamentallm.data.batch import IGNORED, Batch, add_documents
from fundamentallm.data.examples import EncodedExamples, Example
from fundamentallm.data.token_file import Tokens
from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.inference.decoding import REPLACEMENT, Decoder
from fundamentallm.models.calling import inputs_for, logits_of
from fundamentallm.training.evaluator import predictions_of
from fundamentallm.training.losses import compute_loss
from fundamentallm.training.step import bits_per, perplexity_of, to_device, undisturbed

PIECE = 1 << 16  # tokens decoded at once


@dataclass(frozen=True)
class Document:
    """A text that is evaluated separately.

    Attributes:
        name: its name.
        tokens: (N,) token ids, in memory or in a file.
        num_given: tokens at its beginning that are given and not predicted, at least 1.
        size: characters and UTF-8 bytes of the text behind the predicted tokens; None: unknown;
            the size of the decoded tokens is used, which is the same unless the tokenizer
            changes texts.
    """

    name: str
    tokens: Tokens
    num_given: int = 1
    size: tuple[int, int] | None = None

    @property
    def num_predicted(self) -> int:
        """The number of predicted tokens."""
        return max(0, len(self.tokens) - self.num_given)


@dataclass(frozen=True)
class Evaluated:
    """How well a model predicts a text.

    Attributes:
        loss: nats per token.
        perplexity: exp(loss).
        bits_per_character: bits to encode one character of the text with the model.
        bits_per_byte: bits to encode one byte of the text in UTF-8.
        num_tokens: predicted tokens.
        num_characters: characters of the text that are not whole before the first predicted
            token.
        num_bytes: UTF-8 bytes of those characters.
    """

    loss: float
    perplexity: float
    bits_per_character: float
    bits_per_byte: float
    num_tokens: int
    num_characters: int
    num_bytes: int

    @classmethod
    def of(cls, nll: float, num_tokens: int, num_characters: int, num_bytes: int) -> Evaluated:
        """Compute the figures from a sum of negative log-likelihoods in nats; NaN for no tokens."""
        loss = nll / num_tokens if num_tokens else math.nan
        return cls(
            loss,
            perplexity_of(loss),
            bits_per(nll, max(num_characters, 1)),
            bits_per(nll, max(num_bytes, 1)),
            num_tokens,
            num_characters,
            num_bytes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


def evaluate_documents(
    model: nn.Module,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    sequence_length: int,
    batch_size: int,
    precision: Precision,
    stride: int | None = None,
    end_id: int | None = None,
    metrics: Collection[Metric] = (),
) -> tuple[Evaluated, list[Evaluated]]:
    """Measure a model on documents, each separately.

    The model's modes and all random numbers are left unchanged.

    Args:
        model: on `precision.device`; maps (B, T) ids to logits (B, T, V), causally.
        tokenizer: to count the characters and bytes behind the tokens of texts of unknown size.
        documents: any number, of any lengths.
        sequence_length: T, the longest sequence.
        batch_size: B.
        precision: the compute type, as in training.
        stride: S, 1 to T; None: T.
        end_id: the token after each document in a text, if documents are masked.
        metrics: updated with each batch, as the validation pass updates them.

    Returns:
        The figures over all tokens, and those of each document in order.

    Raises:
        ValueError: the stride is out of range.
    """
    stride = sequence_length if stride is None else stride
    if not 1 <= stride <= sequence_length:
        raise ValueError(f"the stride must be 1 to {sequence_length}, got {stride}")
    nll = np.zeros(len(documents))
    windows = _windows(documents, sequence_length, stride)
    with undisturbed(model):
        while some := list(itertools.islice(windows, batch_size)):
            sums = _summed_nll(model, _batch(documents, some, end_id), precision, metrics)
            np.add.at(nll, [window.document for window in some], sums.numpy())
    counts = [
        (document.num_predicted, *predicted_size(tokenizer, document)) for document in documents
    ]
    each = [Evaluated.of(own, *count) for own, count in zip(nll.tolist(), counts, strict=True)]
    total = Evaluated.of(math.fsum(nll), *np.array(counts, int).reshape(-1, 3).sum(0).tolist())
    return total, each


def text_document(name: str, text: str, tokenizer: Tokenizer) -> Document:
    """Return a text as a document with the size of the text, not of its decoded tokens.

    Args:
        name: of the document.
        text: all of it.
        tokenizer: encodes it.

    Raises:
        DataError: the text cannot be encoded.
    """
    tokens = tokenizer.encode(text)
    return Document(name, tokens, size=_less(text_size(text), tokenizer, tokens[:1]))


def example_documents(
    encoded: EncodedExamples,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
) -> list[Document]:
    """Return examples as documents whose prompts are given.

    Args:
        encoded: as tokens.
        examples: as text, in the same order.
        tokenizer: what they were encoded with.
    """
    documents = []
    for number, example in zip(range(len(encoded)), examples, strict=True):
        tokens = encoded.ids[encoded.starts[number] : encoded.starts[number + 1]]
        num_given = int(encoded.prompt_lengths[number])
        size = text_size(example.response)
        if not num_given:  # nothing to predict the first token of the response from
            num_given, size = 1, _less(size, tokenizer, tokens[:1])
        documents.append(Document(example.where, tokens, num_given, size))
    return documents


def split_documents(document: Document, end_id: int) -> list[Document]:
    """Return the documents of a text that end with a token.

    Each begins with the end of the one before, which it is given, and its own end is predicted, as
    in training; so together they predict what the text does.

    Args:
        document: the text.
        end_id: the token.
    """
    ids = np.asarray(document.tokens)
    ends = np.flatnonzero(ids == end_id).tolist()
    bounds = itertools.pairwise([0, *ends, len(ids) - 1])
    return [
        Document(f"{document.name}: document {number:,}", ids[begin : end + 1])
        for number, (begin, end) in enumerate(bounds, start=1)
        if begin < end or begin == 0
    ]


class _Window(NamedTuple):
    """Inputs from token `start` on; the targets that count are tokens `first` to `last`."""

    document: int
    start: int
    first: int
    last: int


def _windows(documents: Sequence[Document], length: int, stride: int) -> Iterator[_Window]:
    for number, document in enumerate(documents):
        start, first, end = 0, document.num_given, len(document.tokens) - 1
        while first <= end:
            last = min(start + length, end)
            if last >= first:
                yield _Window(number, start, first, last)
                first = last + 1
            start += stride


def _batch(documents: Sequence[Document], windows: Sequence[_Window], end_id: int | None) -> Batch:
    """Return sequences as rows, padded at the right, where causality hides the padding."""
    longest = max(window.last - window.start for window in windows)
    inputs = torch.zeros(len(windows), longest, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    for row, (number, start, first, last) in enumerate(windows):
        ids = torch.from_numpy(documents[number].tokens[start : last + 1].astype(np.int64))
        inputs[row, : last - start] = ids[:-1]
        targets[row, first - start - 1 : last - start] = ids[first - start :]
    return add_documents({"input_ids": inputs, "target_ids": targets}, end_id)


def _summed_nll(
    model: nn.Module, batch: Batch, precision: Precision, metrics: Collection[Metric]
) -> Tensor:
    """Return the negative log-likelihood of each row, (B,) float64 on the CPU."""
    batch = to_device(batch, precision.device)
    with torch.no_grad(), precision.autocast():
        logits = logits_of(model(batch["input_ids"], **inputs_for(model, batch)))
        losses = compute_loss(logits, batch["target_ids"], reduction="none")
    for metric in metrics:
        metric.update(predictions_of(logits, batch["target_ids"]))
    return losses.cpu().double().sum(dim=1)


def predicted_size(tokenizer: Tokenizer, document: Document) -> tuple[int, int]:
    """Return characters and bytes of a document less those of its given tokens."""
    if document.size is not None:
        return document.size
    whole = decoded_size(tokenizer, document.tokens)
    return _less(whole, tokenizer, document.tokens[: document.num_given])


def _less(size: tuple[int, int], tokenizer: Tokenizer, given: Tokens) -> tuple[int, int]:
    """Return a size minus the size of the first tokens."""
    # A character that the given tokens only begin is not whole yet.
    characters, octets = text_size(tokenizer.decode(np.asarray(given)).rstrip(REPLACEMENT))
    return max(0, size[0] - characters), max(0, size[1] - octets)


def text_size(text: str) -> tuple[int, int]:
    """Return characters and UTF-8 bytes."""
    return len(text), len(text.encode("utf-8", "surrogatepass"))


def decoded_size(tokenizer: Tokenizer, tokens: Tokens) -> tuple[int, int]:
    """Return characters and UTF-8 bytes of the text of tokens.

    The text is never in memory as a whole, except a run of tokens that decode together.
    """
    decoder = Decoder(tokenizer)
    sizes = [
        text_size(decoder.feed(tokens[start : start + PIECE].tolist()))
        for start in range(0, len(tokens), PIECE)
    ]
    sizes.append(text_size(decoder.rest()))
    return sum(characters for characters, _ in sizes), sum(octets for _, octets in sizes)
