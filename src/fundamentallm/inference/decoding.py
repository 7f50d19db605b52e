"""Text of tokens that come bit by bit.

Tokens need not end where characters do, and the text of some depends on their neighbours:

- The first bytes of a character decode to U+FFFD until the last has come.
- Byte fallback (Kudo and Richardson 2018, arXiv 1808.06226, as Llama 2 has it) decodes the tokens
  of a whole run of bytes together: where the run is no UTF-8, each of them is U+FFFD.
- Many tokenizers take a space from the beginning of a text, so no later token may stand first.
"""

from __future__ import annotations

from collections.abc import Iterable

from fundamentallm.data.tokenizer import Tokenizer

LONGEST_CHARACTER = 4  # tokens
_FAR_ENOUGH = 16  # tokens looked at for one that has text of its own
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoder:
    """Gives out the text of tokens as soon as it is certain; all of it joins to the whole text.

    What is kept of the past is a few tokens, whatever the length of the text.

    Args:
        tokenizer: of the tokens.
        before: the tokens before the first, to tell it from a beginning. Theirs is not given out.
        longest_run: tokens that are held back at most for their neighbours to come, where bytes
            that are not UTF-8 would change their text; None: any number. Beyond it whole characters
            are given out, and stay what they are whatever bytes follow.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Iterable[int] = (), longest_run: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._longest_run = longest_run
        self._context = self._end_of(list(before))  # its text is known
        self._ids: list[int] = []  # behind the context, their text not given out yet

    def feed(self, tokens: Iterable[int]) -> str:
        """Take the next tokens; return the text that is certain now, perhaps none."""
        self._ids += tokens
        certain = self._tokenizer.find_join(self._ids)
        waiting = len(self._ids) - certain
        if self._longest_run is not None and waiting > self._longest_run:
            certain += self._whole_characters(certain)
        text = self._text(self._context, self._ids[:certain])
        if text.endswith(REPLACEMENT):
            certain, text = self._before_last_character(certain, text)
        self._context = self._end_of(self._context + self._ids[:certain])
        del self._ids[:certain]
        return text

    def rest(self) -> str:
        """Return the text that was held back, when no token follows."""
        text = self._text(self._context, self._ids)
        self._ids = []
        return text

    def _text(self, context: list[int], ids: list[int]) -> str:
        """Return the text of tokens behind others."""
        if not ids:
            return ""
        both, before = self._tokenizer.decode(context + ids), self._tokenizer.decode(context)
        # Bytes can spoil the text of those before them, which has been given out.
        return both[len(before) :] if both.startswith(before) else self._tokenizer.decode(ids)

    def _before_last_character(self, certain: int, text: str) -> tuple[int, str]:
        """Return how many tokens stand before a last character that may be a part, and their text.

        None where that cannot be told, as with tokens of no text inside the character.
        """
        for start in range(certain - 1, max(certain - LONGEST_CHARACTER, 0) - 1, -1):
            before, last = self._ids[:start], self._ids[start:certain]
            head = self._text(self._context, before)
            tail = self._text(self._end_of(self._context + before), last)
            # Of a character in two, both parts are U+FFFD.
            if tail and head + tail == text:
                return start, head
        return 0, ""

    def _whole_characters(self, start: int) -> int:
        """Return how many tokens of a run make whole characters; all of them if it is spoilt."""
        num = len(self._ids) - start
        for left in range(LONGEST_CHARACTER):
            run = self._ids[start : start + num - left]
            if self._tokenizer.decode(run) != REPLACEMENT * len(run):
                return len(run)
        return num

    def _end_of(self, ids: list[int]) -> list[int]:
        """Return the last tokens that make text of their own, by which others are no beginning."""
        last = ids[-_FAR_ENOUGH:]
        for stop in range(len(last), 0, -1):
            for start in range(stop - 1, max(stop - LONGEST_CHARACTER, 0) - 1, -1):
                text = self._tokenizer.decode(last[start:stop])
                if text and not text.isspace() and REPLACEMENT not in text:
                    return last[start:stop]
        return last
