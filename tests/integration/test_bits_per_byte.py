"""`val/bits_per_byte` of a run: against the decoded targets, and against `evaluate`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fundamentallm.data.loaders import Batching, ValidationLoader
from fundamentallm.data.sources import read_source
from fundamentallm.data.tokenizer import CharacterTokenizer, Tokenizer
from fundamentallm.engine.cli import main
from fundamentallm.engine.wiring import bits_per_byte as module
from fundamentallm.engine.wiring.bits_per_byte import BitsPerByte
from fundamentallm.inference.evaluate import Document
from fundamentallm.inference.load import load_on_device
from fundamentallm.reports.comparison import run_figures
from fundamentallm.reports.curves import Curve
from fundamentallm.reports.run_data import RunData, read_run
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.trainer import Trainer

DATA = Path(__file__).resolve().parents[1] / "data"
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 8}
model: {d_model: 16, num_layers: 1, num_heads: 2}
training: {learning_rate: 1e-2, total_steps: 2, eval_steps: 1}
handlers: {samples: false, progress: false, tensorboard: false}
"""
SUBWORDS = "data.tokenizer={name: bpe, vocab_size: 300}"
WEIGHTED = "[{path: text.txt, weight: 3}, {path: other.txt, weight: 1}]"
MIXTURE = f"data={{sources: {WEIGHTED}, sequence_length: 16}}"
EXAMPLES = ["data.source=examples.jsonl", "data.sequence_length=64"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    excerpt = (DATA / "shakespeare_excerpt.txt").read_text()
    text = "".join(f"{line} \u00fc\u4f60\U0001f600\n" for line in excerpt.splitlines())
    Path("text.txt").write_text(text)
    Path("other.txt").write_text(text[::-1])
    lines = [{"prompt": f"{n}? ", "response": f"{n} \u00e4\u00e4 is it"} for n in range(20)]
    lines.append({"prompt": "", "response": "\u00fcber"})
    Path("examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("tiny.yaml").write_text(CONFIG)
    return tmp_path


def validations() -> list[dict[str, Any]]:
    lines = Path("runs/tiny/metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "val/loss" in line]


def bytes_of_targets(tokenizer: Tokenizer, path: str) -> tuple[int, int]:
    """Count the validation targets of one text, and the bytes of what they decode to."""
    parts = read_source(path).parts(tokenizer, (0.9, 0.1, 0.0))  # type: ignore[attr-defined]
    targets = parts["val"][1:]
    return len(targets), len(tokenizer.decode(targets).encode())


@pytest.mark.parametrize(
    ("overrides", "paths"),
    [
        ([], ["text.txt"]),
        pytest.param([SUBWORDS], ["text.txt"], marks=pytest.mark.long),
        pytest.param(["data.tokenizer=byte"], ["text.txt"], marks=pytest.mark.long),
        pytest.param([MIXTURE], ["text.txt", "other.txt"], marks=pytest.mark.long),
    ],
)
def test_it_is_the_nats_over_the_bytes_of_the_targets(overrides, paths, capsys):
    assert main(["run", "tiny.yaml", "data.split=[0.9, 0.1, 0.0]", *overrides]) == 0
    measured = validations()
    tokenizer = load_on_device(Path("runs/tiny"), "cpu")[0].tokenizer
    counts = np.array([bytes_of_targets(tokenizer, path) for path in paths]).sum(0)
    for line in measured:
        bits = line["val/loss"] * counts[0] / math.log(2)
        assert line["val/bits_per_byte"] == pytest.approx(bits / counts[1], rel=1e-9)
    capsys.readouterr()
    assert main(["evaluate", "runs/tiny", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    lowest = min(line["val/bits_per_byte"] for line in measured)
    assert told["bits_per_byte"] == pytest.approx(lowest, rel=1e-6)
    figure = run_figures(read_run(Path("runs/tiny")))["bits_per_byte"]
    assert figure == lowest


@pytest.mark.long
@pytest.mark.parametrize("kind", ["examples", "masked documents"])
def test_it_is_that_of_evaluate(kind, capsys):
    overrides = EXAMPLES
    if kind == "masked documents":
        Path("documents.jsonl").write_text(
            "".join(json.dumps({"text": f"{n} \u4f60\u00fc " * 9}) + "\n" for n in range(200))
        )
        given = ["documents.jsonl", "--out", "tokens", "--tokenizer", "bpe", "--vocab-size", "300"]
        assert main(["prepare", *given]) == 0
        overrides = ["data.source=tokens", "data.packing=document"]
    assert main(["run", "tiny.yaml", *overrides]) == 0
    last = validations()[-1]
    capsys.readouterr()
    assert main(["evaluate", "runs/tiny/checkpoints/step-00000002", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert last["val/bits_per_byte"] == pytest.approx(told["bits_per_byte"], rel=1e-6)


def trainer_with(documents: Sequence[Document], tokenizer: Tokenizer) -> Trainer:
    train_loader, val_loader = tiny_loaders()
    trainer = Trainer(tiny_model(), train_loader, val_loader)
    BitsPerByte(val_loader, documents, tokenizer).attach(trainer.evaluator)
    return trainer


LETTERS = CharacterTokenizer("abcdefghijk")
SKIPPING = CharacterTokenizer("abcdefghijk", "skip")


@pytest.mark.parametrize(
    ("tokenizer", "size", "num_bytes"),
    [(LETTERS, None, 79), (SKIPPING, None, None), (SKIPPING, (90, 100), 100)],
)
def test_it_is_measured_where_the_size_of_the_text_is_known(tokenizer, size, num_bytes):
    document = Document("text", tiny_loaders()[1].tokens, size=size)
    trainer = trainer_with([document], tokenizer)
    for _ in range(2):
        metrics = trainer.validate()
        bits = metrics["val/loss"] * 79 / math.log(2)
        expected = None if num_bytes is None else pytest.approx(bits / num_bytes, rel=1e-12)
        assert metrics.get("val/bits_per_byte") == expected


def test_a_pass_over_other_data_has_none():
    tokens = tiny_loaders()[1].tokens
    trainer = trainer_with([Document("text", tokens)], LETTERS)
    other = ValidationLoader(tokens[::-1].copy(), Batching(8, 4))
    assert trainer.validate().keys() == {"val/loss", "val/perplexity", "val/bits_per_byte"}
    assert trainer.evaluator.run(other).metrics.keys() == {"loss", "perplexity"}


def test_a_tokenizer_that_fails_costs_the_figure_and_not_the_run(caplog, monkeypatch):
    calls = []

    def fails(self, ids):
        calls.append(1)
        raise RuntimeError("no such id")

    trainer = trainer_with([Document("text", tiny_loaders()[1].tokens)], LETTERS)
    monkeypatch.setattr(CharacterTokenizer, "decode", fails)
    for _ in range(2):
        assert trainer.validate().keys() == {"val/loss", "val/perplexity"}
    assert len(calls) == 1
    assert caplog.text.count("val/bits_per_byte is left out: RuntimeError: no such id") == 1


def test_the_text_is_decoded_at_the_first_pass_alone(monkeypatch):
    trainer = trainer_with([Document("text", tiny_loaders()[1].tokens)], LETTERS)
    counted = []
    whole = module.predicted_size
    monkeypatch.setattr(module, "predicted_size", lambda *given: counted.append(1) or whole(*given))
    assert not counted
    assert trainer.validate() == trainer.validate()
    assert counted == [1]


def test_a_run_of_before_has_it_where_a_token_is_a_byte():
    curve = Curve([1, 2], [0, 0], [0.0, 0.0], [2.0, 1.0])
    old = RunData(Path("old"), "old", "finished", curves={"val/loss": curve}, bytes_per_token=1.0)
    assert run_figures(old)["bits_per_byte"] == pytest.approx(1 / math.log(2))
    assert run_figures(replace(old, bytes_per_token=None))["bits_per_byte"] is None
