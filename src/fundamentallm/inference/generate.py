"""Text from a trained model, piece by piece as it is generated."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.errors import ConfigError, MachineError
from fundamentallm.inference.decoding import Decoder
from fundamentallm.models.generation.batch import Decode, Generation
from fundamentallm.models.generation.sampling import SamplingRules
from fundamentallm.models.native.decoding import NativeDecoder, WeightType, why_not_decoded

logger = logging.getLogger(__name__)

WORTH_COMPILING = 10**9  # weights read in all; below, generating takes less than the compiler
LARGEST_SEED = 2**63 - 1
LONGEST_RUN = 64  # tokens held back: longer ones are a script of their own, to be seen as written


class Piece(NamedTuple):
    """The next piece of a continuation.

    Attributes:
        row: number of the prompt.
        text: the piece.
        last: whether the continuation ends with it; only then may it be empty.
    """

    row: int
    text: str
    last: bool


def stream_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    decode: Decode | None = None,
) -> Iterator[str]:
    """Yield the continuation of a prompt as it is generated; the pieces join to the whole text.

    Args:
        prompt: the text to continue; empty for a text from nothing.
        seed: of the random numbers.
        model, tokenizer, max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop,
            decode: as in `stream_texts`.

    Raises:
        DataError, ConfigError: as in `stream_texts`.
    """
    pieces = stream_texts(
        model,
        tokenizer,
        [prompt],
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seeds=[seed],
        decode=decode,
    )
    return (piece.text for piece in pieces if piece.text)


def stream_texts(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] = (),
    seeds: Sequence[int],
    decode: Decode | None = None,
    batch_size: int | None = None,
) -> Iterator[Piece]:
    """Yield the continuations of several prompts as they are generated, in one batch.

    A continuation follows from its prompt and its seed: it does not depend on the
    other prompts. The global random state is not changed.

    Args:
        model: on its device; its context length bounds what it sees, not what it writes. What it
            sees of a longer text is described in `fundamentallm.models.generation.batch`.
        tokenizer: the model's. Ids that it lacks (a padded vocabulary) are never drawn.
        prompts: the texts to continue, of any lengths; an empty one starts a new text (after
            the end of a document, where the tokenizer has one).
        max_tokens: tokens to generate for each.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens.
        top_p: sample from the fewest likeliest tokens with total probability p.
        min_p: sample from tokens at least this many times as likely as the likeliest.
        repetition_penalty: above 1, tokens that are already in the text become less likely.
        stop: a continuation ends before the first of these strings; strings in the prompt do not
            count.
        stop_ids: a continuation ends before the first of these tokens.
        seeds: of the random numbers, one a prompt.
        decode: computes the steps in place of the model; see `decoder_for`.
        batch_size: prompts at a time at most; a continuation that ends gives its place to the next
            prompt at once. None: all.

    Returns:
        An iterator over pieces; those of a prompt join to its whole continuation.

    Raises:
        DataError: a prompt holds characters that the vocabulary lacks.
        ConfigError: an option is out of its range.
    """
    check_options(
        tokenizer.vocab_size,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seeds=seeds,
    )
    if batch_size is not None and batch_size < 1:
        raise ConfigError("batch_size is out of range", got=str(batch_size), expected="at least 1")
    ids = [tokenizer.prompt_ids(prompt) for prompt in prompts]
    generation = Generation(
        model,
        ids[:batch_size],
        max_tokens,
        SamplingRules(repetition_penalty, temperature, top_k, top_p, min_p),
        seeds[:batch_size],
        vocab_size=tokenizer.vocab_size,
        decode=decode,
        longest=max(map(len, ids), default=0),
    )
    waiting = list(zip(ids, seeds, strict=True))[len(generation.rows) :]
    return _pieces(generation, waiting, tokenizer, max_tokens, stop, frozenset(stop_ids))


def decoder_for(
    model: nn.Module, weights: WeightType = "fp32", num_tokens: int | None = None
) -> Decode | None:
    """Return native code for the steps of a model's generation; None: the model computes them.

    In fp32 the model computes them where native code cannot, and where so few tokens are asked for
    that it would not repay its compilation. This follows from sizes only, so that the same
    command gives the same text. Other types have no other way.

    Args:
        model: with the weights that it generates with: they are copied.
        weights: the type of the copy; see `NativeDecoder`.
        num_tokens: that are asked for, in all texts; None: many.

    Raises:
        ConfigError: a type below fp32, and native code does not support the model.
        MachineError: likewise, and there is no compiler.
    """
    reason = why_not_decoded(model)
    if weights == "fp32":
        read = sum(parameter.numel() for parameter in model.parameters()) * (num_tokens or 0)
        if reason or (num_tokens is not None and read < WORTH_COMPILING):
            return None
        try:
            return NativeDecoder(model)
        except MachineError as error:
            logger.debug("generation without native code: %s", error)
            return None
    if reason:
        raise ConfigError(
            f"weights in {weights} need native code, which does not support this model",
            key="--weights",
            got=reason,
            fix="leave --weights away",
        )
    return NativeDecoder(model, weights)


def _pieces(
    generation: Generation,
    waiting: Sequence[tuple[Sequence[int], int]],
    tokenizer: Tokenizer,
    max_tokens: int,
    stop: Sequence[str],
    stop_ids: frozenset[int],
) -> Iterator[Piece]:
    streams = [TextStream(tokenizer, text, stop) for text in generation.texts]
    left, queue = dict.fromkeys(generation.rows, max_tokens), iter(waiting)
    while generation.rows and max_tokens:
        ended = []
        rows = list(generation.rows)
        for row, token in zip(rows, generation.step().tolist(), strict=True):
            stream = streams[row]
            text = "" if token in stop_ids else stream.feed(token)
            left[row] -= 1
            if token in stop_ids or stream.stopped or not left[row]:
                ended.append(row)
                yield Piece(row, text + stream.rest(), last=True)
            elif text:
                yield Piece(row, text, last=False)
        for row in list(ended):
            if (following := next(queue, None)) is None:
                break
            new = generation.replace(row, *following)
            streams.append(TextStream(tokenizer, generation.texts[new], stop))
            left[new] = max_tokens
            ended.remove(row)
        generation.end(ended)


class TextStream:
    """Decodes tokens to text as soon as the text is final.

    Text that the next tokens may change is held back (`fundamentallm.inference.decoding`), as is an
    ending that may begin a stop string. The whole text does not depend on how it is split
    into tokens.

    Args:
        tokenizer: of the tokens.
        before: the tokens before the first, for tokenizers that decode a token by its neighbour.
        stop: strings, none of them empty. The text ends before the one that is complete first, and
            among those before the one that begins first.

    Attributes:
        stopped: whether a stop string was met; there will be no more text.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self.stopped = False
        self._stop = stop
        self._decoder = Decoder(tokenizer, before, LONGEST_RUN)
        self._held = ""  # text that may begin a stop string

    def feed(self, token: int) -> str:
        """Take the next token; return the text that is certain now, perhaps none."""
        return self._unless_stopped(self._decoder.feed([token]))

    def rest(self) -> str:
        """Return the text held back, at the end."""
        text = self._unless_stopped(self._decoder.rest()) + self._held
        self._held = ""
        return text

    def _unless_stopped(self, new: str) -> str:
        """Return the final part of the text held back and a new piece."""
        if self.stopped:
            return ""
        text = self._held + new
        starts = [(text.find(stop), stop) for stop in self._stop]
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


def check_options(
    vocab_size: int,
    *,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    stop: Sequence[str],
    seeds: Sequence[int],
) -> None:
    """Refuse options of `stream_texts` out of range.

    Raises:
        ConfigError: naming the option and its range.
    """
    inf = float("inf")
    for key, value, fine, expected in (
        ("max_tokens", max_tokens, max_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0.0 <= temperature < inf, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, f"1 to {vocab_size}"),
        ("top_p", top_p, top_p is None or 0.0 < top_p <= 1.0, "above 0, at most 1"),
        ("min_p", min_p, min_p is None or 0.0 <= min_p <= 1.0, "0 to 1"),
        (
            "repetition_penalty",
            repetition_penalty,
            0.0 < repetition_penalty < inf,
            "above 0; 1 changes nothing",
        ),
        *(("stop", repr(text), bool(text), "a string that is not empty") for text in stop),
        *(("seed", seed, 0 <= seed <= LARGEST_SEED, f"0 to {LARGEST_SEED}") for seed in seeds),
    ):
        if not fine:
            raise ConfigError(f"{key} is out of range", key=key, got=str(value), expected=expected)


def in_order(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the pieces row by row: row 0 as they come, the others in turn."""
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
