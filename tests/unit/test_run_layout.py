"""The names of a run stand in one module, and RUN_OR_CHECKPOINT is parsed in one function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fundamentallm.errors import CheckpointError
from fundamentallm.files import run_layout
from fundamentallm.files.run_layout import RunOrCheckpoint

PACKAGE = Path(run_layout.__file__).resolve().parents[1]
NAMES = {
    value for key, value in vars(run_layout).items() if key.isupper() and isinstance(value, str)
}
# These are words as well: of YAML, of metrics, of stored states. As names they follow a slash.
WORDS = {"tensorboard", "checkpoints", "incidents", "best", "last", "evidence"}
OTHERS = {
    "run_layout.py",
    "measuring.py",  # the folder that a measuring process is handed
    "export.py",  # the folder of a model of other tools
    "pretrained.py",  # the same, read
}


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """Return the string nodes that are documentation: statements of their own."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def names_in(source: str) -> Iterator[str]:
    """Yield each name of a run that a module writes out: as a path's part, or as a text."""
    tree = ast.parse(source)
    documentation = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            if isinstance(node.right, ast.Constant) and node.right.value in NAMES:
                yield str(node.right.value)
        elif (
            isinstance(node, ast.Constant)
            and node not in documentation
            and node.value in NAMES - WORDS
        ):
            yield str(node.value)


def test_no_other_module_writes_a_name_of_a_run_out() -> None:
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if path.name not in OTHERS and (names := list(names_in(path.read_text(encoding="utf-8"))))
    }
    assert not found


@pytest.mark.parametrize(
    "source", ['open("metrics.jsonl")', 'path = run / "tensorboard"', 'LOCK = ".lock"']
)
def test_the_search_would_notice_a_name(source: str) -> None:
    assert list(names_in(source))


def test_a_word_is_no_name() -> None:
    assert not list(names_in('state = {"best": 1}; say("""metrics.jsonl is full""")'))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000200"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text("{}")
    (checkpoint.parent / "best").write_text("step-00000200\n")
    return tmp_path / "run"


def inside(run: Path) -> Path:
    return run / "checkpoints"


def test_a_run_stands_for_all_its_checkpoints(run: Path) -> None:
    named = RunOrCheckpoint.parse(run, inside)
    assert named == RunOrCheckpoint(run / "checkpoints")
    assert named.is_run


def test_a_checkpoint_is_told_by_its_manifest(run: Path) -> None:
    named = RunOrCheckpoint.parse(run / "checkpoints" / "step-00000200", inside)
    assert named == RunOrCheckpoint(run / "checkpoints", checkpoint="step-00000200")
    assert not named.is_run


def test_a_pointer_file_stands_for_what_it_names(run: Path) -> None:
    named = RunOrCheckpoint.parse(run / "checkpoints" / "best", inside)
    assert named == RunOrCheckpoint(run / "checkpoints", pointer="best")
    assert not named.is_run


@pytest.mark.parametrize("name", ["model.pt", "runs/none", "notes.txt"])
def test_anything_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError):
        RunOrCheckpoint.parse(tmp_path / name, inside)
