"""GGUF files, read back by a reader of their description and by the package `gguf`.

`tests/outside/test_llama_cpp.py` opens them in llama.cpp itself.
"""

from __future__ import annotations

import itertools
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tests.unit.test_layouts import CASES, GPT2, NAMES, random_model

from fundamentallm.config import RunConfig, TransformerConfig
from fundamentallm.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    SubwordTokenizer,
    Tokenizer,
)
from fundamentallm.data.tokenizer.gguf_vocabulary import GgufVocabulary, gguf_vocabulary
from fundamentallm.errors import ConfigError
from fundamentallm.inference.export import export
from fundamentallm.inference.gguf import encoded
from fundamentallm.inference.load import Trained
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.checkpoint.manifest import Manifest

TANH = {**GPT2, "feedforward": {"name": "gelu", "approximate": "tanh"}}
SIZES = {"d_model": 32, "num_layers": 2, "num_heads": 4, "sequence_length": 16}
SCALARS = {4: "I", 5: "i", 6: "f", 7: "?"}


@dataclass
class Read:
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    kinds: dict[str, int]
    data: dict[str, bytes]


class Reader:
    """Reads what https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def text(self) -> str:
        size = self.take("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            inner = self.take("I")
            return [self.value(inner) for _ in range(self.take("Q"))]
        return self.take(SCALARS[kind])

    def whole(self) -> Read:
        assert (self.take("I"), self.take("I")) == (0x46554747, 3)
        tensors, values = self.take("Q"), self.take("Q")
        metadata = {}
        for _ in range(values):
            key = self.text()
            metadata[key] = self.value(self.take("I"))
        read, starts = Read(metadata, {}, {}, {}), {}
        for _ in range(tensors):
            name = self.text()
            sides = [self.take("Q") for _ in range(self.take("I"))]
            read.shapes[name] = tuple(reversed(sides))
            read.kinds[name], starts[name] = self.take("I"), self.take("Q")
        base = -(-self.at // 32) * 32
        for name, start in starts.items():
            assert start % 32 == 0
            count = int(np.prod(read.shapes[name]))
            size = {0: 4 * count, 1: 2 * count, 8: count // 32 * 34}[read.kinds[name]]
            read.data[name] = self.data[base + start : base + start + size]
            assert len(read.data[name]) == size
        return read


def trained(fields: dict[str, Any], tokenizer: Tokenizer, place: Path, **data: Any) -> Trained:
    config = TransformerConfig(**{"vocab_size": tokenizer.vocab_size, **SIZES, **fields})
    run = RunConfig().model_copy(update={"model": config, "name": "mine"})
    manifest = Manifest("step-00000000", 0, {}, {"data": data}, "")
    return Trained(random_model(config), tokenizer, run, place, manifest, False)


def exported(one: Trained, place: Path, **options: Any) -> Read:
    export(one, "gguf", place / "out", options)
    return Reader((place / "out" / "model.gguf").read_bytes()).whole()


# ------------------------------------------------------------------------------- tensors

LLAMA_TENSORS = {
    "token_embd.weight": "token_embedding.weight",
    "output_norm.weight": "norm.weight",
    **{
        f"blk.{n}.{theirs}.weight": f"blocks.{n}.{ours}.weight"
        for n in range(2)
        for theirs, ours in {
            "attn_norm": "attention_norm",
            "attn_q": "attention.query",
            "attn_k": "attention.key",
            "attn_v": "attention.value",
            "attn_output": "attention.output",
            "ffn_norm": "feedforward_norm",
            "ffn_gate": "feedforward.gate",
            "ffn_up": "feedforward.input",
            "ffn_down": "feedforward.output",
        }.items()
    },
}
GPT2_TENSORS = {
    f"{name}.{kind}"
    for name in ("output_norm", *(f"blk.{n}.{part}" for n in range(2) for part in (
        "attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"
    )))
    for kind in ("weight", "bias")
} | {"token_embd.weight", "position_embd.weight"}  # fmt: skip


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: llama.cpp turns rows 2i and 2i + 1 of a head together, we i and i + K/2."""
    width = len(matrix) // heads
    order = [
        head * width + half * (width // 2) + pair
        for head in range(heads)
        for pair in range(width // 2)
        for half in (0, 1)
    ]
    return matrix[order]


@pytest.mark.parametrize(
    "fields", [fields for kind, fields in CASES if kind == "llama"], ids=NAMES[: len(NAMES) - 8]
)
def test_llama_tensors_have_the_names_and_rows_of_llama_cpp(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    one = trained(fields, ByteTokenizer(end=True), tmp_path)
    config, state = one.config.model, one.model.state_dict()
    read = exported(one, tmp_path)
    expected = dict(LLAMA_TENSORS)
    if not config.tie_embeddings:
        expected["output.weight"] = "head.weight"
    if config.bias:
        linear = [name for name in expected if "blk" in name and "norm" not in name]
        expected |= {n[:-6] + "bias": expected[n][:-6] + "bias" for n in linear}
    assert read.shapes.keys() == expected.keys()
    assert set(read.kinds.values()) == {0}
    for name, ours in expected.items():
        tensor = state[ours].numpy()
        if "attn_q" in name or "attn_k" in name:
            heads = config.num_heads if "attn_q" in name else config.kv_heads
            tensor = interleaved(tensor, heads)
        assert read.shapes[name] == tensor.shape
        assert read.data[name] == tensor.astype("<f4").tobytes(), name
    assert {k: v for k, v in read.metadata.items() if k.startswith("llama.")} == {
        "llama.context_length": 16,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": config.hidden_width,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(
            config.normalization.options.get("eps", 1e-5)
        ),
        "llama.rope.freq_base": config.positions.options.get("base", 10_000.0),
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": 257,
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gpt2_tensors_have_the_names_and_rows_of_llama_cpp(
    bias: bool, tied: bool, tmp_path: Path
) -> None:
    one = trained({**TANH, "bias": bias, "tie_embeddings": tied}, ByteTokenizer(True), tmp_path)
    state = {name: tensor.numpy() for name, tensor in one.model.state_dict().items()}
    read = exported(one, tmp_path)
    assert read.shapes.keys() == GPT2_TENSORS | (set() if tied else {"output.weight"})

    def values(name: str) -> np.ndarray:
        return np.frombuffer(read.data[name], "<f4").reshape(read.shapes[name])

    for n in range(2):
        for kind in ("weight", "bias") if bias else ("weight",):
            names = [f"blocks.{n}.attention.{part}.{kind}" for part in ("query", "key", "value")]
            joined = np.concatenate([state[name] for name in names])
            assert np.array_equal(values(f"blk.{n}.attn_qkv.{kind}"), joined)
            up = state[f"blocks.{n}.feedforward.input.{kind}"]
            assert np.array_equal(values(f"blk.{n}.ffn_up.{kind}"), up)
        assert values(f"blk.{n}.attn_qkv.bias").any() == bias
        assert read.shapes[f"blk.{n}.attn_qkv.bias"] == (96,)
    assert np.array_equal(values("position_embd.weight"), state["positions.table.weight"])
    assert read.metadata["general.architecture"] == "gpt2"
    assert read.metadata["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert read.metadata["gpt2.context_length"] == 16


def test_gelu_of_erf_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        export(trained(GPT2, ByteTokenizer(), tmp_path), "gguf", tmp_path / "out")
    assert caught.value.key == "model.feedforward.approximate"
    assert "approximate: tanh" in caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("type_name", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_package_gguf_reads_the_same(kind: str, type_name: str, tmp_path: Path) -> None:
    """Rows of 44 (the width of the feed-forward) are no multiple of a block of Q8_0."""
    fields = {"d_ff": 44, **(TANH if kind == "gpt2" else {})}
    read = exported(trained(fields, ByteTokenizer(), tmp_path), tmp_path, type=type_name)
    exact = exported(trained(fields, ByteTokenizer(), tmp_path), tmp_path / "exact")
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert theirs.keys() == read.shapes.keys()
    for name, tensor in theirs.items():
        shape = read.shapes[name]
        assert tuple(reversed(tensor.shape.tolist())) == shape
        assert bytes(tensor.data) == read.data[name]
        wanted = gguf.GGMLQuantizationType.F32
        if len(shape) > 1 and name != "position_embd.weight":
            wanted = gguf.GGMLQuantizationType[type_name]
            if type_name == "Q8_0" and shape[-1] == 44:
                wanted = gguf.GGMLQuantizationType.F16
        assert tensor.tensor_type == wanted
        # The package's own quantization of the exact weights, to the bit.
        weights = np.frombuffer(exact.data[name], "<f4").reshape(shape)
        assert gguf.quantize(weights, wanted).tobytes() == read.data[name]
    assert read.metadata["general.file_type"] == {"F32": 0, "F16": 1, "Q8_0": 7}[type_name]


def test_blocks_of_zeros_halves_and_signs_are_rounded_as_by_the_package() -> None:
    values = np.random.default_rng(0).integers(-254, 255, (64, 64)).astype("<f4") / 2
    values[:, 0] = 127  # so that the scale is 1 and halves stay halves
    values[3] = 0
    values[4] = 0.49999997
    values[4, 0] = -127
    theirs = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    assert encoded(values, "Q8_0") == theirs.tobytes()


def test_a_weight_that_a_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    one = trained({}, ByteTokenizer(), tmp_path)
    with torch.no_grad():
        one.model.state_dict()["blocks.1.feedforward.gate.weight"][3, 4] = 1e5
    with pytest.raises(ConfigError) as caught:
        export(one, "gguf", tmp_path / "out", {"type": "F16"})
    assert (caught.value.key, caught.value.got) == ("--type", "100000")
    assert "blk.1.ffn_gate.weight" in caught.value.what
    assert not (tmp_path / "out").exists()
    export(one, "gguf", tmp_path / "out", {"type": "Q8_0"})


@pytest.mark.parametrize(
    ("format_name", "options", "key"),
    [("hf", {"type": "F16"}, "type"), ("gguf", {"type": "Q4_0"}, "type")],
)
def test_options_are_those_of_the_format(
    format_name: str, options: dict[str, str], key: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        export(trained({}, ByteTokenizer(), tmp_path), format_name, tmp_path / "out", options)
    assert caught.value.key == key


# ------------------------------------------------------------------------------- tokenizers


PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
STAND_INS = {byte: chr(byte) for byte in PRINTABLE}  # GPT-2's: a byte that prints is itself
STAND_INS |= {byte: chr(0x100 + number) for number, byte in enumerate(OTHERS)}
BYTES = {character: byte for byte, character in STAND_INS.items()}


def byte_level(names: list[str]) -> bytes:
    return bytes(BYTES[character] for character in "".join(names))


def merged(text: str, vocabulary: GgufVocabulary) -> list[int]:
    """Encode as llama.cpp's BPE does, all of a text as one word."""
    assert vocabulary.merges is not None
    ids = {name: number for number, name in enumerate(vocabulary.tokens)}
    ranks = {tuple(one.split(" ")): rank for rank, one in enumerate(vocabulary.merges)}
    symbols = [STAND_INS[byte] for byte in text.encode()]
    while pairs := [pair for pair in itertools.pairwise(symbols) if pair in ranks]:
        best = min(pairs, key=lambda pair: ranks[pair])
        at = next(i for i, pair in enumerate(itertools.pairwise(symbols)) if pair == best)
        symbols[at : at + 2] = ["".join(best)]
    return [ids[one] for one in symbols if one in ids]


def test_bytes_are_bpe_without_merges(tmp_path: Path) -> None:
    read = exported(trained({}, ByteTokenizer(end=True), tmp_path), tmp_path)
    tokens = read.metadata["tokenizer.ggml.tokens"]
    assert byte_level(tokens[:256]) == bytes(range(256))
    assert tokens[256] == "<|endoftext|>"
    assert read.metadata["tokenizer.ggml.token_type"] == [1] * 256 + [3]
    assert read.metadata["tokenizer.ggml.merges"] == []
    assert (read.metadata["tokenizer.ggml.model"], read.metadata["tokenizer.ggml.pre"]) == (
        "gpt2",
        "gpt-2",
    )
    for key in ("bos", "eos"):
        assert read.metadata[f"tokenizer.ggml.{key}_token_id"] == 256
    for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        assert read.metadata[f"tokenizer.ggml.{key}"] is False


def test_without_an_end_a_text_ends_at_a_byte_that_no_text_has() -> None:
    vocabulary = gguf_vocabulary(ByteTokenizer(), 256)
    assert vocabulary.end_id == 0xFF
    assert byte_level([vocabulary.tokens[0xFF]]) == b"\xff"


CHARACTERS = "\n abc'.<|>endoftx\\~\u00e4\u00e9\u0416\u4f60\u4f61\ufffd\U0001f600\U0001f601"


def test_a_character_is_the_merge_of_its_bytes() -> None:
    tokenizer = CharacterTokenizer(CHARACTERS, "skip", end=True)
    vocabulary = gguf_vocabulary(tokenizer, tokenizer.vocab_size)
    assert vocabulary.note == ""
    assert vocabulary.end_id == tokenizer.end_id
    for number, character in enumerate(tokenizer.vocabulary):
        assert byte_level([vocabulary.tokens[number]]).decode() == character
    dice = random.Random(0)
    # Others share first bytes, or all but the last, with what the vocabulary has.
    others = "z\u00e5\u4f62\U0001f602\U0001f5ff\u00a0\u20ac"
    for _ in range(50):
        text = "".join(dice.choices(CHARACTERS + others, k=20))
        assert merged(text, vocabulary) == tokenizer.encode(text).tolist()


def test_the_policy_error_is_told_where_characters_are_left_out() -> None:
    tokenizer = CharacterTokenizer(CHARACTERS, end=True)
    assert "are left out there" in gguf_vocabulary(tokenizer, tokenizer.vocab_size).note


def test_ascii_without_an_end_is_the_one_kind_that_needs_none(tmp_path: Path) -> None:
    text = "".join(map(chr, range(128)))
    tokenizer = CharacterTokenizer(text)
    read = exported(trained({"vocab_size": 130}, tokenizer, tmp_path), tmp_path)
    metadata = read.metadata
    assert metadata["tokenizer.ggml.model"] == "rwkv"
    tokens = metadata["tokenizer.ggml.tokens"]
    # Python reads these escapes as llama.cpp does.
    assert "".join(one.encode().decode("unicode_escape") for one in tokens[:128]) == text
    assert tokens[128:] == [r"\xff[unused128]", r"\xff[unused129]"]
    assert metadata["tokenizer.ggml.token_type"] == [1] * 128 + [5] * 2
    absent = {"bos_token_id", "eos_token_id", "merges", "pre"}
    assert not {f"tokenizer.ggml.{key}" for key in absent} & metadata.keys()


@pytest.mark.parametrize(
    ("tokenizer", "got"),
    [
        (lambda: CharacterTokenizer("ab", "replace", end=True), "unknown: replace"),
        (lambda: CharacterTokenizer("a\u00e4"), "characters beyond ASCII"),
        (lambda: CharacterTokenizer("ab", "skip"), "unknown: skip"),
    ],
)
def test_characters_that_llama_cpp_cannot_express(
    tokenizer: Callable[[], Tokenizer], got: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        export(trained({}, tokenizer(), tmp_path), "gguf", tmp_path / "out")
    assert caught.value.key == "data.tokenizer"
    assert got in caught.value.got
    assert "--format hf" in caught.value.fix
    assert not (tmp_path / "out").exists()


TEXT = ["the cat sat on the mat, isn't it? </s> 12 123 \u00e4\u00e4 \u4f60\u597d\n\n  x"] * 20
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe(words: list[Any], added: list[Any] = [], **model: Any) -> SubwordTokenizer:  # noqa: B006
    library = tokenizers.Tokenizer(tokenizers.models.BPE(**model))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(words)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator(
        TEXT,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            show_progress=False,
            special_tokens=["</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    library.add_tokens(added)
    return SubwordTokenizer(json.loads(library.to_str()))


def words(name: str) -> list[Any]:
    """The pre-tokenizers of models of these names."""
    parts = tokenizers.pre_tokenizers
    pattern = LLAMA3 if name == "llama 3" else LLAMA3.replace("{1,3}", "")
    if name == "gpt-2":
        return [parts.ByteLevel(add_prefix_space=False)]
    if name == "smollm":
        return [parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)]
    return [
        parts.Split(tokenizers.Regex(pattern), "isolated"),
        parts.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


@pytest.mark.parametrize(
    ("name", "options", "pre"),
    [
        ("gpt-2", {}, "gpt-2"),
        ("smollm", {}, "smollm"),
        ("llama 3", {"ignore_merges": True}, "llama-bpe"),
        ("llama 3", {}, "smaug-bpe"),
        ("qwen 2", {}, "qwen2"),
    ],
)
def test_patterns_of_words_have_a_name_in_llama_cpp(
    name: str, options: dict[str, Any], pre: str
) -> None:
    tokenizer = bpe(words(name), **options)
    vocabulary = gguf_vocabulary(tokenizer, tokenizer.vocab_size + 2)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", pre)
    assert vocabulary.end_id == tokenizer.end_id
    assert vocabulary.tokens[-1] == f"[unused{tokenizer.vocab_size + 1}]"
    assert vocabulary.types[-2:] == [5, 5]
    # A special token is none in a text, so nothing may merge to it.
    assert not any("".join(one.split(" ")) == "</s>" for one in vocabulary.merges)
    assert vocabulary.types[tokenizer.end_id] == 3


def test_the_trained_bpe_is_byte_level_bpe() -> None:
    tokenizer = BpeTokenizer(300, texts=TEXT)
    vocabulary = gguf_vocabulary(tokenizer, tokenizer.vocab_size)
    assert (vocabulary.pre, vocabulary.end_id) == ("gpt-2", tokenizer.end_id)
    for word in ("the", " cat", "\u4f60\u597d", " isn"):
        assert merged(word, vocabulary) == tokenizer.encode(word).tolist()


def test_added_tokens_are_found_as_wholes() -> None:
    tokenizer = bpe(words("gpt-2"), ["<tool>", "  ", "   "])
    vocabulary = gguf_vocabulary(tokenizer, tokenizer.vocab_size)
    whole = [t for t, k in zip(vocabulary.tokens, vocabulary.types, strict=True) if k == 4]
    assert whole == ["<tool>", "  ", "   "]


def changed(**parts: Any) -> SubwordTokenizer:
    return SubwordTokenizer({**bpe(words("gpt-2")).json, **parts})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: changed(normalizer={"type": "NFC"}), "the normalizer"),
        (lambda: bpe(words("gpt-2"), ignore_merges=True), "finds words"),
        (lambda: bpe([tokenizers.pre_tokenizers.ByteLevel()]), "finds words"),
        (
            lambda: bpe([tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)]),
            "finds words",
        ),
        (lambda: bpe(words("gpt-2"), ["ab", "bc"]), "overlap"),
        (
            lambda: bpe(words("gpt-2"), [tokenizers.AddedToken("<x>", lstrip=True)]),
            "white space along",
        ),
        (lambda: bpe(words("gpt-2"), ["\u0120"]), "bytes in the vocabulary"),
        (lambda: unigrams(), "of this kind"),
    ],
)
def test_a_tokenizer_json_that_llama_cpp_cannot_express(
    make: Callable[[], Tokenizer], message: str
) -> None:
    tokenizer = make()
    with pytest.raises(ConfigError) as caught:
        gguf_vocabulary(tokenizer, tokenizer.vocab_size)
    assert message in caught.value.what
    assert caught.value.key == "data.tokenizer"


def test_a_token_named_like_an_unused_one_is_refused() -> None:
    size = bpe(words("gpt-2")).vocab_size
    tokenizer = bpe(words("gpt-2"), [f"[unused{size + 1}]"])
    with pytest.raises(ConfigError, match="two tokens of one name"):
        gguf_vocabulary(tokenizer, size + 2)


def unigrams() -> SubwordTokenizer:
    library = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", -1.0), ("b", -2.0)], 0, False))
    return SubwordTokenizer(json.loads(library.to_str()))


# ------------------------------------------------------------------------------- Modelfile


def test_the_modelfile_says_context_sampling_and_stops(tmp_path: Path) -> None:
    exported(trained({}, ByteTokenizer(), tmp_path, response_end="\n"), tmp_path)
    assert (tmp_path / "out" / "Modelfile").read_text() == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ .Prompt }}"""\n'
        "PARAMETER num_ctx 16\n"
        "PARAMETER temperature 0.8\n"
        "PARAMETER top_k 0\n"
        "PARAMETER top_p 1\n"
        "PARAMETER repeat_penalty 1\n"
        'PARAMETER stop """\n"""\n'
    )


def test_a_transformer_of_any_size_fits(tmp_path: Path) -> None:
    """Odd sizes and rows of a matrix that end off a multiple of 32 bytes."""
    fields = {"d_model": 6, "num_heads": 3, "num_layers": 1, "d_ff": 5, "sequence_length": 3}
    one = trained(fields, CharacterTokenizer("abc"), tmp_path)
    assert isinstance(one.model, Transformer)
    read = exported(one, tmp_path, type="Q8_0")
    assert set(read.kinds.values()) == {0, 1}
    assert read.shapes["blk.0.ffn_down.weight"] == (6, 5)
