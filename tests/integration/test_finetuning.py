"""A run on prompts and responses, from its file to its measured loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fundamentallm.engine.cli import main
from fundamentallm.inference.load import load_trained
from fundamentallm.training.checkpoint.store import CheckpointStore

CONFIG: dict[str, Any] = {
    "name": "tuned",
    "data": {"source": "pairs.jsonl", "sequence_length": 12, "batch_size": 4},
    "model": {"d_model": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
    "training": {"learning_rate": 1e-2, "total_steps": 12, "eval_steps": 4, "keep_last": 9},
    "handlers": {"tensorboard": False, "samples": False, "progress": False},
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fundamentallm.engine.check._SECONDS", 0.1)  # of steps that it times
    # The response repeats the prompt's letter as often as it says.
    lines = [
        {"prompt": f"{letter}{count}:", "response": letter * count + "\n"}
        for letter in "abcdefgh"
        for count in range(1, 6)
    ]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Path("tuned.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def model_of(run: str) -> dict[str, torch.Tensor]:
    store = CheckpointStore(Path(run, "checkpoints"))
    state: dict[str, torch.Tensor] = store.read(store.directory / "step-00000012")["model"]
    return state


def test_a_run_is_measured_by_its_responses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tuned.yaml"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "runs/tuned", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    # The last tenth: h2 to h5.
    assert result["num_tokens"] == result["num_bytes"] == 3 + 4 + 5 + 6
    recorded = load_trained(Path("runs/tuned"), torch.device("cpu")).val_loss
    assert result["loss"] == pytest.approx(recorded, rel=1e-6)
    assert main(["evaluate", "runs/tuned", "--json", "--data", "pairs.jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 8 * (2 + 3 + 4 + 5 + 6)
    assert main(["evaluate", "runs/tuned", "--json", "--documents"]) == 0
    documents = json.loads(capsys.readouterr().out)["documents"]
    found = [(one["name"], one["num_tokens"]) for one in documents]
    assert found == [(f"pairs.jsonl:{line}", line - 34) for line in (37, 38, 39, 40)]
    assert main(["evaluate", "runs/tuned", "--document-separator", ";"]) == 2
    assert "--document-separator splits text into documents" in capsys.readouterr().err
    steps = [json.loads(line) for line in Path("runs/tuned/metrics.jsonl").read_text().splitlines()]
    trained = 8 * 20 - 18  # of each epoch of 9 steps; then three more steps
    assert trained < steps[-1]["tokens"] < 2 * trained


def test_it_stops_and_goes_on_bit_for_bit() -> None:
    assert main(["run", "tuned.yaml"]) == 0
    whole = model_of("runs/tuned")
    for step in (12, 8):
        shutil.rmtree(f"runs/tuned/checkpoints/step-{step:08}")
    assert main(["run", "tuned.yaml"]) == 0
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model_of("runs/tuned").items())


def test_fine_tuning_an_exported_model() -> None:
    assert main(["run", "tuned.yaml"]) == 0
    assert main(["export", "runs/tuned", "--format", "hf", "--out", "base"]) == 0
    values = {**CONFIG, "name": "next", "model": {"init_from": "base"}}
    Path("next.yaml").write_text(yaml.safe_dump(values))
    assert main(["check", "next.yaml"]) == 0
    assert main(["run", "next.yaml"]) == 0
    before, after = (
        load_trained(Path(run), torch.device("cpu")).val_loss for run in ("runs/tuned", "runs/next")
    )
    assert after < before


def test_it_learns_to_stop_and_generate_stops_there(capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"a:": "yes", "b:": "no"}
    lines = [json.dumps({"prompt": p, "response": r}) for p, r in answers.items()]
    Path("pairs.jsonl").write_text("\n".join(lines * 8))
    values = json.loads(json.dumps(CONFIG))
    values["training"] |= {"total_steps": 60, "eval_steps": 60}
    Path("tuned.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", "tuned.yaml"]) == 0
    capsys.readouterr()
    asked = ["generate", "runs/tuned", "--temperature", "0", "--max-tokens", "20", "--prompt"]
    for prompt, response in answers.items():
        assert main([*asked, prompt]) == 0
        assert capsys.readouterr().out == f"{prompt}{response}\n"
    assert main([*asked, "a:", "--stop", "s"]) == 0
    assert capsys.readouterr().out == "a:ye\n"
    assert main(["export", "runs/tuned", "--format", "hf", "--out", "out"]) == 0
    newline = load_trained(Path("runs/tuned"), torch.device("cpu")).tokenizer.encode("\n")
    written = json.loads(Path("out/generation_config.json").read_text())
    assert written["eos_token_id"] == written["pad_token_id"] == int(newline[0])
    assert main(["run", "tuned.yaml", "data.response_end=null", "--run-dir", "endless"]) == 0
    capsys.readouterr()
    asked[1] = "endless"
    assert main([*asked, "a:"]) == 0
    assert len(capsys.readouterr().out) == len("a:") + 20 + 1


@pytest.mark.parametrize(
    "tokenizer",
    [
        "{name: bpe, vocab_size: 280}",
        pytest.param("{name: byte, end: true}", marks=pytest.mark.long),
    ],
)
def test_it_learns_the_tokenizer_s_own_end(
    tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"a:": "y\ny", "b:": "no"}
    lines = [json.dumps({"prompt": p, "response": r}) for p, r in answers.items()]
    Path("pairs.jsonl").write_text("\n".join(lines * 8))
    values = json.loads(json.dumps(CONFIG))
    values["training"] |= {"total_steps": 120, "eval_steps": 120}
    values["data"] |= {"response_end": None, "sequence_length": 16}
    Path("tuned.yaml").write_text(yaml.safe_dump(values))
    words = [f"data.tokenizer={tokenizer}", "handlers.samples={num_tokens: 30, prompt: 'b:'}"]
    assert main(["run", "tuned.yaml", *words]) == 0
    capsys.readouterr()
    for prompt, response in answers.items():
        words = ["--temperature", "0", "--max-tokens", "30", "--prompt", prompt]
        assert main(["generate", "runs/tuned", *words]) == 0
        assert capsys.readouterr().out == f"{prompt}{response}\n"
    sample = json.loads(Path("runs/tuned/samples.jsonl").read_text().splitlines()[-1])
    assert len(sample["text"]) < 15
    assert main(["export", "runs/tuned", "--format", "hf", "--out", "out"]) == 0
    end_id = load_trained(Path("runs/tuned"), torch.device("cpu")).tokenizer.end_id
    for name in ("generation_config.json", "config.json"):
        assert json.loads(Path("out", name).read_text())["eos_token_id"] == end_id
    said = json.loads(Path("out/tokenizer_config.json").read_text())
    assert said["eos_token"] == "<|endoftext|>"
    values = {**CONFIG, "name": "next", "model": {"init_from": "out"}}
    values["data"] = {"source": "pairs.jsonl", "batch_size": 4, "response_end": None}
    Path("next.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", "next.yaml"]) == 0
    again = load_trained(Path("runs/next"), torch.device("cpu")).tokenizer
    assert again.end_id == end_id


def test_another_text_is_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tuned.yaml", "training.total_steps=4"]) == 0
    lines = Path("pairs.jsonl").read_text()
    Path("pairs.jsonl").write_text(lines.replace('"a1:"', '"a2:"'))
    assert main(["run", "tuned.yaml", "--resume", "runs/tuned"]) == 4
    assert "the text differs from the one that the run started with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "pairs.jsonl:41: this line has no text under 'response'"),
        ('{"prompt": "a", "response": ""}', "pairs.jsonl:41: this example has no token to learn"),
        (
            '{"prompt": "a", "response": "a\\na"}',
            "pairs.jsonl:41: this response contains data.response_end",
        ),
        ('{"prompt": "aaaaaaaaaa", "response": "aaaa"}', "pairs.jsonl:41: this example is longer"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_bad_line_ends_it_before_anything_is_written(
    line: str, message: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("pairs.jsonl").open("a") as file:
        file.write("\n" + line)
    assert main([command, "tuned.yaml"]) == 3
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()
