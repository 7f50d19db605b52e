"""Ctrl-C and SIGTERM end each command with one line and its exit code; nothing half-made stays."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path

import pytest
from tests.runs import SMALLEST, trained

from fundamentallm.engine.cli import main
from fundamentallm.engine.sweeping.sweep import Sweep

INT, TERM = signal.SIGINT, signal.SIGTERM
EXPORT = "export runs/tiny --out out --format"
COMPARE = "compare runs/tiny runs/tiny --out page.html"
PHASES = [
    (INT, "report runs/tiny", "reports.run_data.read_run"),
    (INT, "report runs/tiny", "reports.page.page"),
    (INT, "report runs/tiny --out page.html", "files.filesystem.write_file"),
    (TERM, "report runs/tiny --out page.html", "files.filesystem.write_file"),
    (INT, COMPARE, "reports.comparison.compare"),
    (INT, COMPARE, "files.filesystem.write_file"),
    (TERM, COMPARE, "files.filesystem.write_file"),
    (INT, f"{EXPORT} hf", "inference.load.load_trained"),
    (INT, f"{EXPORT} hf", "inference.export.write_file"),
    (TERM, f"{EXPORT} hf", "inference.export.write_file"),
    (TERM, f"{EXPORT} torch", "files.filesystem.write_file"),
    (INT, "plan tiny.yaml --minutes 1", "engine.planning.plan.ground_of"),
    (TERM, "plan tiny.yaml --minutes 1", "engine.planning.plan.ground_of"),
    (INT, "sweep sweep.yaml", "engine.sweeping.sweep.check_trials"),
    (INT, "evaluate runs/tiny", "engine.evaluate.load_on_device"),
    (INT, "verify runs/tiny", "inference.verify.examine"),
    (INT, "generate runs/tiny --prompt a", "inference.generate.stream_texts"),
    (INT, "check tiny.yaml", "engine.check.assemble"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    (folder / "text.txt").write_text("abcdefgh" * 40)
    (folder / "sweep.yaml").write_text(
        "config: tiny.yaml\nsteps: 2\nkeys: {model.num_layers: [1, 2]}\n"
    )
    return trained(folder, SMALLEST)


@pytest.mark.parametrize(("number", "words", "place"), PHASES, ids=str)
def test_one_line_and_nothing_is_left(number, words, place, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    module, _, name = f"fundamentallm.{place}".rpartition(".")
    code = importlib.import_module(module)
    real = getattr(code, name)

    def stopped(*arguments, **options):
        signal.raise_signal(number)
        return real(*arguments, **options)

    monkeypatch.setattr(code, name, stopped)
    before = sorted(Path().rglob("*"))

    assert main(words.split()) == 128 + number

    said = capsys.readouterr().err.splitlines()
    by = "Ctrl-C" if number == INT else "signal 15"
    assert said[-1].startswith(f"stopped by {by}")
    assert not any(word in line for line in said for word in ("error", "Traceback"))
    assert sorted(Path().rglob("*")) == before


def test_the_comparison_of_a_sweep_can_be_stopped(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Sweep, "train_all", lambda sweep: True)
    monkeypatch.setattr(Sweep, "conclude", lambda sweep: signal.raise_signal(INT))
    assert main(["sweep", "sweep.yaml"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by Ctrl-C"
