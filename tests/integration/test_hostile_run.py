"""A run directory from somebody else writes nothing outside itself, hangs nobody, runs nothing."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from fundamentallm.engine.cli import main

CONFIG = """
name: c
data: {source: python-docs, tokenizer: byte, sequence_length: 32, batch_size: 4}
model: {d_model: 32, num_layers: 1, num_heads: 2}
training: {total_steps: 2, eval_steps: 2, threads: 1}
handlers: {tensorboard: false}
"""
PRECIOUS = "echo mine\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with everything that a run writes."""
    place = tmp_path_factory.mktemp("trained")
    (place / "c.yaml").write_text(CONFIG)
    before = Path.cwd()
    os.chdir(place)
    try:
        assert main(["run", "c.yaml", "handlers.tensorboard=true"]) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(trained, tmp_path / "here")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / ".bashrc").write_text(PRECIOUS)
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path
    assert (tmp_path / "outside" / ".bashrc").read_text() == PRECIOUS
    assert [path.name for path in (tmp_path / "outside").iterdir()] == [".bashrc"]


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside / ".bashrc")


def dangling(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "new")


def relative(path: Path, outside: Path) -> None:
    path.symlink_to(os.path.relpath(outside / ".bashrc", path.parent))


def hard_link(path: Path, outside: Path) -> None:
    path.hardlink_to(outside / ".bashrc")


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def device(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path, outside: Path) -> None:
    path.mkdir()


def listening(path: Path, outside: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the path of a socket may not be long
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def linked_folder(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def loop(path: Path, outside: Path) -> None:
    path.symlink_to(path.name)


def chain(path: Path, outside: Path) -> None:
    path.with_name("between").symlink_to(outside / ".bashrc")
    path.symlink_to("between")


def linked_pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path.with_name("between"))
    path.symlink_to("between")


def own_memory(path: Path, outside: Path) -> None:
    path.symlink_to("/proc/self/mem")


Kind = Callable[[Path, Path], None]
OF_BOTH = [link, dangling, relative, pipe, device, listening, linked_folder, loop, chain]
OF_BOTH += [linked_pipe, own_memory]
OF_A_FILE = [*OF_BOTH, hard_link, folder]
OF_A_FOLDER = OF_BOTH
FILES = ["metrics.jsonl", "samples.jsonl", "log.txt", "config.yaml", ".lock", "corpus.txt", "STOP"]
FOLDERS = [
    "tensorboard",
    "incidents",
    "checkpoints",
    "checkpoints/superseded",
    "checkpoints/corrupt",
]

OFTEN = (link, dangling, pipe, linked_folder)  # the others are left to `-m long`
CASES = [(name, kind) for name in FILES for kind in OF_A_FILE]
CASES += [(name, kind) for name in FOLDERS for kind in OF_A_FOLDER]


def sampled(cases: list[tuple[str, Kind]], often: tuple[Kind, ...]) -> list[ParameterSet]:
    return [
        pytest.param(name, kind, marks=() if kind in often else pytest.mark.long)
        for name, kind in cases
    ]


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
@pytest.mark.parametrize(("name", "kind"), sampled(CASES, OFTEN))
def test_a_run_refuses_what_is_not_its_own(
    place: Path, name: str, kind: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("runs/c") / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    kind(path, place / "outside")
    code = main(["run", "c.yaml", "training.total_steps=4", "--resume", "runs/c"])
    said = capsys.readouterr().err
    assert code == 4, said
    assert str(path) in said
    assert f"rm {path}" in said


NAMES = ["best", "last", "step-00000002", "step-00000002/MANIFEST.json", "step-00000002/state.json"]


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
@pytest.mark.parametrize(
    ("name", "kind"), sampled([(name, kind) for name in NAMES for kind in OF_A_FILE], (link,))
)
def test_a_checkpoint_that_is_none_is_passed_over_or_refused(
    place: Path, name: str, kind: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("runs/c/checkpoints") / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    kind(path, place / "outside")
    arguments = ["run", "c.yaml", "training.total_steps=4", "--resume", "runs/c"]
    assert main(arguments) in (0, 4)
    assert main(["verify", "runs/c"]) in (0, 4)
    assert main(["generate", "runs/c", "--max-tokens", "1"]) in (0, 4)
    said = capsys.readouterr()
    assert "mine" not in said.err + said.out


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
def test_a_linked_folder_of_checkpoints_goes_on_as_the_message_says(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = place / "disk"
    Path("runs/c/checkpoints").rename(disk)
    Path("runs/c/checkpoints").symlink_to(disk)
    arguments = ["run", "c.yaml", "training.total_steps=4", "--resume", "runs/c"]
    assert main(arguments) == 4
    fix = capsys.readouterr().err.rpartition("fix:")[2].split()
    assert fix[:2] == ["rm", "runs/c/checkpoints,"]
    Path("runs/c/checkpoints").unlink()
    assert main([*arguments, fix[-1]]) == 0
    assert "continuing" in capsys.readouterr().err
    assert (disk / "step-00000004").is_dir()


@pytest.mark.parametrize("command", ["evaluate", "generate", "verify"])
@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
@pytest.mark.parametrize("kind", [link, pipe, device, folder, linked_folder])
def test_reading_refuses_a_configuration_that_is_no_file(
    place: Path, kind: Kind, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs/c/config.yaml").unlink()
    kind(Path("runs/c/config.yaml"), place / "outside")
    assert main([command, "runs/c"]) == 4
    said = capsys.readouterr()
    assert "runs/c/config.yaml" in said.err
    assert "mine" not in said.err + said.out


@pytest.mark.skipif(os.name == "nt", reason="needs modes")
def test_what_a_run_writes_is_its_owners_alone(tmp_path: Path, trained: Path) -> None:
    paths = [trained / "runs" / "c", *(trained / "runs" / "c").rglob("*")]
    modes = {
        str(path.relative_to(trained)): stat.S_IMODE(path.stat().st_mode)
        for path in paths
        if stat.S_IMODE(path.stat().st_mode) != (0o700 if path.is_dir() else 0o600)
    }
    assert modes == {}
    names = {path.name for path in paths}
    assert {"metrics.jsonl", "samples.jsonl", "log.txt", "corpus.txt", "tensorboard"} <= names


@pytest.mark.skipif(os.name == "nt", reason="needs modes")
def test_nothing_is_ever_writable_by_everybody(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("A text. " * 100)
    before = os.umask(0)
    try:
        assert main(["run", "c.yaml"]) == 0
        assert main(["prepare", "text.txt", "--out", "prepared/text"]) == 0
        assert main(["export", "runs/c", "--format", "torch", "--out", "exported/c.pt"]) == 0
    finally:
        os.umask(before)
    made = [path for path in tmp_path.rglob("*") if path.name not in ("c.yaml", "text.txt")]
    assert {"tokenizer.json", "c.pt", "corpus.txt"} <= {path.name for path in made}
    assert not [path for path in made if path.stat().st_mode & 0o022]


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
@pytest.mark.parametrize("kind", [link, pipe, device, folder, linked_folder])
@pytest.mark.parametrize("name", ["report.json", "evidence"])
def test_an_incident_that_is_no_files_is_refused(
    place: Path, name: str, kind: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    incident = Path("runs/c/incidents/00000001-data")
    incident.mkdir(parents=True)
    (incident / "report.json").write_text(
        '{"step": 1, "fault": "", "verdict": "data", "decision": "",'
        ' "first_bad": {"forward": null, "backward": null}, "description": {}}'
    )
    path = incident / name
    path.unlink(missing_ok=True)
    kind(path, place / "outside")
    assert main(["replay", str(incident)]) == 4
    assert "mine" not in capsys.readouterr().err
