"""The `evaluate` command."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ignite.metrics import Metric

from fundamentallm.compute.plan import Machine, ModelFacts, Plan
from fundamentallm.data.examples import encode_examples
from fundamentallm.data.sources import (
    ExampleSource,
    MixtureSource,
    SequenceSource,
    Source,
    TextSource,
    read_source,
)
from fundamentallm.data.sources.base import part_bounds
from fundamentallm.data.tokenizer import Tokenizer, changes_texts
from fundamentallm.engine.console import console_output, printable, say
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.engine.wiring.exactness import RULES_KEY
from fundamentallm.engine.wiring.inputs import read_run_source
from fundamentallm.errors import ConfigError, DataError
from fundamentallm.inference.evaluate import (
    Document,
    Evaluated,
    decoded_size,
    evaluate_documents,
    example_documents,
    predicted_size,
    split_documents,
    text_document,
    text_size,
)
from fundamentallm.inference.load import Trained, load_on_device
from fundamentallm.training.metrics import METRICS, numbers_in

logger = logging.getLogger(__name__)

PARTS = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        data: the source, in words.
        documents: those with a token to predict.
        num_left_out: the number of the others.
        by_document: whether each document of a text is separate, and listed.
        context: tokens that the model reads.
        stride: tokens from the start of a sequence to that of the next.
        end_id: the token after each document, if documents are masked as in training.
    """

    data: str
    documents: list[Document]
    num_left_out: int
    by_document: bool
    context: int
    stride: int
    end_id: int | None


@dataclass(frozen=True)
class Figures:
    """What was measured.

    Attributes:
        total: of all documents together.
        by_name: of each document.
        metrics: the run's own, by name.
        comparable: whether the bits are of the text as it is, not as the tokenizer decodes it.
    """

    total: Evaluated
    by_name: list[tuple[str, Evaluated]]
    metrics: dict[str, float]
    comparable: bool


def evaluate(options: argparse.Namespace) -> int:
    """Print loss, perplexity and bits per character and byte."""
    with console_output():
        load_plugins(options.plugins, "--plugins")
        if options.document_separator == "":
            raise ConfigError(
                "--document-separator is empty",
                fix="give the text that ends a document, for example '<end>'",
            )
        trained, machine = load_on_device(options.model, options.device)
        task = choose_task(trained, options)
        figures = measure(trained, machine, task)
    if options.json:
        say(json.dumps(_report(trained, task, figures)))
    else:
        _print(trained, task, figures)
    return 0


def choose_task(trained: Trained, options: argparse.Namespace) -> Task:
    """Return what the command line asks to measure.

    Raises:
        ConfigError: two options do not go together, or the stride is out of range.
        DataError: the text cannot be used, or has no token to predict.
    """
    context = trained.config.model.sequence_length
    assert context is not None
    stride = context if options.stride is None else options.stride
    if not 1 <= stride <= context:
        raise ConfigError(
            "stride is out of range",
            key="--stride",
            got=str(stride),
            expected=f"1 to {context}, the context length",
        )
    source = _source(trained, options.data)
    part = _part(source, options)
    data = options.data or "the run's"
    if part is not None:
        data += f" {PARTS[part]} split"
    separator = options.document_separator
    if separator is not None and not _has_text(source):
        raise ConfigError(
            "--document-separator splits text into documents, but this source holds examples",
            got=data,
            fix="remove it: each example is a document, and --documents lists them",
        )
    by_document = options.documents or separator is not None
    documents = documents_of(trained, source, part, by_document, separator)
    measured = [document for document in documents if document.num_predicted]
    if not measured:
        raise DataError(
            "there is nothing to evaluate",
            where=data,
            got=f"{sum(len(document.tokens) for document in documents):,} tokens",
            expected="at least 2",
            fix="choose a text with --data",
        )
    masked = trained.config.data.packing == "document"
    end_id = source.end_id if masked else None
    num_left_out = len(documents) - len(measured)
    return Task(data, measured, num_left_out, by_document, context, stride, end_id)


def measure(trained: Trained, machine: Machine, task: Task) -> Figures:
    """Measure the documents as the run's validation does."""
    training, facts = trained.config.training, ModelFacts.of(trained.config.model)
    plan = Plan.again(training, facts, machine, fp16_elsewhere="fp32")
    metrics = _metrics(trained, machine.device)
    total, each = evaluate_documents(
        plan.prepare(trained.model),
        trained.tokenizer,
        task.documents,
        task.context,
        trained.config.data.batch_size,
        plan.build_precision(),
        task.stride,
        task.end_id,
        metrics.values(),
    )
    comparable = all(document.size is not None for document in task.documents)
    return Figures(
        total,
        list(zip((document.name for document in task.documents), each, strict=True)),
        numbers_in({name: metric.compute() for name, metric in metrics.items()}),
        comparable or not changes_texts(trained.tokenizer),
    )


def _report(trained: Trained, task: Task, figures: Figures) -> dict[str, Any]:
    report = {
        "checkpoint": str(trained.checkpoint),
        "step": trained.manifest.step,
        "averaged_weights": trained.averaged,
        "data": task.data,
        "context_length": task.context,
        "stride": task.stride,
        **figures.total.to_dict(),
        "bits_comparable": figures.comparable,
    }
    if figures.metrics:
        report["metrics"] = figures.metrics
    if task.by_document:
        report["documents"] = [{"name": name, **one.to_dict()} for name, one in figures.by_name]
        report["documents_too_short"] = task.num_left_out
    return report


def _print(trained: Trained, task: Task, figures: Figures) -> None:
    total = figures.total
    say(f"checkpoint          {trained.origin}")
    say(f"data                {task.data}")
    if task.stride != task.context:
        say(f"windows             of {task.context} tokens, one every {task.stride}")
    say(f"loss                {total.loss:.4f} nats per token")
    say(f"perplexity          {total.perplexity:.3f}")
    say(f"bits per character  {total.bits_per_character:.4f}")
    say(f"bits per byte       {total.bits_per_byte:.4f}")
    for name, number in figures.metrics.items():
        say(f"{name:<20}{number:.4f}")
    say(f"tokens              {total.num_tokens:,}")
    if not figures.comparable:
        say(
            "The bits are per character and byte of the decoded text, which this tokenizer may"
            " change; do\nnot compare them with those of other tokenizers, or choose the text"
            " with --data."
        )
    if task.by_document:
        _table(figures.by_name, task.num_left_out)


def _metrics(trained: Trained, device: torch.device) -> dict[str, Metric]:
    """Return the metrics that the run's validation measures."""
    metrics = {}
    for name, component in trained.config.evaluation.metrics.items():
        if component.name in METRICS:
            metrics[name] = METRICS.build(
                component.name, component.options, device=device, tokenizer=trained.tokenizer
            )
        else:  # of a plugin, which is imported only if it is named again
            logger.warning(
                "the run's metric '%s' is left out: name its plugin with --plugins", component.name
            )
    return metrics


def _part(source: Source, options: argparse.Namespace) -> str | None:
    """Return the part to measure; None: all of the text of --data."""
    if options.data is None or source.has_own_split:
        return options.split or "val"
    if options.split is not None:
        raise ConfigError(
            "--split selects a part of the run's text, but --data names another text",
            got=f"--split {options.split} --data {options.data}",
            expected="--split with text that was split when it was prepared",
            fix="remove one of the two",
        )
    return None


def _members(source: Source) -> Sequence[Source]:
    return source.members if isinstance(source, MixtureSource) else [source]


def split_by_position(source: Source) -> Source:
    """Return a source that is split as in runs without a number of rules."""
    if isinstance(source, MixtureSource):
        # The members of a mixture are no mixtures.
        members: Any = [split_by_position(member) for member in source.members]
        return replace(source, members=members)
    if isinstance(source, (TextSource, ExampleSource)):
        return replace(source, by_position=True)
    return source


def _has_text(source: Source) -> bool:
    return any(isinstance(member, TextSource) for member in _members(source))


def _table(by_name: list[tuple[str, Evaluated]], num_left_out: int) -> None:
    say()
    short = f"; {num_left_out:,} without a token to predict left out" if num_left_out else ""
    say(f"{len(by_name):,} documents, each evaluated separately{short}")
    say(f"{'tokens':>10} {'loss':>8} {'perplexity':>12} {'bits/char':>10} {'bits/byte':>10}  name")
    for name, one in by_name:
        say(
            f"{one.num_tokens:>10,} {one.loss:>8.4f} {one.perplexity:>12.3f}"
            f" {one.bits_per_character:>10.4f} {one.bits_per_byte:>10.4f}  {printable(name)}"
        )


def run_source(trained: Trained) -> Source:
    """Return the source of the model's run.

    Raises:
        CheckpointError: it has changed since.
    """
    own = read_run_source(trained.config.data, trained.run_dir)
    own.require_unchanged(
        trained.data_sha256,
        fix="restore the text, or choose another with --data",
    )
    return own if RULES_KEY in trained.manifest.metadata else split_by_position(own)


def _source(trained: Trained, data: str | None) -> Source:
    """Return the source to evaluate on, None for the run's own."""
    if data is None:
        return run_source(trained)
    source = read_source(data, response_end=trained.config.data.response_end)
    expected = trained.tokenizer.fingerprint()
    if source.tokenizer is not None and source.tokenizer.fingerprint() != expected:
        raise DataError(
            "the token file was made with a different tokenizer than the model's",
            where=data,
            got=f"tokenizer {source.tokenizer.fingerprint()[:16]}",
            expected=f"tokenizer {expected[:16]}",
            fix="choose the original text, or a token file made with the model's tokenizer",
        )
    return source


def documents_of(
    trained: Trained, source: Source, part: str | None, by_document: bool, separator: str | None
) -> list[Document]:
    """Return the documents to measure: the texts of a source, or those of a part of the split.

    Args:
        trained: the model.
        source: the source.
        part: "train", "val" or "test"; None: all of the source.
        by_document: whether each document of a text is separate; examples always are.
        separator: the text that ends a document inside a file.
    """
    tokenizer = trained.tokenizer
    fractions = trained.config.data.split if part else (1.0, 0.0, 0.0)
    found: list[Document] = []
    for member in _members(source):
        if isinstance(member, ExampleSource):
            context = trained.config.model.sequence_length
            assert context is not None
            encoded = encode_examples(member.examples, tokenizer, context)
            found += example_documents(*member.part(encoded, fractions, part or "train"), tokenizer)
        elif isinstance(member, TextSource) and by_document:
            found += _text_documents(member, tokenizer, fractions, part, separator)
        elif isinstance(member, TextSource):
            found.append(_text_as_one(member, tokenizer, fractions, part))
        elif isinstance(member, SequenceSource):
            ids = member.parts(tokenizer, fractions)[part or "train"]
            whole = Document(member.name, ids)
            if by_document and member.end_id is not None:
                found += split_documents(whole, member.end_id)
            else:
                found.append(whole)
    return found


def _text_as_one(
    source: TextSource, tokenizer: Tokenizer, fractions: Sequence[float], part: str | None
) -> Document:
    """Return a text or its part as one document."""
    if part is None:
        return _document(source.name, source.text, tokenizer)
    parts = source.parts(tokenizer, fractions)
    own = Document(source.name, parts[part])
    if changes_texts(tokenizer):
        decoded = decoded_size(tokenizer, np.concatenate(list(parts.values())))
        if decoded == text_size(source.text):  # the tokenizer keeps this text
            return replace(own, size=predicted_size(tokenizer, own))
    return own


def _text_documents(
    source: TextSource,
    tokenizer: Tokenizer,
    fractions: Sequence[float],
    part: str | None,
    separator: str | None,
) -> list[Document]:
    """Return the documents of a text or its part."""
    if part is None:
        return [_document(name, text, tokenizer) for name, text in _texts(source, separator)]
    found: list[Document] = []
    for unit, own in source.units(fractions):
        if own is None:
            found += _cut_documents(unit, tokenizer, fractions, part, separator)
        elif own == part:
            found += _text_documents(unit, tokenizer, fractions, None, separator)
    return found


def _cut_documents(
    source: TextSource,
    tokenizer: Tokenizer,
    fractions: Sequence[float],
    part: str,
    separator: str | None,
) -> list[Document]:
    """Return the documents of a part that was cut by position, which may cut those at its ends."""
    pieces = [_document(name, text, tokenizer) for name, text in _texts(source, separator)]
    ends = [0, *itertools.accumulate(len(piece.tokens) for piece in pieces)]
    # The split applies to the tokens of the whole text.
    if ends[-1] != len(tokenizer.encode(source.text)):
        raise DataError(
            "the tokenizer merges the end of a document with the next one, so a split of the text"
            " cannot be separated into documents",
            where=source.name,
            fix="choose the documents with --data",
        )
    own = part_bounds(ends[-1], fractions, part)
    return [
        piece
        if own.start <= start and start + len(piece.tokens) <= own.stop
        else Document(
            piece.name, piece.tokens[max(own.start - start, 0) : max(own.stop - start, 0)]
        )
        for piece, start in zip(pieces, ends, strict=False)
        if start < own.stop and start + len(piece.tokens) > own.start
    ]


def _document(name: str, text: str, tokenizer: Tokenizer) -> Document:
    try:
        return text_document(name, text, tokenizer)
    except DataError as error:
        error.where = f"{name}: {error.where}" if error.where else name
        raise


def _texts(source: TextSource, separator: str | None) -> Iterator[tuple[str, str]]:
    """Yield the documents of a text: its files, or with a separator the texts between.

    Separators in a row belong to the document that they end.
    """
    for name, start, length in source.pieces:
        text = source.text[start : start + length]
        if separator is None:
            yield name, text
            continue
        first, line = 0, 1
        for found in re.finditer(f"(?:{re.escape(separator)})+|\\Z", text):
            document = text[first : found.end()]
            if document:
                yield f"{name}:{line}", document
            first, line = found.end(), line + document.count("\n")
