"""A run directory from somebody else writes nothing outside itself, hangs nobody, runs nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from fault_injection.hostile import (
    CONFIG,
    KINDS,
    PLACES,
    Kind,
    beside_something_precious,
    chain,
    dangling,
    device,
    folder,
    hard_link,
    hostile,
    link,
    linked_folder,
    linked_pipe,
    listening,
    loop,
    make_run,
    own_memory,
    parent,
    pipe,
    put,
    relative,
    standard_input,
)

from fundamentallm.engine.cli import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with everything that a run writes."""
    place = tmp_path_factory.mktemp("trained")
    make_run(place, "handlers.tensorboard=true")
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with beside_something_precious(trained, tmp_path):
        monkeypatch.chdir(tmp_path / "here")
        yield tmp_path


OF_BOTH = [link, dangling, relative, pipe, device, listening, linked_folder, loop, chain]
OF_BOTH += [linked_pipe, own_memory, parent, standard_input]
OF_A_FILE = [*OF_BOTH, hard_link, folder]
OF_A_FOLDER = OF_BOTH
FILES = [
    "README.md", "metrics.jsonl", "samples.jsonl", "log.txt", "config.yaml", ".lock", "corpus.txt",
    "STOP", "usage.jsonl",
]  # fmt: skip
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
    put(kind, path, place / "outside")
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
    put(kind, Path("runs/c/checkpoints") / name, place / "outside")
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


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
def test_the_command_tries_fifteen_kinds_at_eleven_places_and_notices_what_does_not_hold() -> None:
    assert (len(KINDS), len(PLACES)) == (15, 11)
    assert set(hostile([parent, hard_link], ["checkpoints/last", "log.txt"]).values()) == {""}

    def sound(path: Path, outside: Path) -> None:
        path.touch()

    def opens_the_outside(path: Path, outside: Path) -> None:
        (outside / "new").touch()

    assert "run went on" in hostile([sound], ["log.txt"])["sound", "log.txt"]
    found = hostile([opens_the_outside], ["checkpoints/last"])
    assert found["opens_the_outside", "checkpoints/last"] == "something was made outside"
