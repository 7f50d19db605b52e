"""The mutants of the program: which there are, and that tests decide about them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from fault_injection.mutants import (
    EXPLAINED,
    PACKAGE,
    ROOT,
    TESTS,
    changes,
    files_testing,
    mutants_of,
)

SOUND = """
def f(a, b: int = 1):
    if a < b and not b:
        raise ValueError(f"{a + 1}")
    log.warning("say %s", a + 1)
    a.x = 2
    assert a == 1
    return a + b
"""


def test_each_change_is_made_once_and_taken_back() -> None:
    tree = ast.parse(SOUND)
    before = ast.unparse(tree)
    seen = [(kind, ast.unparse(tree)) for _, _, kind in changes(tree.body)]
    assert ast.unparse(tree) == before
    texts = [text for _, text in seen]
    assert len(set(texts)) == len(texts)
    assert before not in texts
    lines = {line for text in texts for line in set(text.splitlines()) - set(before.splitlines())}
    assert {line.strip() for line in lines} == {
        "def f(a, b: int=2):",
        "if a <= b and (not b):",
        "if a >= b and (not b):",
        "if a < b or not b:",
        "if not (a < b and (not b)):",
        "pass",
        "a.x = 3",
        "return a - b",
        "return None",
    }
    assert [kind for kind, text in seen if "pass" in text] == ["statement left out"] * 2


def test_every_file_of_the_series_has_tests_that_are_there() -> None:
    for place in TESTS:
        path = ROOT / PACKAGE / place
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            for test in files_testing(str(file.relative_to(ROOT))):
                assert (ROOT / test).is_file(), test


def test_what_is_explained_is_still_a_mutant() -> None:
    explained: dict[str, list[dict[str, str]]] = defaultdict(list)
    for one in json.loads(EXPLAINED.read_text()):
        explained[one["file"]].append(one)
        assert one["why"]
    for file, those in explained.items():
        functions = {one["function"] for one in those}
        tree = ast.parse((ROOT / file).read_text())
        numbers = {  # writing out each mutant of a whole file takes a second or more
            number
            for number, (_, around, _) in enumerate(changes(tree.body))
            if ".".join(part.name for part in around) in functions
        }
        found = {(mutant.function, mutant.diff) for mutant in mutants_of(file, numbers)}
        assert {(one["function"], one["diff"]) for one in those} <= found


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_command_kills_and_lists(tmp_path: Path) -> None:
    out = tmp_path / "list.json"
    words = ["--count", "3", "--seed", "2", "--only", "training/schedulers", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "fault_injection.mutants", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "seed 2: 3 mutants" in done.stdout, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert len(results) == 3
    assert any(one["killed_by"].startswith("tests/unit/") for one in results)
