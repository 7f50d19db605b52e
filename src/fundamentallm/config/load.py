"""A file and the command line -> a RunConfig."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fundamentallm.config.component import Component
from fundamentallm.config.run import RunConfig
from fundamentallm.config.yaml.key_path import KeyPath, dotted, excerpt
from fundamentallm.config.yaml.problems import class_at, shown, takes_text_only
from fundamentallm.config.yaml.source import YamlDocument, parse_value, read_yaml
from fundamentallm.errors import ConfigError


def load_config(
    path: str | Path, overrides: Sequence[str] = (), plugins: Sequence[str] = ()
) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value`, the value in YAML. Each replaces the value in
            the file; later ones win. One that sets an option of a component
            (`training.scheduler.decay_fraction=0.1`) keeps the component's name.
        plugins: modules to import in addition to the file's.

    Raises:
        ConfigError: a fault in the file or in an override; `where` names the line or the override.
    """
    document = overridden(read_yaml(path), overrides)
    if plugins:
        document = _with_plugins(document, plugins)
    return RunConfig.from_document(document)


def overridden(document: YamlDocument, overrides: Sequence[str]) -> YamlDocument:
    """Return a document with each `dotted.key=value` applied as by `load_config`.

    Raises:
        ConfigError: a fault in an override.
    """
    for text in overrides:
        document = _overridden(document, text)
    return document


def _overridden(document: YamlDocument, text: str) -> YamlDocument:
    origin = f"command line: {excerpt(text, 200)}"
    key, equals, value_text = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(
            "this argument is not an override",
            where=origin,
            expected="key=value, for example training.learning_rate=3e-4",
            fix="write no spaces around =, and quote the whole argument if the value has spaces",
        )
    try:
        value = parse_value(value_text, origin)
    except ConfigError as error:
        error.where = origin  # an override has no lines
        raise
    if isinstance(value, (bool, int, float)) and takes_text_only(path, RunConfig):
        value = value_text.strip()  # name=2024: a shell takes the quotes that a file would need
    return replaced(document, path, value, origin)


def replaced(document: YamlDocument, path: KeyPath, value: Any, origin: str) -> YamlDocument:
    """Return a document in which one value replaces everything at or below its path.

    Args:
        document: left as it is.
        path: the keys from the top.
        value: plain.
        origin: where the value came from, for messages.

    Raises:
        ConfigError: a value on the path has no keys.
    """

    def elsewhere(other: KeyPath) -> bool:
        return other[: len(path)] != path

    data = copy.deepcopy(document.data)
    parent = data
    for length in range(1, len(path)):
        parent = _descend(parent, path[:length], origin)
    parent[path[-1]] = value
    lines = {other: line for other, line in document.lines.items() if elsewhere(other)}
    origins = {other: where for other, where in document.replaced.items() if elsewhere(other)}
    return YamlDocument(document.name, data, lines, {**origins, path: origin})


def _descend(parent: dict[str, Any], path: KeyPath, origin: str) -> dict[str, Any]:
    """Return the mapping at a path whose parent is given; make one where the value has none."""
    name = str(path[-1])
    child = parent.get(name)
    if class_at(path, RunConfig) is Component and (child is None or isinstance(child, str)):
        chosen = child or _default_name(path)
        child = {"name": chosen} if chosen else {}
    elif child is None or (isinstance(child, bool) and path[:-1] == ("handlers",)):
        child = {}
    elif not isinstance(child, dict):
        raise ConfigError(f"{dotted(path)} is {shown(child)} and has no keys", where=origin)
    parent[name] = child
    return child


def _default_name(path: KeyPath) -> str | None:
    value: Any = RunConfig()
    for part in path:
        value = getattr(value, str(part))
    return None if value is None else str(value.name)


def _with_plugins(document: YamlDocument, plugins: Sequence[str]) -> YamlDocument:
    listed = document.data.get("plugins", [])
    if not isinstance(listed, list):
        return document  # validation will say so, with the line
    data = {**document.data, "plugins": [*listed]}
    origins = dict(document.replaced)
    for name in plugins:
        if name not in data["plugins"]:
            origins["plugins", len(data["plugins"])] = f"command line: --plugins {excerpt(name)}"
            data["plugins"].append(name)
    return YamlDocument(document.name, data, document.lines, origins)
