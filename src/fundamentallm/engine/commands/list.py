"""The `list` command."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fundamentallm.engine.arguments import add_plugins_to_show
from fundamentallm.engine.catalogue import KINDS, catalogue_with
from fundamentallm.engine.console import program, say

SUMMARY = "list the optimizers, handlers and other parts that a YAML file can name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "kind",
        nargs="?",
        choices=tuple(KINDS),
        metavar="KIND",
        help="with their options: " + ", ".join(KINDS),
    )
    parser.add_argument("--json", action="store_true", help="as JSON, options included")
    add_plugins_to_show(parser)


def execute(options: argparse.Namespace) -> int:
    """Print the names, or those of one kind with their options."""
    catalogue = catalogue_with(options.plugins)
    shown = {kind: catalogue[kind] for kind in KINDS if options.kind in (None, kind)}
    if options.json:
        say(json.dumps(shown, indent=2))
        return 0
    for kind, entries in shown.items():
        say(f"{kind} (key: {KINDS[kind]})" + ("" if entries else ": none; plugins can add some"))
        width = max(map(len, entries), default=0)
        for name, entry in entries.items():
            say(f"  {name:<{width}}  {entry['summary']}")
            if options.kind is not None:
                _say_options(entry, " " * (width + 4))
        if options.kind is None:
            say()
    if options.kind is None:
        say(f"With options: {program()} list {next(iter(KINDS))}")
    return 0


def _say_options(entry: dict[str, Any], indent: str) -> None:
    from fundamentallm.registry import in_words

    for key, schema in entry["options"].items():
        default = f" = {json.dumps(schema['default'])}" if "default" in schema else ""
        needed = ", needed" if key in entry["required"] else ""
        words = "; ".join(filter(None, (in_words(schema), schema.get("description"))))
        say(f"{indent}{key}{default}{needed}: {words}")
