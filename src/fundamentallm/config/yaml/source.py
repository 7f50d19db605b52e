"""YAML text -> plain values and the line of each, without executing or guessing anything.

A subset of YAML 1.2: mappings with text keys, lists, text, numbers, true, false and null.
Differences from what PyYAML's own loaders do, each because the other behaviour spoils runs:

- `1e-4` is a number (YAML 1.1 wants `1.0e-4` and reads the rest as text);
- yes, no, on, off, 1_000, 0o17, 017, 0x1f, 1:30 and dates are text, so a field that wants another
  type refuses them, and a field that wants text gets what was typed;
- a key written twice in one mapping is an error, the last one never wins silently;
- tags, anchors, aliases and a second document are errors: every value is written out, so no
  text can construct an object or grow when it is read ("billion laughs").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fundamentallm.config.yaml.file import LARGEST_FILE, read_yaml_text, too_large
from fundamentallm.config.yaml.key_path import KeyPath, dotted, excerpt
from fundamentallm.errors import ConfigError

DEEPEST_NESTING = 32
MOST_VALUES = 10_000

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True)
class YamlDocument:
    """The content of one YAML text.

    Attributes:
        name: the text's name in messages: the path as it was given.
        data: the value: dict, list, str, int, float, bool or None, nested.
        lines: the line, from 1, of each key and of each item of a list.
        replaced: the origin of each value that was replaced later, by path.
    """

    name: str
    data: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    replaced: dict[KeyPath, str] = field(default_factory=dict)

    def locate(self, path: Sequence[str | int]) -> str:
        """Return `name:line: a.b.c`, with the line of the nearest parent that was written.

        For a value that was replaced, as a whole or in part, return the origin of the replacement.
        """
        path = tuple(path)
        if path and path not in self.lines:
            for below, origin in self.replaced.items():
                if below[: len(path)] == path:
                    return origin
        for length in range(len(path), 0, -1):
            written = path[:length]
            if written in self.replaced:
                return self.replaced[written]
            if written in self.lines:
                return f"{self.name}:{self.lines[written]}: {dotted(path)}"
        return f"{self.name}: {dotted(path)}" if path else self.name


def read_yaml(path: str | Path) -> YamlDocument:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file is not readable UTF-8 of at most a megabyte, or as in `parse_yaml`.
    """
    return parse_yaml(read_yaml_text(Path(path)), str(path))


def parse_yaml(text: str, name: str = "YAML text") -> YamlDocument:
    """Parse YAML text whose top level is a mapping.

    Args:
        text: the YAML; one leading byte order mark is ignored.
        name: its name in messages.

    Raises:
        ConfigError: not YAML, outside the subset, too large or too deep, a repeated key, or another
            top level; `where` holds the line.
    """
    document = _parse(text, name)
    if document.data is None:
        raise ConfigError(
            "the configuration is empty",
            where=name,
            expected="keys and values, for example `seed: 1`",
            fix="write at least one key",
        )
    if not isinstance(document.data, dict):
        kind = "a list" if isinstance(document.data, list) else "a single value"
        raise ConfigError(
            f"the top level is {kind}, not a mapping of keys",
            where=f"{name}:1",
            expected="keys and values, for example `seed: 1`",
            fix="write each setting as `key: value`",
        )
    return document


def parse_value(text: str, name: str) -> Any:
    """Return the value of one word, such as `3e-4`, `[a, b]` or `notes #1.txt`.

    A list or mapping in brackets and text in quotes are YAML. Numbers, true, false and null are
    read as in YAML. Everything else is text exactly as written: a word has no comments and no
    lines, and its spaces are kept.

    Raises:
        ConfigError: as in `parse_yaml`, except that any top level is accepted; or something follows
            a closing bracket or quote.
    """
    word = text.strip()
    quoted = len(word) > 1 and word[0] in "'\"" and word[-1] == word[0]
    if not quoted and word[:1] not in ("[", "{", "!"):
        if len(text) > LARGEST_FILE:
            raise too_large(name)
        try:
            value = scalar(word or text)
        except ValueError:
            raise ConfigError(f"a number of {len(word):,} digits is too long", where=name) from None
        return text if isinstance(value, str) else value
    data = _parse(text, name).data
    behind = text[max(event.end_mark.index for event in _contents(text)) :].strip()
    if behind:
        raise ConfigError(
            "something follows the value",
            where=name,
            got=excerpt(behind),
            fix="put the whole value in quotes inside the shell's quotes: 'key=\"value\"'",
        )
    return data


def _contents(text: str) -> Iterator[Any]:
    """Yield the parse events that values come from."""
    ends = (yaml.DocumentEndEvent, yaml.StreamEndEvent)
    return (event for event in yaml.parse(text, Loader=_Parser) if not isinstance(event, ends))


def scalar(text: str) -> str | int | float | bool | None:
    """Return the value of an unquoted YAML scalar.

    Numbers are decimal, without a leading zero or underscores; the rest is text.

    Raises:
        ValueError: an integer of more digits than Python converts (4,300 by default).
    """
    if text in _WORDS:
        return _WORDS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if NOT_FINITE.fullmatch(text) else text


class _Parser(yaml.SafeLoader):
    """PyYAML's scanner, stopped by deep nesting before it looks ahead.

    Its scanner remembers every open bracket while it looks for a key's colon, so that its work
    grows with the square of the depth.
    """

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:  # noqa: N803 - overrides
        """Begin a list or mapping in brackets."""
        if self.flow_level >= DEEPEST_NESTING:
            raise _TooDeepError(self.get_mark().line + 1)
        super().fetch_flow_collection_start(TokenClass)


class _TooDeepError(Exception):
    """Nesting of brackets beyond the limit; holds the line."""


def _parse(text: str, name: str) -> YamlDocument:
    if len(text) > LARGEST_FILE:
        raise too_large(name)
    try:
        return _Builder(name, yaml.parse(text, Loader=_Parser)).document()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            "YAML does not allow this character",
            where=f"{name}:{line}",
            got=f"U+{_code_point(error.character):04X}",
            fix="remove it, or write it as an escape in double quotes",
        ) from None
    except _TooDeepError as error:
        raise _too_deep(f"{name}:{error.args[0]}") from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, name) from None
    except (ValueError, OverflowError) as error:  # as PyYAML on the escape "\\UFFFFFFFF"
        raise ConfigError(f"this is not YAML: {error}", where=name) from None


def _too_deep(where: str) -> ConfigError:
    return ConfigError(f"nesting is deeper than {DEEPEST_NESTING} levels", where=where)


def _code_point(character: str | int | bytes) -> int:
    return character if isinstance(character, int) else ord(character)


def _syntax_error(error: yaml.MarkedYAMLError, text: str, name: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    number = mark.line if mark else 0
    lines = text.splitlines()
    line = lines[number] if number < len(lines) else ""
    column = mark.column if mark else 0
    if "\t" in line[: column + 1]:
        return ConfigError(
            f"a tab at column {line.index(chr(9)) + 1}",
            where=f"{name}:{number + 1}",
            expected="spaces: YAML allows no tabs in indentation or between values",
            fix="replace the tab with spaces",
        )
    context = error.context or ""
    if error.context_mark and error.context_mark.line != number:
        context += f" that begins in line {error.context_mark.line + 1}"
    context += ": " if context else ""
    return ConfigError(
        f"this is not YAML: {excerpt(context + (error.problem or 'syntax error'), 200)}",
        where=f"{name}:{number + 1}",
        got=excerpt(line.strip()),
        fix=f"check column {column + 1} and the line above",
    )


class _Builder:
    """Turns PyYAML's parse events, which hold only text, into values."""

    def __init__(self, name: str, events: Iterator[Any]) -> None:
        self.name = name
        self.events = events
        self.lines: dict[KeyPath, int] = {}
        self.num_values = 0

    def document(self) -> YamlDocument:
        next(self.events)  # the stream starts
        start = next(self.events)
        if isinstance(start, yaml.StreamEndEvent):
            return YamlDocument(self.name, None, {})
        data = self.value(next(self.events), ())
        next(self.events)  # the document ends
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise self.error(after, "a second document begins", fix="remove the `---` line")
        return YamlDocument(self.name, data, self.lines)

    def value(self, event: Any, path: KeyPath) -> Any:
        self.refuse_indirection(event)
        self.num_values += 1
        if self.num_values > MOST_VALUES:
            raise self.error(event, f"the configuration has more than {MOST_VALUES:,} values")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if len(path) >= DEEPEST_NESTING:
            raise _too_deep(f"{self.name}:{_line(event)}")
        if isinstance(event, yaml.SequenceStartEvent):
            return self.list(path)
        return self.mapping(path)

    def list(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            item_path = (*path, len(items))
            self.lines[item_path] = _line(event)
            items.append(self.value(event, item_path))
        return items

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event)
            key_path = (*path, key)
            if key in items:
                first, second = self.lines[key_path], _line(event)
                raise ConfigError(
                    f"the key is written twice, in lines {first} and {second}",
                    where=f"{self.name}:{second}: {dotted(key_path)}",
                    fix="remove one of the two",
                )
            self.lines[key_path] = _line(event)
            items[key] = self.value(next(self.events), key_path)
        return items

    def key(self, event: Any) -> str:
        self.refuse_indirection(event)
        key = self.scalar(event) if isinstance(event, yaml.ScalarEvent) else None
        if not isinstance(key, str):
            got = event.value if isinstance(event, yaml.ScalarEvent) else "a list or a mapping"
            raise self.error(
                event, "the key is not text", got=excerpt(got), expected="a name such as `seed`"
            )
        return key

    def scalar(self, event: yaml.ScalarEvent) -> Any:
        if event.style is not None:  # quoted, or a block of text
            return event.value
        try:
            return scalar(event.value)
        except ValueError:
            raise self.error(
                event,
                f"a number of {len(event.value):,} digits is too long",
                got=excerpt(event.value),
            ) from None

    def refuse_indirection(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self.error(
                event,
                "anchors and aliases are not allowed",
                got=("*" if isinstance(event, yaml.AliasEvent) else "&") + excerpt(event.anchor),
                fix="write the value out, or quote the text if it begins with & or *",
            )
        if event.tag is not None:
            raise self.error(
                event,
                "tags are not allowed",
                got=excerpt(event.tag),
                fix="remove the tag, or quote the text if it begins with !",
            )

    def error(self, event: Any, what: str, **details: str) -> ConfigError:
        return ConfigError(what, where=f"{self.name}:{_line(event)}", **details)


def _line(event: Any) -> int:
    line: int = event.start_mark.line
    return line + 1
