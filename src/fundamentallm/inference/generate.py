"""Text from a trained model, piece by piece as it is written."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.errors import ConfigError
from fundamentallm.models.sampling import generate_tokens

LARGEST_SEED = 2**63 - 1
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def stream_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the continuation of a prompt as it is generated; the pieces join to the whole text.

    The same arguments give the same text; the global random state is not touched.

    Args:
        model: on its device; its context length bounds what it sees, not what it writes.
        tokenizer: the model's.
        prompt: the text to continue; empty for a text from nothing.
        max_tokens: tokens to generate.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the likeliest tokens that together hold probability p.
        seed: of the random numbers.

    Raises:
        DataError: the prompt holds characters that the vocabulary lacks.
        ConfigError: an option is out of its range.
    """
    check_options(max_tokens, temperature, top_k, top_p, seed, tokenizer.vocab_size)
    device = next(model.parameters()).device
    ids = [int(token) for token in tokenizer.encode(prompt)] or [0]
    generator = torch.Generator(device=device)
    generator.manual_seed(seed)
    tokens = generate_tokens(
        model,
        torch.tensor([ids], dtype=torch.int64, device=device),
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    )
    return decode_stream(tokenizer, (int(token) for token in tokens))


def decode_stream(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Yield text as soon as it is certain.

    Tokens need not end where characters do: the first bytes of a character decode to U+FFFD until
    the last has come, so such an ending is held back.
    """
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        # No character of UTF-8 has more than four bytes: a longer wait is for a real U+FFFD.
        if text and (not text.endswith(REPLACEMENT) or len(pending) >= 4):
            yield text
            pending = []
    if pending:
        yield tokenizer.decode(pending)


def check_options(
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    vocab_size: int,
) -> None:
    """Refuse sampling options out of range.

    Raises:
        ConfigError: naming the option and its range.
    """
    for key, value, fine, expected in (
        ("max_tokens", max_tokens, max_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0.0 <= temperature < float("inf"), "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, f"1 to {vocab_size}"),
        ("top_p", top_p, top_p is None or 0.0 < top_p <= 1.0, "above 0, at most 1"),
        ("seed", seed, 0 <= seed <= LARGEST_SEED, f"0 to {LARGEST_SEED}"),
    ):
        if not fine:
            raise ConfigError(f"{key} is out of range", key=key, got=str(value), expected=expected)
