"""`new` writes a configuration that is valid and fits the machine, the budget and the text."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from tests import forked

from fundamentallm.compute.plan import Machine
from fundamentallm.compute.processor import Rates
from fundamentallm.config import load_config
from fundamentallm.config.yaml.file import MODELINE, PACKAGED
from fundamentallm.config.yaml.source import read_yaml
from fundamentallm.data.tokenizer import build_tokenizer
from fundamentallm.data.tokenizer.gguf_vocabulary import gguf_vocabulary
from fundamentallm.engine import new as module
from fundamentallm.engine.budget import seconds_of
from fundamentallm.engine.cli import main
from fundamentallm.engine.new import Text, configuration
from fundamentallm.engine.new import _machine as the_machine
from fundamentallm.engine.tuning import sizing
from fundamentallm.errors import ConfigError

TINY = Path(__file__).resolve().parents[2] / "examples" / "data" / "tiny.txt"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_machine", lambda: ("cpu", 1e11))
    shutil.copy(TINY, "tiny.txt")


def test_the_file_is_valid_and_the_next_commands_are_said(capsys):
    assert main(["new", "mine.yaml", "--data", "tiny.txt", "--budget", "2m"]) == 0

    config = load_config("mine.yaml")
    assert (config.name, config.data.source) == ("mine", "tiny.txt")
    assert config.training.max_seconds == 120
    out = capsys.readouterr().out
    assert re.search(r"^  .*fundamentallm check mine.yaml$", out, re.MULTILINE)
    assert re.search(r"^  .*fundamentallm run mine.yaml$", out, re.MULTILINE)


def test_file_and_schema_can_be_moved_together(capsys, tmp_path):
    assert main(["new", "mine.yaml", "--data", "tiny.txt", "--budget", "2m"]) == 0
    assert "schema.json: written too" in capsys.readouterr().err
    there = tmp_path / "there"
    there.mkdir()
    for name in ("mine.yaml", "schema.json"):
        shutil.move(name, there)
    text = (there / "mine.yaml").read_text()
    schema = there / text.splitlines()[0].removeprefix(MODELINE)
    assert schema == there / "schema.json"
    jsonschema.validate(read_yaml(there / "mine.yaml").data, json.loads(schema.read_text()))
    assert str(PACKAGED) not in text

    assert main(["new", str(there / "other.yaml"), "--data", "tiny.txt", "--budget", "2m"]) == 0
    assert "schema.json" not in capsys.readouterr().err


@pytest.mark.long
def test_the_file_runs():
    main(["new", "mine.yaml", "--data", "tiny.txt", "--budget", "2m"])
    # In a process of its own: the budget counts from the start of the process.
    result = forked.run(["run", "mine.yaml", "training.total_steps=2"], Path.cwd())
    assert result.returncode == 0, result.stderr
    assert "Done: 2 steps" in result.stdout


def test_it_asks_on_a_terminal(monkeypatch):
    answers = iter(["tiny.txt", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))

    assert main(["new", "mine.yaml"]) == 0

    config = load_config("mine.yaml")
    assert config.data.source == "tiny.txt"
    assert config.training.max_seconds == 600


def test_without_a_terminal_it_takes_the_defaults():
    assert main(["new", "mine.yaml"]) == 0
    assert load_config("mine.yaml").data.source == "python-docs"


def test_a_file_is_never_overwritten(capsys):
    Path("mine.yaml").write_text("name: precious")

    assert main(["new", "mine.yaml", "--data", "tiny.txt"]) == 2

    assert Path("mine.yaml").read_text() == "name: precious"
    assert "the file exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["mine.txt"], 2),
        (["mine.yaml", "--data", "missing.txt"], 3),
        (["mine.yaml", "--data", "tiny.txt", "--budget", "soon"], 2),
        (["no/mine.yaml", "--data", "tiny.txt"], 5),
    ],
    ids=lambda value: str(value),
)
def test_a_fault_leaves_no_file(words, code):
    assert main(["new", *words]) == code
    assert not Path(words[0]).exists()


def test_budgets():
    for text, seconds in {"90s": 90, "10m": 600, "2h": 7200, "1h30m": 5400}.items():
        assert seconds_of(text) == seconds
    for text in ("", "0", "0m", "-1h", "1.5h", "10 m", "h", "45"):
        with pytest.raises(ConfigError):
            seconds_of(text)


def test_a_number_without_a_unit_is_asked_back(capsys):
    assert main(["new", "mine.yaml", "--data", "tiny.txt", "--budget", "3"]) == 2
    said = capsys.readouterr().err
    assert "3 what?" in said
    assert "write 3m, 3h or 3s" in said


def test_several_files_are_a_list_in_their_order():
    for name in ("b.txt", "a, c.txt"):
        shutil.copy(TINY, name)
    words = ["--data", "b.txt", "a, c.txt", "tiny.txt"]
    assert main(["new", "one.yaml", *words, "--budget", "2m"]) == 0
    assert main(["new", "--budget", "2m", *words, "two.yaml"]) == 0
    for file in ("one.yaml", "two.yaml"):
        assert load_config(file).data.source == ["b.txt", "a, c.txt", "tiny.txt"]


def test_a_folder_of_other_text_files_is_listed(capsys):
    Path("code").mkdir()
    for name in ("b.py", "a.py", "Makefile", "x.cfg"):
        (Path("code") / name).write_text(f"# {name}\n" * 500)
    assert main(["new", "mine.yaml", "--data", "code", "--budget", "2m"]) == 0
    assert load_config("mine.yaml").data.source == ["code/a.py", "code/b.py"]
    assert "taking its 2 files that end in .py" in capsys.readouterr().err


def test_a_folder_without_text_is_refused_in_the_words_of_the_command(capsys):
    Path("empty").mkdir()
    assert main(["new", "mine.yaml", "--data", "empty", "--budget", "2m"]) == 3
    said = capsys.readouterr().err
    assert "no text in this folder" in said
    assert "data.source" not in said


def test_characters_beyond_ascii_get_a_vocabulary_that_every_export_takes():
    Path("umlauts.txt").write_text("Es gr\u00fc\u00dft die \u00dcbung. " * 500, encoding="utf-8")
    for name, end in (("umlauts", True), ("tiny", False)):
        words = ["--data", f"{name}.txt", "--budget", "2m"]
        assert main(["new", f"{name}.yaml", *words]) == 0
        chosen = load_config(f"{name}.yaml").data.tokenizer
        assert chosen.name == "character"
        text = Path(f"{name}.txt").read_text(encoding="utf-8")
        tokenizer = build_tokenizer(chosen.name, chosen.options, text)
        assert (tokenizer.end_id is not None) is end
        assert gguf_vocabulary(tokenizer, tokenizer.vocab_size).tokens


@pytest.mark.parametrize("words", [["mine.yaml"], ["no.txt"], ["x.yaml", "--budget", "3"], []])
def test_what_needs_no_large_library_is_refused_without_one(words):
    Path("mine.yaml").write_text("name: precious")
    code = f"""
import sys
from fundamentallm.engine.cli import main
assert main(["new", *{words!r}]) == 2
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_budget_that_the_start_and_a_validation_use_up_is_warned_of(capsys):
    for budget, warned in (("15s", True), ("10m", False)):
        assert main(["new", f"{budget}.yaml", "--data", "tiny.txt", "--budget", budget]) == 0
        assert ("is short for this text" in capsys.readouterr().err) is warned


def test_validations_take_a_tenth_of_the_time_at_most():
    for seconds, validations in ((90, 5.0), (300, 10.0), (6000, 10.0)):
        text = Text(2 * 10**6, "character")
        Path("mine.yaml").write_text(configuration("m", "x.txt", seconds, text, "cpu", 1e11))
        config = load_config("mine.yaml")
        model, data, training = config.model, config.data, config.training
        parameters = 12 * model.num_layers * model.d_model**2
        step = 6 * parameters * data.batch_size * data.sequence_length
        found = seconds * 1e11 / step / training.eval_steps
        assert found == pytest.approx(validations, rel=0.15)  # eval_steps is a round number
        assert 2 * parameters * 2e5 * found <= 1.1 * 0.1 * seconds * 1e11


@pytest.mark.parametrize("length", [200, 2_000, 50_000])
def test_validation_holds_a_sequence(length):
    text = configuration("mine", "tiny.txt", 600, Text(length, "character"), "cpu", 1e11)
    Path("mine.yaml").write_text(text)
    chosen = load_config("mine.yaml").data.sequence_length
    assert math.log2(chosen).is_integer()
    assert chosen <= max(length / 20, 16)


@pytest.mark.parametrize("name", ["my file", ".hidden", "a: b #c", "1e-4", "yes"])
def test_any_file_name_and_data_give_a_valid_configuration(name):
    content = configuration(name, f"{name}.txt", 60, Text(10**6, "byte"), "cuda", 1e14)
    Path("any.yaml").write_text(content)

    assert load_config("any.yaml").data.source == f"{name}.txt"


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_the_speed_of_a_gpu_is_that_of_the_type_it_trains_in(has_bf16, dtype, monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(sizing, "has_bf16", lambda device: has_bf16)
    monkeypatch.setattr(sizing, "device_peak", lambda device, asked: {dtype: 1e14}[asked])
    assert the_machine() == ("cuda", 2.5e13)


def test_the_size_is_the_one_that_size_auto_takes(monkeypatch):
    monkeypatch.setattr(module, "_machine", the_machine)
    rates = Rates(float32=1e11, bfloat16=7e11)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.setattr(sizing, "cpu_rates", lambda: rates)
    text = "".join(chr(97 + number * number % 26) for number in range(10**6))
    Path("long.txt").write_text(text)
    assert main(["new", "mine.yaml", "--data", "long.txt", "--budget", "5m"]) == 0
    written = load_config("mine.yaml")
    resolved, _ = sizing.sized(
        load_config("mine.yaml", ["model={size: auto}"]), len(text), Machine.open("cpu")
    )
    for name in ("d_model", "num_layers", "num_heads"):
        assert getattr(written.model, name) == getattr(resolved, name)
