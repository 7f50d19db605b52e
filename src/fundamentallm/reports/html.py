"""HTML in which every text is data: only what `tag` made is markup."""

from __future__ import annotations

import html
import json
import re
from typing import Any

# What a page may not hold, and what turns the direction of text or hides.
_UNFIT = re.compile("[^\\t\\n\\x20-\\x7e\\xa0-\\ud7ff\\ue000-\\U0010ffff]")
_INVISIBLE = re.compile("[\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(text: str) -> Html:
    """Return a text as HTML that shows it; characters that cannot be shown become U+FFFD."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(_INVISIBLE.sub("\ufffd", _UNFIT.sub("\ufffd", text))))


def tag(name: str, *children: str, **attributes: str) -> Html:
    """Return an element.

    Args:
        name: of the element.
        children: inside it; a plain text is escaped.
        attributes: `class_` is class, `aria_label` is aria-label; values are escaped.
    """
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{words}>{joined(*children)}</{name}>")


def joined(*children: str) -> Html:
    """Return elements and texts one after the other."""
    return Html("".join(escaped(child) for child in children))


def json_block(value: Any, identifier: str) -> Html:
    """Return plain JSON as a data block that no text in it can end."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{identifier}">{text}</script>')


def table(head: list[str], rows: list[list[str]], caption: str, numbers: bool = False) -> Html:
    """Return a table that scrolls by itself; the first cell of a row is its header.

    Args:
        head: the titles of the columns.
        rows: as many cells each.
        caption: names the table for readers that do not see it.
        numbers: whether no cell but the last of a row is broken into lines.
    """
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    kind = "numbers" if numbers else "texts"
    made = tag(
        "table", tag("caption", caption), tag("thead", top), tag("tbody", *body), class_=kind
    )
    # A region that scrolls is reached by keyboard.
    return tag("div", made, class_="wide", tabindex="0", role="region", aria_label=caption)
