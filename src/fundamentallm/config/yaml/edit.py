"""Change values in a YAML file and keep its comments and order."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from fundamentallm.config.base import dump_yaml
from fundamentallm.config.yaml.key_path import KeyPath
from fundamentallm.config.yaml.source import YamlDocument, parse_yaml
from fundamentallm.errors import ConfigError


def edited(text: str, changed: YamlDocument, paths: list[KeyPath]) -> str:
    """Return a document's text with the values of another document at some paths.

    Single lines are edited where that is enough; text in another form (a section in
    brackets, for example) is rewritten without its comments, but for those at its top.

    Args:
        text: YAML with a mapping at the top.
        changed: the document that the new text must mean.
        paths: (section, key) of all values that differ from the text.
    """
    try:
        new = _with_lines_edited(text, changed.data, paths)
        if parse_yaml(new).data == changed.data:
            return new
    except (ConfigError, LookupError, ValueError):
        pass
    lines = text.removeprefix("\ufeff").splitlines(keepends=True)
    return "".join(itertools.takewhile(_is_comment, lines)) + dump_yaml(changed.data)


def _is_comment(line: str) -> bool:
    return line.startswith("#")


def _with_lines_edited(text: str, data: Mapping[str, Any], paths: list[KeyPath]) -> str:
    """Edit line by line; the caller parses the result to check it."""
    lines = text.splitlines()
    known = parse_yaml(text).lines
    added: dict[str, list[str]] = {}
    for path in paths:
        section, key = (str(part) for part in path)
        value = dump_yaml({key: data[section][key]}, flow=True).strip()[1:-1]
        if path not in known:
            added.setdefault(section, []).append(value)
            continue
        number = known[path] - 1
        comment = re.search(r"\s+#.*$", lines[number])
        indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
        lines[number] = indent + value + (comment[0] if comment else "")
    for section, entries in sorted(
        added.items(), key=lambda item: known.get((item[0],), 0), reverse=True
    ):
        inside = [line for path, line in known.items() if path[0] == section and len(path) > 1]
        if inside:
            first = lines[min(inside) - 1]
            indent = first[: len(first) - len(first.lstrip())]
            lines[max(inside) : max(inside)] = [indent + entry for entry in entries]
        else:
            lines += [f"{section}:", *("  " + entry for entry in entries)]
    return "\n".join(lines) + "\n"
