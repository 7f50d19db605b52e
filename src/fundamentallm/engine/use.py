"""The `evaluate` and `generate` commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fundamentallm.data.corpus import Corpus, read_source, split_tokens
from fundamentallm.data.examples import encode_examples
from fundamentallm.engine.assemble import read_run_source
from fundamentallm.engine.console import printable, say, speaking
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.errors import ConfigError, DataError, FundamentaLLMError
from fundamentallm.inference.evaluate import Evaluated, evaluate_examples, evaluate_text
from fundamentallm.inference.generate import Piece, stream_texts
from fundamentallm.inference.load import Trained, load_trained
from fundamentallm.training.precision import Precision, resolve_device, resolve_precision

HISTORY_LENGTH = 1000  # prompts
SAMPLES_AT_ONCE = 16


def evaluate(options: argparse.Namespace) -> int:
    """Print loss, perplexity and bits per character and byte."""
    with speaking():
        load_plugins(options.plugins, "--plugins")
        trained = load_trained(options.model, resolve_device(options.device))
        corpus, what = _corpus(trained, options.data)
        model_config = trained.config.model
        assert model_config.sequence_length is not None
        device = next(trained.model.parameters()).device
        # The precision of the run, or what comes nearest on this device.
        name = trained.config.training.precision
        precision = Precision(
            name
            if device.type == "cuda" or name != "fp16"
            else resolve_precision("auto", False, device),
            device,
        )
        measure, data = _to_measure(trained, corpus, what, options.data is not None)
        result = measure(
            trained.model,
            trained.tokenizer,
            data,
            model_config.sequence_length,
            trained.config.data.batch_size,
            precision,
        )
    if options.json:
        say(
            json.dumps(
                {
                    "checkpoint": str(trained.checkpoint),
                    "step": trained.manifest.step,
                    "averaged_weights": trained.averaged,
                    "data": what,
                    **result.to_dict(),
                }
            )
        )
        return 0
    weights = ", averaged weights" if trained.averaged else ""
    say(f"checkpoint          {trained.checkpoint} (step {trained.manifest.step}{weights})")
    say(f"data                {what}")
    say(f"loss                {result.loss:.4f} nats per token")
    say(f"perplexity          {result.perplexity:.3f}")
    say(f"bits per character  {result.bits_per_character:.4f}")
    say(f"bits per byte       {result.bits_per_byte:.4f}")
    say(f"tokens              {result.num_tokens:,}")
    return 0


def _corpus(trained: Trained, data: str | None) -> tuple[Corpus, str]:
    """Return the source to evaluate on, and what it is."""
    if data is not None:
        corpus = read_source(data)
        if corpus.tokenizer is not None:
            expected = trained.tokenizer.fingerprint()
            if corpus.tokenizer.fingerprint() != expected:
                raise DataError(
                    "the token file was made with another tokenizer than the model's",
                    where=data,
                    got=f"tokenizer {corpus.tokenizer.fingerprint()[:16]}",
                    expected=f"tokenizer {expected[:16]}",
                    fix="name the text itself, or a token file made with the model's tokenizer",
                )
        return corpus, data
    corpus = read_run_source(trained.config.data, trained.run_dir)
    expected = trained.manifest.metadata["data"]["sha256"]
    if corpus.sha256 != expected:
        raise DataError(
            "the run's text has changed, so its validation split is another",
            where=corpus.name,
            got=f"SHA-256 {corpus.sha256}",
            expected=f"SHA-256 {expected}",
            fix="restore the text, or name one with --data",
        )
    return corpus, "the run's validation split"


def _to_measure(
    trained: Trained, corpus: Corpus, what: str, whole: bool
) -> tuple[Callable[..., Evaluated], Any]:
    """Return the measure for a source and its data: all of it, or the validation split."""
    split = (1.0, 0.0, 0.0) if whole else trained.config.data.split
    # Text that was split when it was prepared has kept a part aside for this.
    part = "train" if whole and corpus.splits is None else "val"
    if corpus.examples is not None:
        length = trained.config.model.sequence_length
        assert length is not None
        encoded = encode_examples(corpus.examples, trained.tokenizer, length)
        examples = encoded.part(np.asarray(split_tokens(np.arange(len(encoded)), split)[part]))
        if not len(examples):
            raise _nothing_to_evaluate(what, "0 examples", "at least 1")
        return evaluate_examples, examples
    tokens = np.asarray(corpus.part(trained.tokenizer, split, part))
    if len(tokens) < 2:
        raise _nothing_to_evaluate(what, f"{len(tokens)} tokens", "at least 2")
    return evaluate_text, tokens


def _nothing_to_evaluate(what: str, got: str, expected: str) -> DataError:
    return DataError(
        "there is nothing to evaluate",
        where=what,
        got=got,
        expected=expected,
        fix="name a text with --data",
    )


def generate(options: argparse.Namespace) -> int:
    """Stream text to the terminal, for one prompt or for each that is typed."""
    with speaking():
        load_plugins(options.plugins, "--plugins")
        trained = load_trained(options.model, resolve_device(options.device))
        if options.num_samples < 1:
            raise ConfigError(
                "num_samples is out of range", got=str(options.num_samples), expected="at least 1"
            )
        if options.prompt is None and sys.stdin.isatty() and sys.stdout.isatty():
            return _interactive(trained, options)
        _write(trained, options, options.prompt or "", options.seed)
    return 0


def _interactive(trained: Trained, options: argparse.Namespace) -> int:
    seed = options.seed
    say("Type a prompt and press Enter; Ctrl-C stops a text, Ctrl-D ends.")
    with _history():
        while True:
            try:
                prompt = input("> ")
            except EOFError:
                say()
                return 0
            try:
                _write(trained, options, prompt, seed)
            except KeyboardInterrupt:
                say()
            except FundamentaLLMError as error:
                say(printable(str(error)))
            seed += options.num_samples


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Give `input` line editing and the prompts of earlier sessions, where there is readline."""
    try:
        import readline

        path = history_path()
    except (ImportError, RuntimeError):  # the latter: a user without a home
        yield
        return
    # A home that cannot be read or written is no reason to refuse a prompt.
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LENGTH)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Prompts are the user's own affair.
            path.touch(mode=0o600)
            readline.write_history_file(path)


def history_path() -> Path:
    """Return the file of the prompts typed earlier, where the XDG specification has such files."""
    home = os.environ.get("XDG_STATE_HOME", "")
    state = Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "state"
    return state / "fundamentallm" / "prompts"


def _write(trained: Trained, options: argparse.Namespace, prompt: str, seed: int) -> None:
    """Write the samples of a prompt one below the other, each as soon as it is known."""
    for first in range(0, options.num_samples, SAMPLES_AT_ONCE):
        numbers = range(first, min(first + SAMPLES_AT_ONCE, options.num_samples))
        pieces = stream_texts(
            trained.model,
            trained.tokenizer,
            [prompt] * len(numbers),
            options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            stop=options.stop,
            seeds=[seed + number for number in numbers],
        )
        shown = None
        for piece in in_order(pieces):
            if piece.row != shown:
                shown = piece.row
                if options.num_samples > 1:
                    say(f"--- sample {numbers[shown] + 1} ---")
                say(printable(prompt), end="")
            say(printable(piece.text), end="\n" if piece.last else "")


def in_order(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the pieces row by row: those of row 0 as they come, others when their turn is."""
    row = 0
    later: dict[int, Piece] = {}
    for piece in pieces:
        if piece.row > row:
            before = later[piece.row].text if piece.row in later else ""
            later[piece.row] = piece._replace(text=before + piece.text)
            continue
        yield piece
        row += piece.last
        while row in later:
            waited = later.pop(row)
            yield waited
            row += waited.last
