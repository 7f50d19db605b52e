"""Every command on a model of another kind, and on an adapted one, with plugins alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fundamentallm.compute.plan import Plan
from fundamentallm.config import RunConfig, TransformerConfig, load_config
from fundamentallm.engine.cli import main
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.engine.tuning.measuring import measure_in_process
from fundamentallm.engine.tuning.tune import space_around
from fundamentallm.engine.wiring.assemble import check_names
from fundamentallm.models.build import build_model

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "tests" / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: MODEL
training: {learning_rate: 1e-2, total_steps: 12, eval_steps: 4, log_steps: 2}
handlers: {tensorboard: false, samples: false, progress: false, trouble: true}
plugins: [own_model, trouble_and_low_rank]
"""
PLUGIN = '''\
"""Low-rank matrices beside linear layers (Hu et al. 2022, section 4.1), and trouble on demand."""

import os
import signal

import torch
from ignite.engine import Events
from torch import nn

from fundamentallm.models.families import ADAPTERS
from fundamentallm.training.handlers import HANDLERS


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@ADAPTERS.register("low_rank")
def low_rank(model: nn.Module, rank: int = 2) -> nn.Module:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and name != "head":
                setattr(module, name, LowRank(child, rank))
    return model


@HANDLERS.register("trouble")
class Trouble:
    def attach(self, trainer) -> None:
        trainer.add_event_handler(Events.ITERATION_STARTED, self.overflow)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.interrupt)

    def overflow(self, trainer) -> None:
        if trainer.state.iteration == int(os.environ.get("OVERFLOW_AT", 0)):
            with torch.no_grad():
                trainer.model.head.weight.fill_(3e38)

    def interrupt(self, trainer) -> None:
        if trainer.state.iteration == int(os.environ.get("INTERRUPT_AT", 0)):
            signal.raise_signal(signal.SIGINT)
'''
MODELS = {
    "gru": "{family: gru, hidden_size: 24, dropout: 0.1}",
    "low_rank": "{d_model: 16, num_layers: 1, num_heads: 2, adapter: {name: low_rank, rank: 3}}",
    "gru_low_rank": "{family: gru_with_output, hidden_size: 16, adapter: low_rank}",
}
WITH_OUTPUT = """

import own_model
from fundamentallm.models.families import MODELS


@MODELS.register("gru_with_output")
class WithOutput(own_model.GRULanguageModel):
    def __init__(self, vocab_size: int, hidden_size: int = 128) -> None:
        super().__init__(vocab_size, hidden_size=hidden_size)
        self.norm = nn.Sequential(self.norm, nn.Linear(hidden_size, hidden_size))
"""
OF_TIME = ("elapsed_seconds", "train/tokens_per_second", "train/samples_per_second")
BY_NAME = ["--plugins", "own_model", "trouble_and_low_rank"]


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with both plugins, on the path of this process and of those that it starts."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "trouble_and_low_rank.py").write_text(PLUGIN + WITH_OUTPUT)
    shutil.copy(ROOT / "examples" / "own_model.py", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


# The family with its adapter by default; each of the two by itself in the long run.
TWO_IN_ONE = [
    pytest.param(name, marks=[] if name == "gru_low_rank" else pytest.mark.long) for name in MODELS
]


@pytest.fixture(scope="module", params=TWO_IN_ONE)
def finished(request, plugins, tmp_path_factory) -> Path:
    """A directory with a finished run; tests take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(TEXT, folder / "text.txt")
    (folder / "tiny.yaml").write_text(CONFIG.replace("MODEL", MODELS[request.param]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "tiny.yaml"]) == 0
    return folder


@pytest.fixture
def done(finished, tmp_path, monkeypatch) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr("fundamentallm.engine.check._SECONDS", 0.1)  # of steps that it times
    monkeypatch.setenv("COLUMNS", "200")
    return Path("runs/tiny")


def weights(run: str | Path) -> bytes:
    return (Path(run) / "checkpoints" / "step-00000012" / "model.safetensors").read_bytes()


def stored_config(run: Path) -> RunConfig:
    manifest = run / "checkpoints" / "step-00000012" / "MANIFEST.json"
    return RunConfig.model_validate(json.loads(manifest.read_text())["metadata"]["config"])


def timeless(run: str | Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in OF_TIME} for line in lines]


def test_an_interrupted_run_is_bitwise_the_one_that_was_not(done, monkeypatch, capsys):
    monkeypatch.setenv("INTERRUPT_AT", "7")
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 130
    monkeypatch.delenv("INTERRUPT_AT")
    assert main(["run", "tiny.yaml", "--run-dir", "cut"]) == 0
    assert "continuing cut from step 7" in capsys.readouterr().err
    assert weights("cut") == weights(done)
    assert timeless("cut") == timeless(done)


def test_every_command_knows_the_model(done, capsys):
    losses = [line["val/loss"] for line in timeless(done) if "val/loss" in line]
    capsys.readouterr()
    assert main(["evaluate", str(done), "--json", *BY_NAME]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(min(losses), abs=1e-6)

    words = ["--prompt", "the ", "--max-tokens", "40", "--seed", "3", *BY_NAME]
    texts = []
    for _ in range(2):
        assert main(["generate", str(done), *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 40

    assert main(["verify", str(done), *BY_NAME]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert all("whole" in row for row in table[1:])

    assert main(["check", "tiny.yaml"]) == 0
    num_parameters = sum(p.numel() for p in build_model(stored_config(done).model).parameters())
    assert f"parameters       {num_parameters:,} " in capsys.readouterr().out


def test_the_transformers_library_is_refused_by_name(done, capsys):
    assert main(["export", str(done), "--format", "hf", "--out", "out", *BY_NAME]) == 2
    error = capsys.readouterr().err
    assert "model.family" in error or "model.adapter low_rank" in error
    assert not Path("out").exists()

    assert main(["export", str(done), "--format", "torch", "--out", "out.pt", *BY_NAME]) == 0
    written = torch.load("out.pt", weights_only=True)
    assert RunConfig.model_validate(written["config"]).model == stored_config(done).model


def test_a_numerical_incident_is_replayed(done, monkeypatch, capsys):
    monkeypatch.setenv("OVERFLOW_AT", "6")
    main(["run", "tiny.yaml", "--run-dir", "ill"])
    monkeypatch.delenv("OVERFLOW_AT")
    capsys.readouterr()
    incident = sorted(Path("ill/incidents").iterdir())[0]
    assert main(["replay", str(incident), *BY_NAME]) == 0
    assert "Reproduced." in capsys.readouterr().out


def test_a_kernel_of_attention_is_not_chosen_for_a_model_without(plugins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG.replace("MODEL", MODELS["gru"]))
    config = load_config("tiny.yaml")
    load_plugins(config.plugins, "here")
    check_names(config)
    plain = config.model_copy(update={"model": TransformerConfig()})
    for described, kernels in ((config, {"explicit"}), (plain, {"explicit", "flash"})):
        plan = Plan("fp32", False, False, "explicit", batch_size=4)
        assert {
            kind["attention"] for kind in space_around(described, plan, 1, ["compile"]).kinds
        } == kernels


def test_a_setting_of_attention_without_effect_is_told(plugins, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fundamentallm.engine.check._SECONDS", 0.1)  # of steps that it times
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG.replace("MODEL", MODELS["gru"]))
    assert main(["check", "tiny.yaml", "training.attention=flash"]) == 0
    assert "training.attention has no effect: gru has no attention" in capsys.readouterr().out
    assert main(["check", "tiny.yaml"]) == 0
    assert "no effect" not in capsys.readouterr().out


@pytest.mark.long  # a start of Python
def test_a_process_of_its_own_measures_it(finished, plugins, monkeypatch):
    monkeypatch.chdir(finished)
    path = f"{plugins}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path)
    ids, targets = torch.zeros(2, 4, 16, dtype=torch.int64)
    rows = {"input_ids": ids.clone(), "target_ids": targets.clone()}
    config = stored_config(Path("runs/tiny"))
    plan = Plan("fp32", False, False, "flash", batch_size=4)
    result = measure_in_process(config, plan, rows, [], 0.05, 120.0)
    assert result.fault == ""
    assert 0 < result.step_seconds < 5


def test_only_the_added_matrices_are_trained(plugins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG.replace("MODEL", MODELS["low_rank"]))
    assert main(["run", "tiny.yaml"]) == 0
    first, last = (
        load_file(f"runs/tiny/checkpoints/step-{step:08d}/model.safetensors") for step in (4, 12)
    )
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {name for name in first if ".up." in name or ".down." in name}
    assert changed


def test_an_adapter_changes_a_model_that_starts_from_a_folder(plugins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(TEXT, "text.txt")
    Path("plain.yaml").write_text(
        CONFIG.replace("MODEL", "{d_model: 16, num_layers: 1, num_heads: 2}")
    )
    assert main(["run", "plain.yaml", "--run-dir", "plain"]) == 0
    assert main(["export", "plain/checkpoints/last", "--format", "hf", "--out", "folder"]) == 0
    theirs = load_file("plain/checkpoints/step-00000012/model.safetensors")
    Path("tuned.yaml").write_text(
        CONFIG.replace("MODEL", "{init_from: folder, adapter: {name: low_rank, rank: 3}}")
    )

    monkeypatch.setenv("INTERRUPT_AT", "7")
    assert main(["run", "tuned.yaml", "--run-dir", "cut"]) == 130
    monkeypatch.delenv("INTERRUPT_AT")
    assert main(["run", "tuned.yaml", "--run-dir", "whole"]) == 0
    shutil.rmtree("folder")
    assert main(["run", "tuned.yaml", "--run-dir", "cut"]) == 0
    assert weights("cut") == weights("whole")

    tuned = load_file("whole/checkpoints/step-00000012/model.safetensors")
    kept = {name: tensor for name, tensor in tuned.items() if ".up." not in name}
    kept = {name: tensor for name, tensor in kept.items() if ".down." not in name}
    assert {name.replace(".base.", ".") for name in kept} == set(theirs)
    for name, tensor in kept.items():
        assert torch.equal(tensor, theirs[name.replace(".base.", ".")]), name
    assert any(tensor.any() for name, tensor in tuned.items() if ".up." in name)
