"""A command is a file: every module of the room is a command, and the parser has all of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fundamentallm.engine import commands
from fundamentallm.engine.cli import build_parser, parse
from fundamentallm.engine.commands import COMMANDS

FILES = {path.stem for path in Path(commands.__file__).parent.glob("[!_]*.py")}


def test_every_file_is_a_command() -> None:
    assert set(COMMANDS) == FILES


def test_the_help_lists_the_commands_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    build_parser().print_help()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [words[0] for words in lines if words and words[0] in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_command_knows_what_to_execute(name: str) -> None:
    command = COMMANDS[name]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = [
        next(iter(action.choices)) if action.choices else "x"
        for action in parser._actions
        if not action.option_strings
    ]
    needed = [
        f"{action.option_strings[0]}=hf"
        for action in parser._actions
        if action.required and action.option_strings
    ]
    needed += [
        f"{group._group_actions[0].option_strings[0]}=1"
        for group in parser._mutually_exclusive_groups
        if group.required
    ]
    options = parse([name, *words[:1], *needed])
    assert options.command is command.execute
    assert options.debug is False
