"""Exports in the hands of the library that they are made for, and its models in ours.

`tests/unit/test_layouts.py` and `test_export_command.py` are the fast twins without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers
import torch
from tests.unit.test_layouts import CASES, NAMES, random_model

from fundamentallm.config import RunConfig, TransformerConfig
from fundamentallm.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    SubwordTokenizer,
    Tokenizer,
)
from fundamentallm.engine.wiring.run_directory import RunDirectory
from fundamentallm.engine.wiring.starting_point import starting_point
from fundamentallm.inference.export import export
from fundamentallm.inference.generate import stream_text, stream_texts
from fundamentallm.inference.load import Trained
from fundamentallm.models.layouts.pretrained import Pretrained
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.checkpoint.manifest import Manifest

pytestmark = [
    pytest.mark.long,
    # What the library deprecates inside itself, and its progress bars left open, is its matter.
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]
every_case = pytest.mark.parametrize(("kind", "fields"), CASES, ids=NAMES)


@pytest.fixture(scope="module")
def transformers() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("transformers")


def exported(
    fields: dict[str, Any],
    tokenizer: Tokenizer,
    place: Path,
    change: Callable[[Transformer], object] = lambda model: None,
) -> tuple[Transformer, Path]:
    """Return a random model and the folder that `export` made of it."""
    sizes = {"d_model": 24, "num_layers": 2, "num_heads": 4, "sequence_length": 64}
    config = TransformerConfig(**{**sizes, "vocab_size": tokenizer.vocab_size, **fields})
    model = random_model(config)
    change(model)
    run = RunConfig().model_copy(update={"model": config})
    manifest = Manifest("step-00000000", 0, {}, {}, "")
    export(Trained(model, tokenizer, run, place, manifest, False), "hf", place / "out")
    return model, place / "out"


@every_case
def test_logits_and_greedy_text_are_equal(
    kind: str, fields: dict[str, Any], transformers: ModuleType, tmp_path: Path
) -> None:
    text = "".join(map(chr, range(32, 127)))
    tokenizer = CharacterTokenizer(text)
    model, folder = exported(fields, tokenizer, tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert type(theirs).__name__ == {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[kind]
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = "What is here? "
    ids = their_tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode(prompt).tolist()
    long = torch.randint(tokenizer.vocab_size, (2, 64))
    with torch.no_grad():
        for batch in (ids, long):
            torch.testing.assert_close(
                model(batch), theirs.eval()(batch).logits, atol=1e-5, rtol=1e-5
            )
    written = theirs.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.size(1) :]
    ours = "".join(stream_text(model, tokenizer, prompt, 40, temperature=0))
    assert len(set(ours)) > 1
    assert their_tokenizer.decode(written) == ours


@pytest.mark.parametrize("policy", ["bytes", "error", "replace", "skip"])
def test_auto_tokenizer_has_the_same_ids(
    policy: str, transformers: ModuleType, tmp_path: Path
) -> None:
    text = (
        "Hello, World!\r\n\t  a  b <unk> <s> [UNK] e\u0301 \u00e9 \u4f60 \U0001f600 \ufffd .,'s n't"
    )
    tokenizer = (
        ByteTokenizer() if policy == "bytes" else CharacterTokenizer(text, policy)  # type: ignore[arg-type]
    )
    _, folder = exported({}, tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.vocab_size == len(theirs) == tokenizer.vocab_size
    assert theirs.all_special_ids == []
    outside = "" if policy == "error" else "\u00df\u0000\U0010ffff"
    for piece in (text, text[::-1], " " + text + " ", "<unk>", "<s>", text + outside + text):
        ids = theirs(piece).input_ids
        assert ids == tokenizer.encode(piece).tolist()
        assert theirs.decode(ids) == tokenizer.decode(ids)
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    if policy == "error":
        with pytest.raises(Exception, match="Missing"):
            theirs("\u00df")


TEXTS = [
    "the cat sat on the mat. " * 20,
    " Hello <|endoftext|> World <s>! na\u00efve \u4f60\u597d \U0001f600\n\n  x 's </p> ",
]


def sentence_pieces(end: str | None = None) -> SubwordTokenizer:
    """BPE with bytes to fall back on, as Llama 2 has it; it puts <s> before a text."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    normalizers = tokenizers.normalizers
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    decoders = tokenizers.decoders
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", "<|eot|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return SubwordTokenizer(json.loads(library.to_str()), end)


def unigrams() -> SubwordTokenizer:
    """A Unigram model, which puts </s> behind a text, as T5 has it."""
    library = tokenizers.Tokenizer(tokenizers.models.Unigram())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return SubwordTokenizer(json.loads(library.to_str()))


TOKENIZERS = {
    "bpe": lambda: BpeTokenizer(300, texts=TEXTS),
    "byte": lambda: ByteTokenizer(end=True),
    "character": lambda: CharacterTokenizer("".join(TEXTS), end=True),
    "replace": lambda: CharacterTokenizer("".join(TEXTS), "replace", end=True),
    "sentence pieces": sentence_pieces,
    "another end": lambda: sentence_pieces("<|eot|>"),
    "unigrams": unigrams,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_with_an_end_travels_there_and_back(
    kind: str, transformers: ModuleType, tmp_path: Path
) -> None:
    tokenizer = TOKENIZERS[kind]()
    model, folder = exported({}, tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.end_id is not None
    # What the vocabulary of characters lacks is refused by both.
    named = [] if kind == "character" else ["the </s> cat <unk></s>", "<|endoftext|>", "</s>"]
    for text in TEXTS + named:
        ids = theirs(text).input_ids
        assert ids == tokenizer.encode(text).tolist()
        assert tokenizer.end_id not in ids
        if text in named:
            continue
        assert theirs.decode(ids) == tokenizer.decode(ids)
        ended = [*ids, tokenizer.end_id]
        assert theirs.decode(ended, skip_special_tokens=True) == tokenizer.decode(ended)
    their_model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert their_model.config.eos_token_id == tokenizer.end_id
    assert their_model.generation_config.eos_token_id == tokenizer.end_id

    config = RunConfig.model_validate({"model": {"init_from": str(folder)}})
    start = starting_point(config, RunDirectory(tmp_path, tmp_path / "checkpoints", None))
    back = start.tokenizer()
    assert back is not None
    assert (back.fingerprint(), back.end_id) == (tokenizer.fingerprint(), tokenizer.end_id)
    copy = Transformer(start.config.model)
    start.load_into(copy)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, copy.state_dict()[name]), name


def test_both_stop_at_the_end_of_a_document(transformers: ModuleType, tmp_path: Path) -> None:
    tokenizer = BpeTokenizer(300, texts=TEXTS)
    prompt = tokenizer.encode("the cat").tolist()

    @torch.no_grad()
    def end_at_once(model: Transformer) -> None:
        first = int(model(torch.tensor([prompt]))[0, -1].argmax())
        assert first not in (*prompt, 0)
        model.head.weight[[first, 0]] = model.head.weight[[0, first]]

    model, folder = exported({"tie_embeddings": False}, tokenizer, tmp_path, end_at_once)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    written = theirs.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)
    assert written[0].tolist() == [*prompt, 0]
    options: dict[str, Any] = {"temperature": 0, "stop_ids": [0], "seeds": [1]}
    pieces = list(stream_texts(model, tokenizer, ["the cat"], 9, **options))
    assert [piece.text for piece in pieces] == [""]


def test_a_chat_template_works_there_again(transformers: ModuleType, tmp_path: Path) -> None:
    trained = BpeTokenizer(300, texts=TEXTS)
    state, first = trained.json, trained.vocab_size
    marks = [
        {"id": first + number, "content": name, "special": True, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for number, name in enumerate(["<|start|>", "<|stop|>"])
    ]  # fmt: skip
    tokenizer = SubwordTokenizer({**state, "added_tokens": [*state["added_tokens"], *marks]})
    template = "{% for one in messages %}<|start|>{{ one.content }}<|stop|>{% endfor %}"
    origin = {
        "special": {"bos_token_id": first, "eos_token_id": [0, first + 1]},
        "names": {"bos_token": "<|start|>"},
        "generation": {"temperature": 0.5},
        "chat_template": template,
    }
    config = TransformerConfig(vocab_size=first + 2, d_model=24, num_layers=1, num_heads=4)
    config = config.model_copy(update={"sequence_length": 64})
    manifest = Manifest("step-00000000", 0, {}, {"origin": origin}, "")
    run = RunConfig().model_copy(update={"model": config})
    one = Trained(random_model(config), tokenizer, run, tmp_path, manifest, False)
    export(one, "hf", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (first, 0, first + 2)
    ids = theirs.apply_chat_template([{"role": "user", "content": "the cat"}], return_dict=False)
    assert ids == [first, *tokenizer.encode("the cat").tolist(), first + 1]
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.temperature) == ([0, first + 1], 0.5)


LLAMA = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("Llama", {"rope_parameters": {"type": "linear", "factor": 1.0, "rope_theta": 5e5}}),
        ("Llama", {"rope_scaling": {"type": "linear", "factor": 1.0, "rope_theta": 5e5}}),
        ("GPT2", {}),
        ("GPT2", {"tie_word_embeddings": False, "n_inner": 40}),
        ("GPT2", {"activation_function": "gelu", "layer_norm_epsilon": 1e-3}),
        ("GPT2", {"activation_function": "gelu_pytorch_tanh"}),
    ],
)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_a_model_of_theirs_computes_the_same_here(
    kind: str, fields: dict[str, Any], shards: bool, transformers: ModuleType, tmp_path: Path
) -> None:
    sizes = {**(LLAMA if kind == "Llama" else GPT2), "bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **fields})
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # its own start has biases of 0 and gains of 1
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    pretrained = Pretrained.open(tmp_path)
    ours = Transformer(pretrained.adopt(TransformerConfig(init_from=str(tmp_path)))).eval()
    ours.load_state_dict(pretrained.state(ours.config))
    ids = torch.randint(50, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_model_of_theirs_comes_back_as_it_was(transformers: ModuleType, tmp_path: Path) -> None:
    model, folder = exported({"num_kv_heads": 2, "bias": True}, ByteTokenizer(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "again")
    pretrained = Pretrained.open(tmp_path / "again")
    state = pretrained.state(pretrained.adopt(TransformerConfig(init_from="x")))
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)


def test_ids_of_their_default_special_tokens_are_not_special_here(
    transformers: ModuleType, tmp_path: Path
) -> None:
    _, folder = exported({}, ByteTokenizer(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(theirs.config, name) is None
        assert getattr(theirs.generation_config, name) is None
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] is None
