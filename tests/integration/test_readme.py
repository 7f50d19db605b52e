"""What the README tells a reader to type works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fundamentallm.engine.cli import parse

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts]


def test_the_script_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)

    exec("\n".join(blocks("python")), {"__name__": "readme"})

    losses = [float(number) for number in re.findall(r"\d\.\d+", capsys.readouterr().out)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command_is_understood(command):
    if "fundamentallm.engine" in command:
        arguments = command[command.index("fundamentallm.engine") + 1 :]
        options = parse(arguments)
        if "config" in options:
            assert (ROOT / options.config).is_file()
    else:
        assert command[0] in {"python3", "pip", "source", "python"}
        if "constraints.txt" in command:
            assert (ROOT / "constraints.txt").is_file()


def test_every_file_of_the_tree_exists():
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", README, flags=re.DOTALL)
    package = ROOT / "src" / "fundamentallm"
    for line in tree.splitlines():
        name = line.split()[0]
        folders = (ROOT, package, package / "training")
        assert any((folder / name).exists() for folder in folders), line


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
