"""`export`, and `model.init_from` on what it wrote."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fault_injection.faults import Crash, FaultyFilesystem
from safetensors.torch import load_file, save_file

from fundamentallm.config import RunConfig, TransformerConfig
from fundamentallm.engine.cli import main
from fundamentallm.errors import CheckpointError, ConfigError, FundamentaLLMError
from fundamentallm.inference import export as export_module
from fundamentallm.inference.load import load_trained
from fundamentallm.models.layouts.pretrained import Pretrained
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.checkpoint import CheckpointManager
from fundamentallm.training.checkpoint.store import CheckpointStore

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
GPT2 = {"normalization": "layernorm", "positions": "learned", "feedforward": "gelu"}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 1, "tie_embeddings": False},
    "gpt2": {**GPT2, "bias": True},
}


def config(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "name": kind,
        "data": {"source": "text.txt", "sequence_length": 16, "batch_size": 4},
        "model": {"d_model": 16, "num_layers": 2, "num_heads": 2, **MODELS[kind]},
        "training": {"learning_rate": 1e-2, "total_steps": 4, "eval_steps": 2},
        "handlers": {"tensorboard": False, "samples": False, "progress": False, **more},
    }


def write(name: str, values: dict[str, Any]) -> str:
    Path(name).write_text(yaml.safe_dump(values))
    return name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of each kind and its export; tests take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(TEXT, folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind in MODELS:
            assert main(["run", write(f"{kind}.yaml", config(kind))]) == 0
            assert main(["export", f"runs/{kind}", "--format", "hf", "--out", f"out/{kind}"]) == 0
    return folder


@pytest.fixture(autouse=True)
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr("fundamentallm.engine.check._SECONDS", 0.1)  # of steps that it times
    return tmp_path / "copy"


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_trained(Path(run), torch.device("cpu")).model.state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------- export


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_has_what_transformers_looks_for(kind: str) -> None:
    assert {path.name for path in Path("out", kind).iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    described = json.loads(Path("out", kind, "config.json").read_text())
    assert described["eos_token_id"] is None  # else text would end at some ordinary character
    assert not list(Path("out").glob(".*"))


def test_averaged_weights_are_exported_where_they_are_on(capsys: pytest.CaptureFixture) -> None:
    assert (
        main(["run", write("ema.yaml", {**config("llama", weight_ema=True), "name": "ema"})]) == 0
    )
    assert main(["export", "runs/ema", "--format", "hf", "--out", "ema"]) == 0
    assert "averaged weights" in capsys.readouterr().out
    trained = load_trained(Path("runs/ema"), torch.device("cpu"))
    raw = CheckpointStore(trained.checkpoint.parent).read(trained.checkpoint)["model"]
    exported = load_file("ema/model.safetensors")["model.norm.weight"]
    assert torch.equal(exported, trained.model.state_dict()["norm.weight"])
    assert not torch.equal(exported, raw["norm.weight"])


def test_one_file_for_torch_load() -> None:
    assert main(["export", "runs/llama", "--format", "torch", "--out", "deep/er/model.pt"]) == 0
    tree = torch.load("deep/er/model.pt", weights_only=True)
    model = Transformer(RunConfig.model_validate(tree["config"]).model)
    model.load_state_dict(tree["model"])
    assert equal(model.state_dict(), weights("runs/llama"))
    assert tree["tokenizer"]["type"] == "character"
    _, _, _, metrics, _, step = CheckpointManager.load("deep/er/model.pt", model)
    trained = load_trained(Path("runs/llama"), torch.device("cpu"))
    assert (step, metrics["val_loss"]) == (
        trained.manifest.step,
        trained.val_loss,
    )


def test_a_folder_for_llama_cpp_comes_with_the_next_commands(
    capsys: pytest.CaptureFixture,
) -> None:
    command = ["export", "runs/llama", "--format", "gguf", "--type", "Q8_0", "--out", "my models/a"]
    assert main(command) == 0
    assert {path.name for path in Path("my models/a").iterdir()} == {
        "README.md",
        "model.gguf",
        "Modelfile",
    }
    said = capsys.readouterr().out.splitlines()
    assert said[-5:] == [
        "note: characters outside of the vocabulary are refused there too, as the id -1",
        "next, with Ollama:",
        "  ollama create llama -f 'my models/a/Modelfile' && ollama run llama",
        "or with llama.cpp (in older versions the program is llama-cli):",
        "  llama-completion -m 'my models/a/model.gguf' -no-cnv -p 'the '",
    ]


def test_the_type_of_matrices_is_for_gguf_alone(capsys: pytest.CaptureFixture) -> None:
    command = ["export", "runs/llama", "--format", "hf", "--type", "F16", "--out", "x"]
    assert main(command) == 2
    assert "export format 'hf' has no option 'type'" in capsys.readouterr().err
    assert not Path("x").exists()


@pytest.mark.parametrize("format_name", ["hf", "gguf", "torch"])
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_an_export_replaces_nothing(
    format_name: str, kind: str, capsys: pytest.CaptureFixture
) -> None:
    path = Path("there")
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    assert main(["export", "runs/llama", "--format", format_name, "--out", "there"]) == 4
    assert "the path exists already" in capsys.readouterr().err
    assert kind != "file" or path.read_text() == "mine"
    assert kind != "folder" or not list(path.iterdir())


@pytest.mark.parametrize(
    ("change", "key"),
    [({"qk_norm": True}, "model.qk_norm"), ({"feedforward": "gelu"}, "model.feedforward")],
)
def test_what_a_layout_cannot_express_is_refused_and_nothing_written(
    change: dict[str, Any], key: str, capsys: pytest.CaptureFixture
) -> None:
    values = config("llama")
    values["model"] |= change
    assert main(["run", write("odd.yaml", {**values, "name": "odd"})]) == 0
    assert main(["export", "runs/odd", "--format", "hf", "--out", "odd"]) == 2
    assert f"error: {key}: " in capsys.readouterr().err
    assert not [path for path in Path().iterdir() if "odd" in path.name and path.is_dir()]
    assert main(["export", "runs/odd", "--format", "torch", "--out", "odd.pt"]) == 0


def test_a_full_disk_is_said_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export_module, "write_file", refuse)
    assert main(["export", "runs/llama", "--format", "hf", "--out", "there"]) == 5
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "free some space" in said
    assert not Path("there").exists()


@pytest.mark.parametrize("fault", [lambda: OSError(28, "disk full"), Crash])
def test_a_disk_that_fails_at_any_operation_leaves_all_or_nothing(
    fault: Callable[[], BaseException], tmp_path: Path
) -> None:
    files = {"a": [b"12", b"3"], "b": [b"4"]}
    for number in range(100):
        target = tmp_path / str(number) / "deep" / "out"
        filesystem = FaultyFilesystem(number, fault)
        try:
            export_module.write_folder(target, files, filesystem)
        except (OSError, Crash):
            assert not target.exists() or (target / "b").read_bytes() == b"4"
            if fault is not Crash and target.parent.exists():
                assert not list(target.parent.glob(".*"))
            continue
        break
    assert number > 12
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {"a": b"123", "b": b"4"}


def test_the_model_card_says_losses_data_and_settings() -> None:
    card = Path("out/llama/README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["pipeline_tag"] == "text-generation"
    trained = load_trained(Path("runs/llama"), torch.device("cpu"))
    step = trained.manifest.step
    lines = Path("runs/llama/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    (val,) = [one["val/loss"] for one in records if "val/loss" in one and one["step"] == step]
    smoothed = [one["train/loss_ema"] for one in records if "train/loss_ema" in one]
    plain = card.replace("\\", "")
    assert f"| validation loss at step {step} | {val:.4f} nats per token" in plain
    assert any(f"| {loss:.4f} nats per token" in plain for loss in smoothed)
    sha256 = trained.manifest.metadata["data"]["sha256"]
    assert f"| SHA-256 | {sha256} |" in plain
    assert f"| tokenizer's SHA-256 | {trained.tokenizer.fingerprint()} |" in plain
    assert f"SHA-256 {trained.manifest.hash}" in plain
    assert "| source | text.txt |" in plain
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("\n```")[0])
    assert settings["training"]["total_steps"] == 4
    assert RunConfig.model_validate(settings) == trained.config


# ------------------------------------------------------------------------------- init_from


CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize("holder", ["tokenizer_config.json", "chat_template.jinja"])
def test_what_a_folder_says_about_use_is_kept(holder: str) -> None:
    folder = Path("out/llama")
    tokens = {"bos_token": {"content": "t"}, "eos_token": "a", "pad_token": "not a token"}
    said = json.loads((folder / "tokenizer_config.json").read_text())
    if holder == "tokenizer_config.json":
        said["chat_template"] = CHAT
    else:
        (folder / holder).write_text(CHAT)
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, **tokens}))
    described = json.loads((folder / "config.json").read_text())
    described |= {"bos_token_id": 3, "eos_token_id": 5}
    (folder / "config.json").write_text(json.dumps(described))
    generation = {"eos_token_id": [5, 7], "temperature": 0.6, "top_p": 0.9, "pad_token_id": 2}
    (folder / "generation_config.json").write_text(
        json.dumps({**generation, "transformers_version": "4.0"})
    )
    name = write("next.yaml", start_from("out/llama"))
    assert main(["run", name]) == 0
    shutil.rmtree("out")  # it is in the checkpoints, also of a run that was continued
    shutil.rmtree("runs/next/checkpoints/step-00000004")
    assert main(["run", name]) == 0
    assert main(["export", "runs/next", "--format", "hf", "--out", "back"]) == 0
    config, generate, reading = (
        json.loads(Path("back", file).read_text())
        for file in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    assert [config[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [3, [5, 7], 2]
    assert generate == {**generation, "bos_token_id": 3}
    assert (reading["bos_token"], reading["eos_token"]) == ("t", "a")
    assert "pad_token" in reading  # by its id, for the name is none of the tokenizer's
    assert reading["chat_template"] == CHAT
    assert "split_special_tokens" not in reading
    assert main(["export", "runs/next", "--format", "gguf", "--out", "gguf"]) == 0
    modelfile = Path("gguf/Modelfile").read_text()
    assert "PARAMETER temperature 0.6\n" in modelfile
    assert "PARAMETER top_p 0.9\n" in modelfile
    assert "TEMPLATE" not in modelfile
    assert CHAT.encode() in Path("gguf/model.gguf").read_bytes()


def test_another_tokenizer_does_not_keep_the_folder_s_ids() -> None:
    path = Path("out/llama/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token_id": 3}))
    values = start_from("out/llama", tokenizer="character")
    assert main(["run", write("next.yaml", values)]) == 0
    assert main(["export", "runs/next", "--format", "hf", "--out", "back"]) == 0
    assert json.loads(Path("back/config.json").read_text())["bos_token_id"] is None


@pytest.mark.parametrize("text", ['{"temperature": NaN}', "{", "[" * 100_000])
def test_settings_of_generation_that_are_no_json_are_told(
    text: str, capsys: pytest.CaptureFixture
) -> None:
    Path("out/llama/generation_config.json").write_text(text)
    assert main(["run", write("next.yaml", start_from("out/llama"))]) == 3
    assert "out/llama/generation_config.json: this is not JSON" in capsys.readouterr().err


def start_from(folder: str, *, model: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    return {
        **config("llama"),
        "name": "next",
        "data": {"source": "text.txt", "batch_size": 4, **data},
        "model": {"init_from": folder, **(model or {})},
    }


def initial_weights(run: str) -> dict[str, torch.Tensor]:
    store = CheckpointStore(Path(run, "checkpoints"))
    state: dict[str, torch.Tensor] = store.read(store.directory / "step-00000000")["model"]
    return state


@pytest.mark.parametrize("kind", MODELS)
def test_export_then_init_from_is_the_identity(kind: str) -> None:
    values = start_from(f"out/{kind}")
    assert main(["run", write("next.yaml", values), "training.keep_last=9"]) == 0
    assert equal(initial_weights("runs/next"), weights(f"runs/{kind}"))
    resolved = RunConfig.from_yaml(Path("runs/next/config.yaml"))
    before = RunConfig.from_yaml(Path(f"runs/{kind}/config.yaml"))
    for field in ("vocab_size", "d_model", "num_layers", "kv_heads", "hidden_width", "bias"):
        assert getattr(resolved.model, field) == getattr(before.model, field)
    assert resolved.data.sequence_length == resolved.model.sequence_length == 16
    # The vocabulary is the folder's: the same ids for the same text.
    manifest = load_trained(Path("runs/next"), torch.device("cpu")).manifest
    old = load_trained(Path(f"runs/{kind}"), torch.device("cpu")).manifest
    assert manifest.metadata["tokenizer"] == old.metadata["tokenizer"]
    # And out again: the first export and one of the untouched weights are the same file.
    step0 = "runs/next/checkpoints/step-00000000"
    assert main(["export", step0, "--format", "hf", "--out", "again"]) == 0
    first = Path("out", kind, "model.safetensors").read_bytes()
    assert Path("again/model.safetensors").read_bytes() == first


def test_a_model_without_biases_survives_the_layout_that_has_them() -> None:
    values = config("gpt2")
    values["model"]["bias"] = False
    assert main(["run", write("plain.yaml", {**values, "name": "plain"})]) == 0
    assert main(["export", "runs/plain", "--format", "hf", "--out", "plain"]) == 0
    pretrained = Pretrained.open("plain")
    without = pretrained.adopt(TransformerConfig(init_from="plain", bias=False))
    assert equal(pretrained.state(without), weights("runs/plain"))
    assert pretrained.adopt(TransformerConfig(init_from="plain")).bias is True
    opened = Pretrained.open("out/gpt2")
    with pytest.raises(ConfigError) as caught:
        opened.state(opened.adopt(TransformerConfig(init_from="out/gpt2", bias=False)))
    assert caught.value.key == "bias"


def test_a_resumed_run_does_not_read_the_folder_again(capsys: pytest.CaptureFixture) -> None:
    values = start_from("out/llama")
    name = write("next.yaml", values)
    assert main(["run", name]) == 0
    whole = weights("runs/next/checkpoints/step-00000004")
    shutil.rmtree("runs/next/checkpoints/step-00000004")
    shutil.rmtree("out")
    capsys.readouterr()
    assert main(["run", name]) == 0
    assert "continuing runs/next from step 2" in capsys.readouterr().err
    assert equal(weights("runs/next/checkpoints/step-00000004"), whole)
    # Another folder is another run.
    capsys.readouterr()
    assert main(["run", name, "model.init_from=elsewhere", "--resume", "runs/next"]) == 4
    assert "model.init_from" in capsys.readouterr().err


def test_a_configuration_that_leaves_sizes_open_survives_yaml() -> None:
    open_ones = RunConfig.from_yaml(Path(write("next.yaml", start_from("out/llama"))))
    again = RunConfig.from_yaml(open_ones.to_yaml())
    assert again == open_ones
    assert again.model.open_fields == open_ones.model.open_fields
    assert again.left_to_init_from == {"sequence_length", "tokenizer"}
    written = RunConfig.from_yaml(
        Path(write("next.yaml", start_from("x", model={"d_model": 128}, sequence_length=4)))
    )
    again = RunConfig.from_yaml(written.to_yaml())
    assert "d_model" not in again.model.open_fields
    assert again.left_to_init_from == {"tokenizer"}


def test_the_resolved_configuration_of_such_a_run_starts_the_same_run() -> None:
    assert main(["run", write("next.yaml", start_from("out/gpt2"))]) == 0
    shutil.copy("runs/next/config.yaml", "again.yaml")
    assert main(["run", "again.yaml", "name=again"]) == 0
    assert equal(weights("runs/again"), weights("runs/next"))


@pytest.mark.parametrize(
    ("kind", "model", "key"),
    [
        ("llama", {"d_model": 32}, "model.d_model"),
        ("llama", {"num_layers": 3}, "model.num_layers"),
        ("llama", {"num_heads": 4}, "model.num_heads"),
        ("llama", {"num_kv_heads": 2}, "model.num_kv_heads"),
        ("llama", {"d_ff": 64}, "model.d_ff"),
        ("llama", {"vocab_size": 300}, "model.vocab_size"),
        ("llama", {"tie_embeddings": True}, "model.tie_embeddings"),
        ("llama", {"bias": True}, "model.bias"),
        ("llama", {"qk_norm": True}, "model.qk_norm"),
        ("llama", {"logit_softcap": 5.0}, "model.logit_softcap"),
        ("llama", {"positions": "learned"}, "model.positions"),
        ("llama", {"positions": {"name": "rotary", "base": 77.0}}, "model.positions.base"),
        ("llama", {"normalization": {"name": "rmsnorm", "eps": 0.5}}, "model.normalization.eps"),
        ("llama", {"sequence_length": 17}, "model.sequence_length"),
        ("gpt2", {"feedforward": "swiglu"}, "model.feedforward"),
        (
            "gpt2",
            {"feedforward": {"name": "gelu", "approximate": "tanh"}},
            "model.feedforward.approximate",
        ),
    ],
)
def test_what_differs_from_the_folder_is_refused_by_name(
    kind: str, model: dict[str, Any], key: str, capsys: pytest.CaptureFixture
) -> None:
    values = start_from(f"out/{kind}", model=model)
    assert main(["run", write("next.yaml", values)]) == 2
    error = capsys.readouterr().err
    assert f"{key}: " in error
    assert "differs from the model to start from" in error
    assert "next.yaml:" in error
    assert not Path("runs/next").exists()


def test_what_agrees_with_the_folder_may_be_written() -> None:
    model = {"d_model": 16, "num_heads": 2, "num_kv_heads": 1, "positions": "rotary", "d_ff": None}
    values = start_from("out/llama", model={**model, "dropout": 0.1}, sequence_length=16)
    assert main(["check", write("next.yaml", values)]) == 0


def test_a_shorter_context_is_cut_and_told(capsys: pytest.CaptureFixture) -> None:
    values = start_from("out/gpt2", sequence_length=5)
    assert main(["run", write("next.yaml", values), "training.keep_last=9"]) == 0
    assert "the context length is 5 instead of the folder's 16" in capsys.readouterr().err
    ours, theirs = initial_weights("runs/next"), weights("runs/gpt2")
    table = theirs.pop("positions.table.weight")
    assert torch.equal(ours.pop("positions.table.weight"), table[:5])
    assert equal(ours, theirs)


def test_the_folder_s_tokenizer_is_used_unless_another_is_named(
    capsys: pytest.CaptureFixture,
) -> None:
    name = write("next.yaml", start_from("out/llama"))
    # Text with fewer characters than the model knows: a fresh vocabulary would shift the ids.
    Path("text.txt").write_text("the " * 200)
    assert main(["run", name]) == 0
    capsys.readouterr()
    assert main(["check", name, "data.tokenizer=character"]) == 0
    assert "data.tokenizer is used instead of" in capsys.readouterr().out
    Path("out/llama/tokenizer.json").unlink()
    assert main(["check", name]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    Path("out/llama/tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    assert main(["check", name]) == 3
    assert "name the tokenizer in data.tokenizer" in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_model_is_refused(capsys: pytest.CaptureFixture) -> None:
    name = write("next.yaml", start_from("out/llama", tokenizer="byte"))
    assert main(["check", name]) == 2
    assert "the tokenizer has more tokens than the model's vocabulary" in capsys.readouterr().err


# -------------------------------------------------------------- folders that are not whole


def rewritten(kind: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    path = Path("out", kind, "model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path.parent


def state(folder: Path) -> dict[str, torch.Tensor]:
    pretrained = Pretrained.open(folder)
    return pretrained.state(pretrained.adopt(TransformerConfig(init_from=str(folder))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (lambda t: t.update(more=torch.ones(2)), "'more' is too much"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(8)}),
            "'model.norm.weight' is (8,), expected (16,)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(16).double()}),
            "'model.norm.weight' is torch.float64",
        ),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), "'model.norm.weight' is not finite"),
        (lambda t: t.pop("lm_head.weight"), "'lm_head.weight' is missing"),
    ],
)
def test_tensors_must_be_those_that_config_json_describes(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    folder = rewritten("llama", change)
    with pytest.raises(CheckpointError) as caught:
        state(folder)
    assert message in caught.value.got
    assert caught.value.where == str(folder)


def test_what_old_files_hold_besides_weights_is_passed_over() -> None:
    before = state(Path("out/gpt2"))

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    assert equal(state(rewritten("gpt2", age)), before)
    with pytest.raises(CheckpointError) as caught:
        state(rewritten("gpt2", lambda tensors: tensors["lm_head.weight"].add_(1)))
    assert "'lm_head.weight' differs from the embedding" in caught.value.got


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_widened_exactly(dtype: torch.dtype) -> None:
    folder = rewritten("llama", lambda t: t.update({n: w.to(dtype) for n, w in t.items()}))
    for name, tensor in state(folder).items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor.to(dtype).float(), tensor)


def sharded() -> Path:
    folder = Path("out/llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: files[number % 2] for number, name in enumerate(names)}
    for file in files:
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_folder_of_several_files() -> None:
    before = state(Path("out/llama"))
    assert equal(state(sharded()), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"model.norm.weight": "../x.safetensors"}), "outside the folder"),
        (lambda m: m.update({"model.norm.weight": 7}), "outside the folder"),
        (lambda m: m.update(absent=next(iter(m.values()))), "'absent' is not in model-0000"),
        (
            lambda m: m.update(absent="other.safetensors"),
            "other.safetensors: there is no",
        ),
        (lambda m: m.clear(), "the index names no weights"),
    ],
)
def test_an_index_that_lies_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = sharded()
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        state(folder)
    assert message in str(caught.value)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = Path("out/llama")
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"a": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        state(folder)
    assert caught.value.got == "pytorch_model.bin"
    assert "can run code" in caught.value.fix
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused(name: str) -> None:
    folder = sharded()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="there is no such file"):
        state(folder)


def test_damaged_files_are_told(capsys: pytest.CaptureFixture) -> None:
    path = Path("out/llama/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    name = write("next.yaml", start_from("out/llama"))
    assert main(["run", name]) == 4
    assert "model.safetensors: this is not a readable safetensors file" in capsys.readouterr().err
    for text in ("{", "[]", "[" * 100_000):
        Path("out/llama/config.json").write_text(text)
        assert main(["run", name]) == 4
        assert "out/llama/config.json" in capsys.readouterr().err
    Path("out/llama/config.json").write_text('{"model_type": "mamba"}')
    assert main(["run", name]) == 2
    assert "'mamba'" in capsys.readouterr().err
    shutil.rmtree("out/llama")
    assert main(["run", name]) == 4
    assert "there is no such folder to start from" in capsys.readouterr().err
    assert not Path("runs/next").exists()


def test_sizes_that_cannot_be_a_model_are_told() -> None:
    path = Path("out/gpt2/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_head": 3}))
    with pytest.raises(FundamentaLLMError) as caught:
        state(path.parent)
    assert caught.value.where == str(path)
