"""A command is a file: every module of the room is a command, and the parser has all of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fundamentallm.engine import commands
from fundamentallm.engine.cli import build_parser, main, parse
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


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("rnu quickstart", "run"),
        ("list optimzers", "optimizers"),
        ("export runs/mine --out x --format gguv", "gguf"),
        ("run quickstart --resmue never", "--resume"),
        ("generate runs/mine --promt=x", "--prompt"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(
    words: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert f"did you mean '{near}'?" in capsys.readouterr().err


def test_a_word_that_resembles_nothing_is_answered_without_a_guess(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["run", "quickstart", "--zzz"])
    said = capsys.readouterr().err
    assert "unrecognized arguments: --zzz\n" in said
    assert "did you mean" not in said
