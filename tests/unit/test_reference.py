"""The reference pages say what the code says, and no cell of them is empty."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from jsonschema.exceptions import best_match
from pydantic import TypeAdapter

from fundamentallm.config import RunConfig, TransformerConfig
from fundamentallm.config.data import SourceConfig
from fundamentallm.config.model import FamilyConfig
from fundamentallm.config.yaml.file import SCHEMA
from fundamentallm.config.yaml.source import parse_yaml
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.engine.catalogue import registries, stored_catalogue
from fundamentallm.engine.commands import COMMANDS
from fundamentallm.engine.reference import (
    SECTIONS,
    commands_page,
    example_of,
    option_example,
    pages,
    written,
)
from fundamentallm.errors import MachineError
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.optimizers import OPTIMIZERS, parameter_groups
from fundamentallm.training.schedulers import SCHEDULERS

DOCS = Path(__file__).resolve().parents[2] / "docs"
GENERATED = pages()
CATALOGUE = stored_catalogue()
COMPONENTS = [(kind, name) for kind, entries in CATALOGUE.items() for name in entries]
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
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
    for kind, entries in CATALOGUE.items():
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


@pytest.fixture(scope="module")
def supplied(tmp_path_factory) -> dict[str, Any]:
    """What the program gives to the factories of components."""
    run_dir = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(vocab_size=9, d_model=8, num_layers=1, num_heads=1, sequence_length=8)
    )
    optimizer = OPTIMIZERS.build("adamw", {}, parameter_groups(model), lr=0.01)
    return {
        "params": parameter_groups(model),
        "lr": 0.01,
        "model": model,
        "optimizer": optimizer,
        "scheduler": SCHEDULERS.build("constant", {}, optimizer=optimizer),
        "total_steps": 100,
        "warmup_steps": 10,
        "steps_per_epoch": 10,
        "device": torch.device("cpu"),
        "tokenizer": CharacterTokenizer.from_text("abcdefgh\n"),
        "texts": ["some text", "some text"],
        "text": "some text",
        "vocabulary": "abc",
        "split_texts": None,
        "run_dir": run_dir,
        "checkpoint_dir": run_dir / "checkpoints",
        "width": 8,
        "hidden_width": 16,
        "head_width": 8,
        "sequence_length": 16,
        "bias": False,
    }


@pytest.mark.parametrize(("kind", "name"), COMPONENTS, ids=lambda part: part)
def test_the_examples_of_a_component_are_values_that_it_takes(kind, name, supplied):
    entry, registry = CATALOGUE[kind][name], registries()[kind]
    if kind in ("sources", "families"):  # they read a text, or have a page of their own
        return
    options = {key: option_example(schema) for key, schema in entry["options"].items()}
    for key, schema in entry["options"].items():
        jsonschema.validate(options[key], schema)
        assert f"`{key}: " in GENERATED["components.md"], key
    assert list(registry.check(name, options)) == list(options)
    if name == "file":
        return  # it reads the file that its example names
    try:
        registry.build(name, options, **supplied)
    except MachineError as error:
        pytest.skip(str(error))  # a logger whose package is not installed


@pytest.mark.parametrize(("kind", "name"), COMPONENTS, ids=lambda part: part)
def test_a_component_is_shown_in_a_file_that_is_valid(kind, name):
    value = written(kind, name, CATALOGUE[kind][name])
    _, _, part = GENERATED["components.md"].partition(f"### {kind}: {name}\n")
    (shown,) = re.findall("^In a file: `(.*)`[.]$", part.partition("\n### ")[0], re.MULTILINE)
    assert parse_yaml(shown).data == value
    RunConfig.model_validate(value)
    assert best_match(VALIDATOR.iter_errors(value)) is None


def test_an_option_without_an_example_or_a_default_is_an_error():
    with pytest.raises(KeyError):
        option_example({"type": "string"})


def test_an_argument_without_a_help_text_is_an_error():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    commands.add_parser("new", description="x").add_argument("file")
    with pytest.raises(ValueError, match="a cell is empty"):
        commands_page(parser)
