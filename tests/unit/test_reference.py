"""The reference pages say what the code says, and no cell of them is empty."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from fundamentallm.config.data import SourceConfig
from fundamentallm.config.model import FamilyConfig
from fundamentallm.engine.catalogue import stored_catalogue
from fundamentallm.engine.commands import COMMANDS
from fundamentallm.engine.reference import SECTIONS, commands_page, example_of, pages

DOCS = Path(__file__).resolve().parents[2] / "docs"
GENERATED = pages()
KEYS = [(place, key) for place, section in SECTIONS.items() for key in section.model_fields]


@pytest.mark.parametrize("name", GENERATED)
def test_the_page_is_that_of_the_code(name):
    expected = "run: python -m fundamentallm.engine.reference docs"
    assert (DOCS / name).read_text(encoding="utf-8") == GENERATED[name], expected


def cells(text: str) -> list[list[str]]:
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


@pytest.mark.parametrize("name", GENERATED)
def test_no_cell_is_empty(name):
    rows = cells(GENERATED[name])
    assert len(rows) > 50
    assert all(cell.strip("`") for row in rows for cell in row)


def test_every_key_component_option_and_command_has_its_row():
    keys = [row[0] for row in cells(GENERATED["configuration.md"])]
    for place, key in KEYS:
        assert f"`{key}`" in keys, (place, key)
    components = GENERATED["components.md"]
    for kind, entries in stored_catalogue().items():
        for name, entry in entries.items():
            _, _, part = components.partition(f"### {kind}: {name}\n")
            part = part.partition("\n### ")[0]
            assert part, name
            if kind != "families":
                assert all(f"| `{option}` |" in part for option in entry["options"]), name
    assert re.findall("^## (.*)", GENERATED["commands.md"], flags=re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize(("place", "key"), KEYS, ids=lambda part: part or "top")
def test_an_example_is_a_value_that_the_key_takes(place, key):
    section = SECTIONS[place]
    if f"| `{key}` | a section |" in GENERATED["configuration.md"]:
        return
    row = next(
        row
        for row in cells(GENERATED["configuration.md"].partition(f"## {place or 'Top level'}\n")[2])
        if row[0] == f"`{key}`"
    )
    (written,) = yaml.safe_load(row[4].strip("`").replace("\\|", "|")).values()
    value = example_of(section, place, key)
    assert written == value or written == str(value) or float(written) == value
    if section is SourceConfig:  # its keys exclude one another
        annotation = section.model_fields[key].rebuild_annotation()
        TypeAdapter(annotation).validate_python(value)
    else:
        section.model_validate(
            {"family": "x", key: value} if section is FamilyConfig else {key: value}
        )


def test_an_argument_without_a_help_text_is_an_error():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    commands.add_parser("new", description="x").add_argument("file")
    with pytest.raises(ValueError, match="a cell is empty"):
        commands_page(parser)
