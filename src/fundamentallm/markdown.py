"""Texts in Markdown (CommonMark, with the tables of GitHub) that are shown as they are.

Names and paths are data: none of their signs is markup, and none of their lines ends a cell or a
block.
"""

from __future__ import annotations

import re

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")


def escaped(text: str) -> str:
    """Return a text for a line or a cell: a backslash stands before every sign of punctuation."""
    return _PUNCTUATION.sub(r"\\\1", printable(text))


def code_cell(text: str) -> str:
    """Return a text, which is not empty, as code for a cell, where a bar in code is escaped too."""
    shown = printable(text).replace("|", "\\|")
    fence = "`" * (_longest_row(shown) + 1)
    ends = {shown[:1], shown[-1:]}
    # One space is taken off at both ends, unless there are only spaces.
    pad = " " if "`" in ends or (ends == {" "} and shown.strip()) else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def fenced(text: str, language: str) -> str:
    """Return a block of code, between longer rows of backticks than any inside."""
    fence = "`" * max(3, _longest_row(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def printable(text: str) -> str:
    """Return a text with an escape for each character that does not print, line ends included."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _longest_row(text: str) -> int:
    return max((len(row) for row in re.findall("`+", text)), default=0)
