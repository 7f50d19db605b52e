"""What an installation promises: one version, a licence, configurations by their names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fundamentallm
from fundamentallm.config import load_config
from fundamentallm.config.yaml.file import MODELINE, PACKAGED, SCHEMA, packaged_names
from fundamentallm.engine.cli import main, parse, tell_start
from fundamentallm.engine.commands import COMMANDS
from fundamentallm.engine.tuning.tune import write_copy
from fundamentallm.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)


def test_the_version_has_one_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "fundamentallm.__version__"
    }
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


@pytest.mark.parametrize("module", ["fundamentallm", "fundamentallm.engine"])
def test_both_modules_are_the_program(module):
    result = python("-m", module, "--version")

    assert result.stdout == f"fundamentallm {fundamentallm.__version__}\n"


def test_the_console_command_names_itself(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "fundamentallm"), "--help"])
    with pytest.raises(SystemExit):
        main()

    out = capsys.readouterr().out
    assert out.startswith("usage: fundamentallm ")
    assert out.endswith("Start with: fundamentallm run quickstart\n")


def test_without_a_command_all_commands_are_listed(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert all(f"\n    {name}" in err for name in COMMANDS)
    assert "Start with: " in err


def test_the_licence_is_the_one_of_the_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert project["license"] == "BSD-3-Clause"
    assert (ROOT / "LICENSE").read_text().startswith("BSD 3-Clause License")
    assert project["authors"] == [{"name": "FundamentaLLM contributors"}]


def test_the_tools_of_this_repository_are_no_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert "test" in project["project"]["optional-dependencies"]
    assert {"lint", "peers"} <= project["dependency-groups"].keys()
    assert not {"lint", "peers"} & project["project"]["optional-dependencies"].keys()


def test_a_packaged_configuration_has_a_short_name_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert load_config(Path("quickstart")).name == "quickstart"
    assert (ROOT / "configs").resolve() == PACKAGED
    assert "quickstart" in packaged_names()


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("name: mine")

    assert load_config(Path("quickstart")).name == "mine"


def test_a_copy_of_a_packaged_configuration_has_its_schema_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rate = {("training", "learning_rate"): 0.5}
    write_copy(Path("fast.yaml"), Path("quickstart"), ["seed=3"], lambda _: rate)

    first, *_ = Path("fast.yaml").read_text().splitlines()
    assert Path(first.removeprefix(MODELINE)) == Path("schema.json")
    assert Path("schema.json").read_text() == SCHEMA.read_text()
    config = load_config(Path("fast.yaml"))
    assert (config.seed, config.training.learning_rate) == (3, 0.5)


@pytest.mark.parametrize("name", ["folder/quickstart", "quickstart.yaml"])
def test_only_a_bare_name_is_short(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(Path(name))


def test_a_short_name_with_a_typo_is_corrected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(Path("quickstrat"))

    assert "did you mean 'quickstart'?" in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [["check", "quickstart", "training.learing_rate=1"], ["run", "quickstart", "seed=x"]],
    ids=" ".join,
)
def test_a_typo_is_answered_without_torch(tmp_path, words):
    program = f"""
import sys
from fundamentallm.engine.cli import main
code = main({words!r})
print(code, "torch" in sys.modules)
"""
    result = python("-c", program, cwd=tmp_path)

    assert result.stdout == "2 False\n", result.stderr
    assert result.stderr.startswith("reading quickstart\nerror: command line: ")


def test_the_first_line_says_what_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["run", "quickstart", "seed=x", "--resume", "runs/before"])

    assert capsys.readouterr().err.startswith("resuming runs/before\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["new", "mine.yaml", "--budget", "soon"], "writing mine.yaml"),
        (["verify", "runs/none"], "reading runs/none"),
        (["compare", "runs/a", "runs/b"], "reading runs/a, runs/b"),
        (["list"], None),
    ],
    ids=lambda value: str(value),
)
def test_the_first_line_says_what_is_read_or_written(capsys, words, line):
    tell_start(parse(words))
    assert capsys.readouterr().err == (f"{line}\n" if line else "")


def test_other_ranks_say_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    main(["run", "quickstart", "seed=x"])

    assert capsys.readouterr().err.startswith("error on rank 1: ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "100000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_that_wait_sleep_soon_unless_the_environment_says_otherwise(
    given: dict[str, str], expected: str
) -> None:
    code = "import fundamentallm, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    others = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=others | given, capture_output=True, text=True
    )
    assert done.stdout.strip() == expected
