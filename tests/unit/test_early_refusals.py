"""What needs no large library to be refused is refused before one is imported."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from tests.runs import SMALLEST, trained

from fundamentallm.engine.cli import main
from fundamentallm.engine.commands import COMMANDS

NO_RUN, NO_CHECKPOINT = "there is no run or checkpoint here", "there is no checkpoint here"
NO_START = "there is no such folder to start from"
NO_FILE, NO_TEXT = "no such file or folder", "the source holds no text"
EXPORT = ["--format", "hf", "--out", "out"]
REFUSED = [
    (["check", "no.yaml"], 2, "the configuration file does not exist"),
    (["check", "folder"], 2, "this path is a directory"),
    (["check", "empty.yaml"], 2, "the configuration is empty"),
    (["check", "no-text.yaml"], 3, NO_FILE),
    (["check", "quickstart", "data.source=empty.txt"], 3, NO_TEXT),
    (["check", "quickstart", "data.source=folder"], 3, "there is no text in this folder"),
    (["check", "quickstart", "model={init_from: no}"], 4, NO_START),
    (["run", "quickstart", "model={init_from: runs/no}"], 4, NO_START),
    (["run", "no.yaml"], 2, "the configuration file does not exist"),
    (["run", "no-text.yaml"], 3, NO_FILE),
    (["run", "quickstart", "--resume", "no"], 4, NO_RUN),
    (["plan", "no-text.yaml", "--minutes", "1"], 3, NO_FILE),
    (["tune", "no-text.yaml"], 3, NO_FILE),
    (["tune", "no-text.yaml", "--learning-rate"], 3, NO_FILE),
    (["sweep", "no.yaml"], 2, "the configuration file does not exist"),
    (["sweep", "folder"], 2, "this path is a directory"),
    (["sweep", "no-config.yaml"], 2, "the configuration file does not exist"),
    (["sweep", "no-text-sweep.yaml"], 3, NO_FILE),
    (["new", "new.yaml", "--data", "no.txt"], 3, NO_FILE),
    (["new", "new.yaml", "--data", "empty.txt"], 3, NO_TEXT),
    (["generate", "no"], 4, NO_RUN),
    (["generate", "empty.txt"], 4, NO_RUN),
    (["generate", "folder"], 4, NO_CHECKPOINT),
    (["evaluate", "no"], 4, NO_RUN),
    (["evaluate", "run", "--data", "no.txt"], 3, NO_FILE),
    (["export", "no", *EXPORT], 4, NO_RUN),
    (["export", "folder", *EXPORT], 4, NO_CHECKPOINT),
    (["verify", "folder"], 4, NO_CHECKPOINT),
    (["report", "no"], 4, NO_RUN),
    (["compare", "run", "no"], 4, NO_RUN),
    (["replay", "folder"], 4, "this is not the directory of an incident"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("run").mkdir()
    Path("run/config.yaml").write_text("name: run\n")
    for name in ("empty.yaml", "empty.txt"):
        Path(name).touch()
    Path("no-text.yaml").write_text("data: {source: no.txt}\n")
    keys = "steps: 5\nkeys: {model.num_layers: [1, 2]}\n"
    Path("no-config.yaml").write_text(f"config: no.yaml\n{keys}")
    Path("no-text-sweep.yaml").write_text(f"config: no-text.yaml\n{keys}")


@contextlib.contextmanager
def forbidden():
    raise AssertionError("large libraries are imported")
    yield


@pytest.mark.parametrize(("words", "code", "said"), REFUSED, ids=lambda value: str(value))
def test_it_teaches_before_anything_large_is_imported(
    words, code, said, folder, monkeypatch, capsys
):
    monkeypatch.setattr(COMMANDS[words[0]], "loading", forbidden)
    assert main(words) == code
    out, err = capsys.readouterr()
    assert said in err
    assert "Traceback" not in err
    assert not out
    assert not Path("out").exists()
    assert not Path("new.yaml").exists()
    assert not Path("runs").exists()
    assert not Path("sweeps").exists()


def test_no_refusal_imports_torch_or_numpy(folder):
    program = f"""
import sys
from fundamentallm.engine.cli import main
for words in {[words for words, *_ in REFUSED]!r}:
    assert main(words) > 1, words
    assert not {{"torch", "numpy"}} & sys.modules.keys(), words
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_a_finished_run_is_told_although_its_text_is_gone(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 40)
    trained(tmp_path, SMALLEST)
    text.unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["run", "tiny.yaml"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["run", "tiny.yaml", "--resume", "never"]) == 3
    assert NO_FILE in capsys.readouterr().err


def test_plugins_may_have_sources_of_their_own(folder, monkeypatch):
    monkeypatch.setattr(COMMANDS["check"], "loading", forbidden)
    with pytest.raises(AssertionError, match="large libraries"):
        main(["check", "no-text.yaml", "--plugins", "json"])


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "SLURM_PROCID"])
def test_the_ranks_of_a_group_read_together(variable, folder, monkeypatch):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(COMMANDS["run"], "loading", forbidden)
    with pytest.raises(AssertionError, match="large libraries"):
        main(["run", "no-text.yaml"])


@pytest.mark.parametrize(
    ("typed", "meant"), [("mine", "runs/mine"), ("runs/mime", "runs/mine"), ("runn", "run")]
)
def test_the_run_that_was_meant_is_named(typed, meant, folder, capsys):
    Path("runs/mine").mkdir(parents=True)
    assert main(["generate", typed]) == 4
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


def test_the_run_to_start_from_that_was_meant_is_named(folder, capsys):
    Path("runs/mine").mkdir(parents=True)
    assert main(["check", "quickstart", "model={init_from: runs/mime}"]) == 4
    assert "did you mean 'runs/mine'?" in capsys.readouterr().err


def test_the_suffix_makes_no_name_like_another(folder, capsys):
    Path("tiny.yaml").touch()
    assert main(["check", "book.yaml"]) == 2
    assert "did you mean" not in capsys.readouterr().err
    assert main(["check", "tinny.yaml"]) == 2
    assert "did you mean 'tiny.yaml'?" in capsys.readouterr().err
