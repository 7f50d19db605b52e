"""What the README and the pages under docs/ tell a reader to type works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tests.pages import DOCS, README, ROOT, code, commands

from fundamentallm.config import RunConfig
from fundamentallm.config.sweep import SweepConfig
from fundamentallm.config.yaml.file import packaged, packaged_names
from fundamentallm.engine.cli import parse

PAGES = [README, *(page for page in DOCS if page.parent.name == "docs")]
TEXT = README.read_text(encoding="utf-8")

WRITTEN = (
    {  # files that a page shows
        block.splitlines()[0].removeprefix("# ")
        for page in PAGES
        for block in code(page, "yaml")
        if block.startswith("# ")
    }
    | {  # and those that a command of a page writes
        words[2]
        for page in PAGES
        for words in commands(page)
        if words[:2] == ["fundamentallm", "new"]
    }
)


def test_the_script_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)

    exec("\n".join(code(README, "python")), {"__name__": "readme"})

    losses = [float(number) for number in re.findall(r"\d\.\d+", capsys.readouterr().out)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "command", [command for page in PAGES for command in commands(page)], ids=" ".join
)
def test_a_command_is_understood(command):
    if "fundamentallm" in command:
        options = parse(command[command.index("fundamentallm") + 1 :])
        if "config" in options and str(options.config) not in WRITTEN:
            assert packaged(options.config), "an installed user has no other file"
    elif command[0] == "torchrun":
        assert parse(command[command.index("fundamentallm.engine") + 1 :]).config
    else:
        assert command[0] in {"python3", "pip", "source", "python"}
        if "constraints.txt" in command:
            assert (ROOT / "constraints.txt").is_file()


def test_the_page_on_the_command_has_every_packaged_configuration():
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    _, _, table = page.partition("## Packaged configurations")
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == packaged_names()


def test_every_file_of_the_tree_exists():
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", TEXT, flags=re.DOTALL)
    folders: list[Path] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.findall(r"^\s*(\S+)", line)
        if re.fullmatch(r"\s*\S+\.py(  \S+\.py)+", line):
            names = line.split()
        for name in names:
            path = Path(ROOT, *folders[:depth], name)
            assert path.exists(), line
        folders[depth:] = [Path(names[0])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_yaml_block_is_a_valid_part_of_a_configuration(page):
    for block in code(page, "yaml"):
        overrides = yaml.safe_load(block.replace("9f86d081884c7d65...", "9f86d081884c7d65" * 4))
        if block.startswith("# sweep.yaml\n"):
            SweepConfig.model_validate(overrides)
            continue
        base = {"name": "page", "data": {"source": "python-docs"}}
        merged = {**base, **overrides}
        if "sources" in merged["data"]:
            merged["data"].pop("source", None)
        RunConfig.model_validate(merged)
