"""The commands, one file each: its summary, its arguments, and what it does.

A command's module imports the standard library and only the light parts of this package; what else
it needs is imported when it is executed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Protocol

from fundamentallm.engine.commands import (
    check,
    compare,
    completion,
    evaluate,
    export,
    generate,
    list,
    new,
    plan,
    prepare,
    replay,
    report,
    run,
    schema,
    sweep,
    tune,
    verify,
)


class Command(Protocol):
    """What the module of a command has."""

    SUMMARY: str
    """One line for the list of commands."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def execute(self, options: argparse.Namespace) -> int:
        """Run the command; return the exit code."""


COMMANDS: Mapping[str, Command] = {
    "run": run,
    "new": new,
    "check": check,
    "tune": tune,
    "plan": plan,
    "evaluate": evaluate,
    "prepare": prepare,
    "verify": verify,
    "export": export,
    "replay": replay,
    "report": report,
    "compare": compare,
    "sweep": sweep,
    "generate": generate,
    "list": list,
    "schema": schema,
    "completion": completion,
}
"""By name, in the order of the help."""
