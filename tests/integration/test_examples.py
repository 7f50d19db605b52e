"""The examples do what they say: scripts, plugins and notebooks are executed as a user would."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TINY = EXAMPLES / "data" / "tiny.txt"

# Each plugin with what selects its part in a run.
PLUGINS = {
    "own_handler": ["handlers.gradient_noise.every=5"],
    "own_logger": ["handlers.sqlite=true"],
    "own_optimizer": ["training.optimizer=adabelief", "training.learning_rate=2e-3"],
    "own_loss": [
        "training.loss={name: confidence_penalty, beta: 0.1}",
        "handlers.prediction_entropy=true",
    ],
    "own_schedule": ["training.scheduler={name: restarts, depth: 0.2}"],
    "own_block": ["model.feedforward=geglu"],
    "own_model": ["model={family: gru, hidden_size: 48}"],
    "own_tokenizer": ["data.tokenizer={name: words, max_words: 100}"],
}


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{EXAMPLES}{os.pathsep}{ROOT / 'src'}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_train_yaml(cwd: Path, *extra: str) -> Path:
    """Run configs/train.yaml on the tiny text and return the run's directory."""
    config = str(ROOT / "configs" / "train.yaml")
    result = python(
        "-m", "fundamentallm.engine", "run", config, f"data.source={TINY}", *extra, cwd=cwd
    )
    assert result.returncode == 0, result.stderr
    return cwd / "runs" / "train"


def final_val_loss(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["val/loss"] for line in lines if "val/loss" in line][-1]


def test_there_is_a_test_for_every_script():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}

    assert scripts == {"compose_handlers", "lstm", "plot_run", "transformers_model", *PLUGINS}


@pytest.mark.parametrize("name", ["lstm", *PLUGINS])
@pytest.mark.long
def test_a_script_runs_by_itself(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python itself does for a script
    result = forked.run([], tmp_path, program=str(EXAMPLES / f"{name}.py"))

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert list(tmp_path.iterdir()) == []  # nothing is left where the user stands


@pytest.mark.parametrize("name", [*PLUGINS])
@pytest.mark.long
def test_a_plugin_takes_part_in_a_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    plugin = ["--plugins", name]
    words = ["run", str(ROOT / "configs" / "train.yaml"), f"data.source={TINY}", *PLUGINS[name]]
    result = forked.run([*words, "training.total_steps=12", *plugin], tmp_path)
    assert result.returncode == 0, result.stderr

    run = tmp_path / "runs" / "train"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12
    if name == "own_handler":
        assert "train/gradient_noise" in lines[-2]
    if name == "own_loss":
        assert lines[-2]["train/entropy"] > 0
    if name == "own_logger":
        with closing(sqlite3.connect(run / "metrics.sqlite")) as database:
            rows = database.execute("SELECT step, value FROM metrics WHERE name = 'val/loss'")
            assert rows.fetchall() == [(x["step"], x["val/loss"]) for x in lines if "val/loss" in x]
    result = forked.run(["generate", str(run), *plugin, "--max-tokens", "5"], tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_handler_of_ones_own_takes_part_in_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    words = ["run", str(ROOT / "configs" / "train.yaml"), f"data.source={TINY}"]
    words += ["training.total_steps=10", "handlers.samples=false"]
    words += ["--plugins", "own_handler", "handlers.gradient_noise.every=5"]
    result = forked.run(words, tmp_path)
    assert result.returncode == 0, result.stderr

    metrics = tmp_path / "runs" / "train" / "metrics.jsonl"
    line = json.loads(metrics.read_text().splitlines()[0])
    assert line["step"] == 10
    assert line["train/gradient_noise"] > 0


@pytest.mark.long
def test_yaml_script_and_notebook_give_the_same_numbers(tmp_path):
    run = run_train_yaml(tmp_path)
    from_yaml = final_val_loss(run)

    out = tmp_path / "by_hand"
    result = python(
        str(EXAMPLES / "compose_handlers.py"), str(TINY), "--out", str(out), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    from_script = final_val_loss(out)

    (printed,) = re.findall(
        r"final validation loss (\d\.\d+)", output_of("train_plot_sample", tmp_path)
    )
    assert from_script == from_yaml
    assert printed == f"{from_yaml:.4f}"


@pytest.mark.long
def test_a_run_is_drawn_from_its_files(tmp_path):
    run = run_train_yaml(tmp_path, "training.total_steps=20", "training.eval_steps=10")
    picture = tmp_path / "run.svg"

    result = python(str(EXAMPLES / "plot_run.py"), str(run), "--out", str(picture), cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    drawn = picture.read_text(encoding="utf-8")
    assert "<!-- optimizer step -->" in drawn
    assert "<!-- step 20 -->" in drawn  # a sample's title


@pytest.mark.long
def test_a_model_of_transformers_is_resumed_bit_for_bit(tmp_path):
    pytest.importorskip("transformers", reason="the extra 'huggingface' is not installed")

    result = python(str(EXAMPLES / "transformers_model.py"), cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    assert "weights equal, bit for bit: True" in result.stdout
    first, last = map(float, re.findall(r"\d\.\d{3}", result.stdout))
    assert last < first
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_notebook_on_events_heals_its_run(tmp_path):
    text = output_of("events_and_handlers", tmp_path)

    assert "went back 1 time; windows passed over: [6]" in text
    assert "weights equal, bit for bit: True" in text


@pytest.mark.long
def test_the_notebook_on_other_trainers_has_one_curve(tmp_path):
    text = output_of("from_other_trainers", tmp_path)

    assert "largest difference of a loss below 1e-4: True" in text


@pytest.mark.long
def test_the_notebook_on_healing_ends_where_a_clean_run_ends(tmp_path):
    # Another text, that needs no network, and fewer steps.
    text = output_of(
        "healing",
        tmp_path,
        {'SOURCE = "tinyshakespeare"': 'SOURCE = "python-docs"', "STEPS = 1500": "STEPS = 300"},
    )

    assert "divergence; going back to step 0" in text
    assert "ratio" in text


@pytest.mark.parametrize(
    "path", sorted((EXAMPLES / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_a_notebook_is_kept_with_its_output_and_without_traces_of_a_machine(path):
    text = path.read_text()
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]

    assert len(text) < 300_000
    assert "image/png" in text
    assert all(cell["execution_count"] for cell in code)
    assert not re.search(r"/(tmp|home|root|Users|work)/", text)


def output_of(name: str, tmp_path: Path, changes: Mapping[str, str] | None = None) -> str:
    """Execute a fresh copy of a notebook, with some text changed; return what it printed."""
    nbformat = pytest.importorskip("nbformat", reason="the extra 'notebooks' is not installed")
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "notebooks" / f"{name}.ipynb", as_version=4)
    for old, new in (changes or {}).items():
        assert any(old in cell.source for cell in notebook.cells)
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    folder = tmp_path / "examples" / "notebooks"
    folder.mkdir(parents=True)
    (tmp_path / "examples" / "data").symlink_to(EXAMPLES / "data")
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    )
