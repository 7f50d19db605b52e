"""A Markdown file as a reader of CommonMark with tables shows it."""

from __future__ import annotations

from html.parser import HTMLParser

from markdown_it import MarkdownIt


class Shown(HTMLParser):
    """What a Markdown text shows: `texts` of each kind of element, in order, and its `tags`."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.tags: set[str] = set()
        self._open: list[str] = []
        renderer = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table")
        self.feed(renderer.render(markdown))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.texts.setdefault(tag, []).append("")
        self._open.append(tag)

    def handle_endtag(self, tag):
        self._open.remove(tag)

    def handle_data(self, data):
        for tag in self._open:
            self.texts[tag][-1] += data

    def rows(self) -> list[tuple[str, str]]:
        """Return the rows of all tables of two columns, without their heads."""
        cells = self.texts["td"]
        return list(zip(cells[::2], cells[1::2], strict=True))
