"""`replay`: an incident from the command line, and directories that are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fault_injection.heal import CONFIG, TEXT, make_incident
from ignite.engine import Events

from fundamentallm.config import load_config
from fundamentallm.engine.cli import main
from fundamentallm.engine.wiring import run_directory
from fundamentallm.engine.wiring.assemble import assemble, open_machine


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    incident, verdict = make_incident(place, 3)
    assert verdict == "divergence"
    return incident


@pytest.fixture
def incident(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / made.name))


def test_the_step_is_computed_again_and_the_same_module_named(incident, capsys):
    report = json.loads((incident / "report.json").read_text())
    module = report["first_bad"]["forward"]["module"]
    before = sorted((p, p.stat().st_mtime_ns) for p in incident.rglob("*"))
    assert main(["replay", str(incident)]) == 0
    text = capsys.readouterr().out
    assert f"forward    output of {module}   (recorded: output of {module})" in text
    assert text.rstrip().endswith("Reproduced.")
    assert f"step {report['step']}" in text
    assert sorted((p, p.stat().st_mtime_ns) for p in incident.rglob("*")) == before


def test_another_module_than_the_recorded_one_is_an_error(incident, capsys):
    path = incident / "report.json"
    report = json.loads(path.read_text())
    report["first_bad"]["forward"]["module"] = "blocks.7"
    path.write_text(json.dumps(report))
    assert main(["replay", str(incident)]) == 20
    assert "the incident is not reproduced" in capsys.readouterr().err


@pytest.mark.parametrize("verdict", ["transient", "spike"])
def test_a_finite_incident_has_nothing_to_replay(incident, capsys, verdict):
    path = incident / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": verdict}))
    shutil.rmtree(incident / "evidence")
    assert main(["replay", str(incident)]) == 0
    assert "nothing to replay" in capsys.readouterr().out


def test_what_is_no_incident_says_what_one_is(incident, tmp_path, capsys):
    (incident / "report.json").write_text("[1, 2]")
    for path in (incident, tmp_path, tmp_path / "nowhere"):
        assert main(["replay", str(path)]) == 4
        assert "incidents/00000137-data" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["verdict", "first_bad", "description"])
def test_a_report_that_lacks_a_part_is_refused(incident, capsys, missing):
    path = incident / "report.json"
    report = json.loads(path.read_text())
    del report[missing]
    path.write_text(json.dumps(report))
    assert main(["replay", str(incident)]) == 4
    assert "not the directory of an incident" in capsys.readouterr().err


def test_evidence_that_is_damaged_is_never_computed_with(incident, capsys):
    (file,) = (incident / "evidence").glob("*/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert main(["replay", str(incident)]) == 4
    assert "damaged" in capsys.readouterr().err


def test_an_incident_of_a_script_says_how_to_go_on(incident, capsys):
    path = incident / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "description": {}}))
    assert main(["replay", str(incident)]) == 4
    assert "StepReplayer" in capsys.readouterr().err


BAD_REPORTS = {
    "description of null": lambda report: report.update(description=None),
    "description of a list": lambda report: report.update(description=[]),
    "config of a wrong type": lambda report: report["description"].update(config="x"),
    "config of wrong values": lambda report: report["description"].update(config={"model": 3}),
    "unknown key": lambda report: report["description"]["config"].update(zzz=1),
    "huge model": lambda report: report["description"]["config"]["model"].update(d_model=10**9),
    "odd heads": lambda report: report["description"]["config"]["model"].update(num_heads=7),
    "precision of half": lambda report: report["description"]["config"]["training"].update(
        precision="fp16"
    ),
    "precision elsewhere": lambda report: report["description"]["config"].update(precision="fp16"),
    "first_bad of null": lambda report: report.update(first_bad=None),
    "a place that is a text": lambda report: report["first_bad"].update(backward="x"),
    "a place without a module": lambda report: report["first_bad"].update(backward={"a": 1}),
    "a place that is missing": lambda report: report["first_bad"].pop("forward"),
    "verdict of a list": lambda report: report.update(verdict=["x"]),
    "verdict of a table": lambda report: report.update(verdict={}),
    "unknown verdict": lambda report: report.update(verdict="\x1b[31mred"),
    "step of a text": lambda report: report.update(step="\x1b[31mred"),
    "step of a truth value": lambda report: report.update(step=True),
}


@pytest.mark.parametrize("change", BAD_REPORTS.values(), ids=BAD_REPORTS)
def test_a_report_that_was_changed_is_refused_and_steers_no_terminal(incident, capsys, change):
    path = incident / "report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    assert main(["replay", str(incident)]) == 4
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert str(incident) in said.err


def test_a_report_nested_without_end_is_refused(incident, capsys):
    (incident / "report.json").write_text("[" * 200_000)
    assert main(["replay", str(incident)]) == 4
    assert "not the directory of an incident" in capsys.readouterr().err


def test_a_recorded_module_steers_no_terminal(incident, capsys):
    path = incident / "report.json"
    report = json.loads(path.read_text())
    report["first_bad"]["forward"]["module"] = "\x1b[31mred"
    path.write_text(json.dumps(report))
    assert main(["replay", str(incident)]) == 20
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err


@pytest.mark.parametrize("part", ["weight", "moment"])
def test_a_damaged_state_is_reproduced(tmp_path, capsys, part):
    text, config = tmp_path / "text.txt", tmp_path / "run.yaml"
    text.write_text(TEXT, encoding="utf-8")
    options = "tie_embeddings: false"
    config.write_text(CONFIG.format(text=text, model=options, seed=3), encoding="utf-8")
    loaded = load_config(config)
    run = assemble(
        loaded, run_directory.choose(loaded, "never", tmp_path / "run"), open_machine(loaded)
    )
    trainer, left = run.trainer, [12]

    def spoil() -> None:
        if left == [trainer.state.iteration]:
            left.clear()
            weight = next(iter(trainer.model.parameters()))
            with torch.no_grad():
                if part == "weight":
                    weight[0, 0] = torch.inf
                else:
                    trainer.optimizer.state[weight]["exp_avg"][0, 0] = torch.inf

    trainer.add_event_handler(Events.ITERATION_COMPLETED, spoil)
    trainer.run()
    (incident,) = (tmp_path / "run" / "incidents").iterdir()
    assert incident.name == "00000012-state"
    assert main(["replay", str(incident)]) == 0
    said = capsys.readouterr().out
    assert ("model.token_embedding" if part == "weight" else "exp_avg") in said
    end = "Reproduced." if part == "weight" else "Finite, as recorded."
    assert said.rstrip().endswith(end)
