"""`model.init_from` names a run: its weights, its sizes and its tokenizer begin another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fundamentallm.engine.cli import main
from fundamentallm.training.checkpoint.store import CheckpointStore

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: base
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2, positions: learned}
training: {learning_rate: 1e-2, total_steps: 4, eval_steps: 2}
handlers: {tensorboard: false, samples: false, progress: false, weight_ema: {decay: 0.5}}
"""
NEXT = """\
name: next
data: {source: other.txt, batch_size: 2}
model: {init_from: base}
training: {total_steps: 2, eval_steps: 2}
handlers: {tensorboard: false, samples: false, progress: false}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    shutil.copy(TEXT, folder / "text.txt")
    text = TEXT.read_text()
    (folder / "other.txt").write_text(text[::-1])  # of the same characters
    (folder / "base.yaml").write_text(CONFIG)
    (folder / "next.yaml").write_text(NEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "base.yaml"]) == 0
    return folder


@pytest.fixture(autouse=True)
def place(finished, tmp_path, monkeypatch) -> None:
    shutil.copytree(finished, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "300")


def state(run: str, checkpoint: str) -> dict:
    store = CheckpointStore(Path(run) / "checkpoints")
    return store.read(store.directory / checkpoint)


def averages(checkpoint: str) -> dict:
    found = state("runs/base", checkpoint)
    averaged = found["handlers"]["weight_ema"]["averages"]
    # The head is tied to the embedding: one matrix with two names.
    return {**found["model"], **averaged, "head.weight": averaged["token_embedding.weight"]}


@pytest.mark.parametrize(
    ("named", "checkpoint"),
    [
        ("base", "best"),
        ("runs/base", "best"),
        ("runs/base/checkpoints/last", "last"),
        ("runs/base/checkpoints/step-00000002", "step-00000002"),
    ],
)
def test_it_begins_with_the_averaged_weights_and_goes_on_without_them(named, checkpoint, capsys):
    pointer = Path("runs/base/checkpoints", checkpoint)
    name = pointer.read_text().strip() if pointer.is_file() else checkpoint
    expected = averages(name)

    assert main(["run", "next.yaml", f"model.init_from={named}"]) == 0

    said = capsys.readouterr().err
    assert f"the weights are initialized from runs/base/checkpoints/{name} (step " in said
    assert ("the best)" in said) == (name == Path("runs/base/checkpoints/best").read_text().strip())
    begun = state("runs/next", "step-00000000")["model"]
    assert begun.keys() == expected.keys()
    for key, weight in begun.items():
        assert torch.equal(weight, expected[key]), key
    shutil.rmtree("runs/base")
    again = ["training.total_steps=3", f"model.init_from={named}"]
    assert main(["run", "next.yaml", *again]) == 0
    assert (Path("runs/next/checkpoints/last")).read_text().strip() == "step-00000003"


def test_a_shorter_context_takes_the_first_rows_of_the_table():
    assert main(["run", "next.yaml", "data.sequence_length=8"]) == 0

    name = Path("runs/base/checkpoints/best").read_text().strip()
    table = state("runs/next", "step-00000000")["model"]["positions.table.weight"]
    assert torch.equal(table, averages(name)["positions.table.weight"][:8])


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["model.d_model=32"], 2, ("model.d_model", "differs from the model to start from", "16")),
        (["model.positions=rotary"], 2, ("model.positions", "learned")),
        (["data.sequence_length=32"], 2, ("sequence_length", "at most 16")),
        (["data.tokenizer=byte"], 2, ("data.tokenizer", "character, 46 tokens", "remove data.t")),
        (["model.vocab_size=50"], 2, ("model.vocab_size", "46")),
        (["model.init_from=nowhere"], 4, ("there is no such folder to start from", "or a run")),
        (["model.init_from=runs"], 4, ("config.json",)),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(words, code, says, capsys):
    assert main(["run", "next.yaml", *words]) == code

    error = capsys.readouterr().err
    assert all(word in error for word in says), error
    assert not Path("runs/next").exists()


def test_a_text_with_other_characters_is_refused(capsys):
    Path("other.txt").write_text("\u03b1\u03b2\u03b3 " * 200)

    assert main(["run", "next.yaml"]) == 3

    assert "not in the vocabulary" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(capsys):
    weights = Path("runs/base/checkpoints/step-00000002/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")

    named = f"model.init_from={weights.parent}"
    assert main(["run", "next.yaml", named]) == 4

    assert "step-00000002" in capsys.readouterr().err
