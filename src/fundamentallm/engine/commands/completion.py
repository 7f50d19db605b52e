"""The `completion` command."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fundamentallm.engine.console import say

SUMMARY = "print the script with which a shell completes this command"

_EXAMPLES = """\
bash, with the package bash-completion:
  mkdir -p ~/.local/share/bash-completion/completions
  fundamentallm completion bash > ~/.local/share/bash-completion/completions/fundamentallm

zsh, with these lines in ~/.zshrc:  fpath=(~/.zfunc $fpath); autoload -Uz compinit && compinit
  mkdir -p ~/.zfunc
  fundamentallm completion zsh > ~/.zfunc/_fundamentallm

fish:
  mkdir -p ~/.config/fish/completions
  fundamentallm completion fish > ~/.config/fish/completions/fundamentallm.fish

A new shell then completes the command.
"""

_CONFIGURATIONS = {
    "bash": """\
_fundamentallm_config() {{
  compgen -W "{names}" -- "$1"
  _shtab_compgen_files "$1"
}}
""",
    "zsh": """\
_fundamentallm_config() {{
  _alternative 'names:packaged configuration:({names})' 'files:file:_files -g "*.(yaml|yml)"'
}}
""",
    "fish": """function _fundamentallm_config
  string split " " "{names}"
  __fish_complete_path (commandline -ct)
end
""",
}

_CONFIGURATION = {
    "bash": "_fundamentallm_config",
    "zsh": "_fundamentallm_config",
    "fish": "(_fundamentallm_config)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shell", choices=tuple(_CONFIGURATIONS), help="the shell to complete in")
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def execute(options: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    from fundamentallm.config.yaml.file import packaged_names

    for action in _actions(options.parser):
        if action.dest == "config":
            _complete(action, _CONFIGURATION)
        elif action.type is Path or action.dest == "inputs":
            _complete(action, shtab.FILE)
    names = " ".join(packaged_names())
    preamble = _CONFIGURATIONS[options.shell].format(names=names)
    say(shtab.complete(options.parser, options.shell, preamble=preamble))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action


def _complete(action: argparse.Action, how: Mapping[str, Any]) -> None:
    action.complete = how  # type: ignore[attr-defined]
