"""The way to a value in nested mappings and lists, and text escaped for a message."""

from __future__ import annotations

from collections.abc import Sequence

from fundamentallm.redaction import redacted

KeyPath = tuple[str | int, ...]
"""The way to a value: keys of mappings and indices of lists."""


def dotted(path: Sequence[str | int]) -> str:
    """Return `training.optimizer` for its path, indices as `data.source[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{excerpt(part)}"
    return text.removeprefix(".")


def excerpt(text: str, limit: int = 60) -> str:
    """Return text for a message: cut, without secrets, with control characters escaped.

    Args:
        text: any.
        limit: its longest length.
    """
    text = redacted(text)  # before it is cut, for a part of an address is not known as one
    shown = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
