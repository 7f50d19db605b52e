"""The fenced blocks of a page of the documentation, and the commands in them.

A block that cannot run in a test follows a line `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
FENCED = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n\n?)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)


def blocks(page: Path) -> list[dict[str, str | None]]:
    """Return the reason (None if it runs), the kind and the code of each block."""
    return [match.groupdict() for match in FENCED.finditer(page.read_text(encoding="utf-8"))]


def code(page: Path, kind: str) -> list[str]:
    """Return the code of the blocks of a kind."""
    return [block["code"] or "" for block in blocks(page) if block["kind"] == kind]


def commands(page: Path) -> list[list[str]]:
    """Return the words of each command that runs in a test."""
    bash = [block for block in blocks(page) if block["kind"] == "bash" and not block["reason"]]
    lines = [
        line
        for block in bash
        for line in (block["code"] or "").replace("\\\n", " ").splitlines()
        if line.strip()
    ]
    parts = [part for line in lines for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def indented(page: Path) -> list[str]:
    """Return the lines of indented blocks, which no test would find."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"(?<=\n\n)    .*", text)
