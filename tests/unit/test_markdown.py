"""Texts that a file in Markdown shows as they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.markdown import Shown

from fundamentallm.markdown import code_cell, escaped, fenced, printable

HOSTILE = [
    "a|b",
    "<script>alert(1)</script>",
    "![x](https://example.org/x.png)",
    "line\n## another",
    "`code` **bold** _it_ [l](m)",
    "\u202eright to left\u200b",
    "www.example.org",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_every_sign_of_markup_is_escaped(text: str) -> None:
    shown = escaped(text)
    assert "\n" not in shown
    assert shown.isprintable()
    position = 0
    while position < len(shown):
        if shown[position] == "\\":
            position += 2
            continue
        assert shown[position].isalnum() or shown[position] == " " or ord(shown[position]) > 127
        position += 1


@pytest.mark.parametrize("text", ["plain", "```\n# out\n```", "a ```` b", "`" * 9])
def test_no_line_of_a_text_ends_its_block(text: str) -> None:
    first, *inside, last = fenced(text, "yaml").split("\n")
    assert "\n".join(inside) == text
    assert first == last + "yaml"
    assert last not in text
    assert set(last) == {"`"}


SIGNS = st.text(alphabet="ab1 |`\\<>#*_&;~[]()!.-:/@\n\t\u202e\u00e9", min_size=1, max_size=30)


@given(SIGNS)
def test_a_reader_sees_the_text_in_a_line_and_in_both_kinds_of_cells(text: str) -> None:
    shown = Shown(
        f"# {escaped(text)}\n\n| a | b |\n|---|---|\n| {escaped(text)} | {code_cell(text)} |\n"
    )
    assert shown.texts["h1"] == [printable(text).strip()]
    ((plain, code),) = shown.rows()
    assert plain == printable(text).strip()
    assert code == printable(text)
    assert shown.tags <= {"h1", "table", "thead", "tbody", "tr", "th", "td", "code"}


@given(SIGNS)
def test_a_reader_sees_the_block_as_it_is(text: str) -> None:
    shown = Shown(f"{fenced(text, 'yaml')}\nbehind\n")
    assert shown.texts["code"] == [text.rstrip() + "\n"]
    assert shown.texts["p"] == ["behind"]
