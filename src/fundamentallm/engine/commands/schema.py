"""The `schema` command."""

from __future__ import annotations

import argparse
from pathlib import Path

from fundamentallm.engine.arguments import add_plugins_to_show
from fundamentallm.engine.console import say

SUMMARY = "print the JSON schema of a YAML file, for editors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write it to a file and say how to use it"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="of SWEEP.yaml, and not of a configuration"
    )
    add_plugins_to_show(parser)


def execute(options: argparse.Namespace) -> int:
    """Print or write the schema."""
    from fundamentallm.config.yaml.file import MODELINE
    from fundamentallm.engine.catalogue import catalogue_with
    from fundamentallm.engine.schema import schema_text
    from fundamentallm.errors import MachineError

    text = schema_text(catalogue_with(options.plugins), options.sweep)
    if options.out is None:
        say(text, end="")
        return 0
    try:
        options.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(
            f"the schema cannot be written: {error.strerror or error}", where=f"--out {options.out}"
        ) from error
    say(f"Written to {options.out}. Put this as the first line of a YAML file beside it:")
    say(f"  {MODELINE}{options.out.name}")
    return 0
