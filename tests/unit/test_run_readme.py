"""The README of a run directory shows its commands as a user types them, whatever its name is."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from tests.markdown import Shown

from fundamentallm.engine.wiring.run_readme import lists_changes, run_readme

NAMES = ["quickstart-2", "python_docs", "_a_", "a|b", "`x` <b> #", "it's", "# a", "a b\\"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name: str) -> None:
    run = Path("runs") / name
    shown = Shown(run_readme(run, run / "checkpoints", "fundamentallm"))

    assert shown.texts["h1"] == [name]
    rows = dict(shown.rows())
    command = shlex.split(rows["write text with the model"])
    assert command == ["fundamentallm", "generate", str(run)]
    assert shlex.split(rows["stop the run with its state saved"])[-2:] == ["touch", f"{run}/STOP"]
    assert not shown.tags & {"b", "em", "a"}


def test_a_plain_name_is_easy_to_read_in_a_terminal() -> None:
    run = Path("runs/python_docs-2")
    text = run_readme(run, run / "checkpoints", "fundamentallm")
    assert text.startswith("# python_docs-2\n")
    assert "`fundamentallm generate runs/python_docs-2`" in text
    assert not lists_changes(text)


def test_a_name_that_is_no_text_is_written() -> None:
    run = Path("runs") / b"\xff\n".decode(errors="surrogateescape")
    run_readme(run, run / "checkpoints", "fundamentallm").encode()


def test_changes_are_shown_whole() -> None:
    run = Path("runs/mine")
    changed = {"step": 1200, "differences": [["training.optimizer", "a|b", "`c`"]]}
    text = run_readme(run, run / "checkpoints", "fundamentallm", [changed])
    assert lists_changes(text)
    assert ("1,200", "training.optimizer: a|b -> '`c`'") in Shown(text).rows()
