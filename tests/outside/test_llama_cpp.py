"""Exports opened by llama.cpp itself: the same logits, ids and text.

The KV cache is F32 and there is no flash attention, as both of them round. GELU is a table of
float16 values there (`ggml_table_gelu_f16`), which `TableGelu` repeats.
"""

from __future__ import annotations

import ctypes
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pages import ROOT, code
from tests.unit.test_gguf import TANH, bpe, words
from tests.unit.test_layouts import LLAMA_CONFIGS, random_model
from torch import Tensor, nn

from fundamentallm.config import RunConfig, TransformerConfig
from fundamentallm.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    Tokenizer,
)
from fundamentallm.engine.cli import main
from fundamentallm.errors import DataError
from fundamentallm.inference.export import export
from fundamentallm.inference.load import Trained, load_trained
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.checkpoint.manifest import Manifest

pytestmark = [
    pytest.mark.outside,
    pytest.mark.filterwarnings("default"),  # of the packages
]

BOUND = 1e-4  # of logits
EXCERPT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
TEXT = EXCERPT.read_text()
SIZES = {"d_model": 64, "num_layers": 3, "num_heads": 4, "sequence_length": 256}
REPORT: dict[str, float] = {}


@pytest.fixture(autouse=True, scope="module")
def report() -> Iterator[None]:
    yield
    print("\n" + json.dumps(REPORT, indent=1))


def exported(
    fields: dict[str, Any], tokenizer: Tokenizer, place: Path, **options: str
) -> tuple[Transformer, Any]:
    """A random model and llama.cpp with its export."""
    config = TransformerConfig(**{"vocab_size": tokenizer.vocab_size, **SIZES, **fields})
    model = random_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.3 if parameter.dim() > 1 else 1.0)  # logits of a few units
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    run = RunConfig().model_copy(update={"model": config, "name": "mine"})
    one = Trained(model, tokenizer, run, place, Manifest("step-0", 0, {}, {}, ""), False)
    export(one, "gguf", place / "out", options)
    return model, opened(place / "out" / "model.gguf")


def opened(path: Path) -> Any:
    import llama_cpp

    def plain_parameters() -> Any:
        parameters = default_parameters()
        # Else weights are rearranged, for AMX even where a virtual machine does not allow it.
        parameters.use_extra_bufts = False
        return parameters

    hidden: dict[int, Tensor] = {}

    @llama_cpp.ggml_backend_sched_eval_callback
    def keep(tensor: int, ask: bool, _: Any) -> bool:
        """Copy what goes into the activations of a feed-forward with biases, (T, F)."""
        base.ggml_get_name.restype = ctypes.c_char_p
        name = base.ggml_get_name(ctypes.c_void_p(tensor)).decode()
        if ask or not name.startswith("ffn_up_b-"):
            return name.startswith("ffn_up_b-")
        base.ggml_get_data_f32.restype = ctypes.POINTER(ctypes.c_float)
        base.ggml_nelements.restype = ctypes.c_int64
        count = base.ggml_nelements(ctypes.c_void_p(tensor))
        data = base.ggml_get_data_f32(ctypes.c_void_p(tensor))
        said = theirs.metadata
        width = said[f"{said['general.architecture']}.feed_forward_length"]
        values = torch.from_numpy(np.ctypeslib.as_array(data, (count,)).copy())
        hidden[int(name.rpartition("-")[2])] = values.view(-1, int(width))
        return True

    def watched_context() -> Any:
        parameters = default_context()
        parameters.cb_eval = keep
        return parameters

    default_parameters = llama_cpp.llama_model_default_params
    default_context = llama_cpp.llama_context_default_params
    base = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.*"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", plain_parameters)
        patch.setattr(llama_cpp.llama_cpp, "llama_context_default_params", watched_context)
        theirs = llama_cpp.Llama(
            str(path),
            n_ctx=256,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            verbose=False,
        )
    theirs.hidden, theirs.callback = hidden, keep  # the callback lives as long as the model
    return theirs


def their_logits(theirs: Any, ids: list[int]) -> Tensor:
    theirs.reset()
    theirs.eval(ids)
    return torch.from_numpy(np.array(theirs.scores[: len(ids)]))


@torch.no_grad()
def difference(model: Transformer, theirs: Any, length: int = 256) -> float:
    """The largest over the logits of random ids."""
    torch.manual_seed(1)
    ids = torch.randint(theirs.n_vocab(), (length,))
    logits = their_logits(theirs, ids.tolist())
    ours = model(ids[None])[0]
    assert ours.std() > 0.3  # so that the bound means something
    return (ours - logits).abs().max().item()


# ------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("name", LLAMA_CONFIGS)
def test_logits_of_the_llama_layout(name: str, tmp_path: Path) -> None:
    model, theirs = exported(LLAMA_CONFIGS[name], ByteTokenizer(end=True), tmp_path)
    REPORT[f"llama {name}"] = found = difference(model, theirs)
    assert found < BOUND


class TableGelu(nn.Module):
    """The activation of llama.cpp: tanh GELU from float16 to float16, within 10 of zero.

    A value near the middle of two float16 values is looked up as one or the other by the last bit
    of a sum. So the place in the table is that of llama.cpp, whose values must agree with ours.
    """

    def __init__(
        self, feedforward: nn.Module, number: int, their_hidden: dict[int, Tensor]
    ) -> None:
        super().__init__()
        self.input, self.output = feedforward.input, feedforward.output
        self.number, self.theirs = number, their_hidden

    def forward(self, x: Tensor) -> Tensor:
        hidden, theirs = self.input(x), self.theirs[self.number]
        assert (hidden - theirs).abs().max() < BOUND
        rounded = nn.functional.gelu(theirs.half().float(), approximate="tanh").half().float()
        hidden = torch.where(theirs >= 10, hidden, torch.where(theirs <= -10, 0, rounded))
        return self.output(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "fields", [{}, {"bias": True, "tie_embeddings": False, "d_ff": 40}], ids=["plain", "all"]
)
def test_logits_of_the_gpt2_layout(fields: dict[str, Any], tmp_path: Path) -> None:
    model, theirs = exported({**TANH, **fields}, ByteTokenizer(end=True), tmp_path)
    kind = "gpt2 " + ("all" if fields else "plain")
    REPORT[f"{kind}, exact GELU"] = exact = difference(model, theirs)
    with_table(model, theirs)
    REPORT[f"{kind}, the table"] = found = difference(model, theirs)
    assert found < BOUND < exact


def with_table(model: nn.Module, theirs: Any) -> None:
    """Give a model the activation of llama.cpp, for the tokens that this has read last."""
    for number, block in enumerate(model.blocks):
        block.feedforward = TableGelu(block.feedforward, number, theirs.hidden)


@pytest.mark.parametrize(("type_name", "bound"), [("F16", 0.02), ("Q8_0", 0.2)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_narrower_types_stay_near(kind: str, type_name: str, bound: float, tmp_path: Path) -> None:
    fields = TANH if kind == "gpt2" else {}
    model, theirs = exported(fields, ByteTokenizer(end=True), tmp_path, type=type_name)
    REPORT[f"{kind} {type_name}"] = found = difference(model, theirs)
    assert BOUND / 10 < found < bound


# ------------------------------------------------------------------------------- text

CONFIG = """\
name: {kind}
data: {{source: text.txt, sequence_length: 128, batch_size: 8, tokenizer: {tokenizer}}}
model: {model}
training: {{learning_rate: 3e-3, total_steps: 60, eval_steps: 60}}
handlers: {{tensorboard: false, samples: false, progress: false}}
"""
TRAINED = {
    "llama character": ("character", "{d_model: 64, num_layers: 2, num_heads: 4}"),
    "llama byte": ("byte", "{d_model: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2}"),
    "llama bpe": ("{name: bpe, vocab_size: 400}", "{d_model: 64, num_layers: 2, num_heads: 4}"),
    "gpt2 character": (
        "{name: character, end: true}",
        "{d_model: 64, num_layers: 2, num_heads: 4, normalization: layernorm, positions: learned,"
        " feedforward: {name: gelu, approximate: tanh}}",
    ),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_greedy_text_of_a_trained_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    tokenizer, model = TRAINED[kind]
    Path("c.yaml").write_text(CONFIG.format(kind="mine", tokenizer=tokenizer, model=model))
    assert main(["run", "c.yaml"]) == 0
    assert main(["export", "runs/mine", "--format", "gguf", "--out", "out"]) == 0
    assert "ollama create mine -f out/Modelfile" in capsys.readouterr().out
    ours, theirs = load_trained(Path("runs/mine"), torch.device("cpu")), opened(
        Path("out/model.gguf")
    )  # fmt: skip
    sample = ours.tokenizer.encode(TEXT).tolist()[:128]

    def largest() -> float:
        logits = their_logits(theirs, sample)
        with torch.no_grad():
            own = ours.model(torch.tensor([sample]))[0]
        assert own.std() > 0.3
        return (own - logits).abs().max().item()

    REPORT[f"trained {kind}"] = largest()
    if kind.startswith("gpt2"):
        with_table(ours.model, theirs)
        REPORT[f"trained {kind}, the table"] = largest()
    assert largest() < BOUND
    ids = ours.tokenizer.encode("the ").tolist()
    assert theirs.tokenize(b"the ", add_bos=False, special=False) == ids
    text = ids[:]
    for step in range(100):
        # The table is for the values of all tokens; else llama.cpp reads one token a step.
        whole = step == 0 or kind.startswith("gpt2")
        logits = their_logits(theirs, text)[-1] if whole else step_logits(theirs, text[-1])
        with torch.no_grad():
            own = ours.model(torch.tensor([text]))[0, -1]
        best = own.topk(2).values
        if best[0] - best[1] < BOUND:
            break
        assert logits.argmax() == own.argmax(), step
        text.append(int(own.argmax()))
    REPORT[f"{kind}: greedy tokens"] = len(text) - len(ids)
    assert theirs.detokenize(text, special=False).decode() == ours.tokenizer.decode(text)


def test_the_python_of_the_page_on_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    exported({"num_layers": 1}, CharacterTokenizer(TEXT, end=True), tmp_path)
    (tmp_path / "out").rename(tmp_path / "mine-gguf")
    monkeypatch.chdir(tmp_path)
    (block,) = code(ROOT / "docs/export.md", "python")
    exec(block, {})
    assert len(capsys.readouterr().out.strip()) > 20


def step_logits(theirs: Any, token: int) -> Tensor:
    theirs.eval([token])
    return torch.from_numpy(np.array(theirs.scores[theirs.n_tokens - 1]))


# ------------------------------------------------------------------------------- ids


def texts(count: int = 1000) -> list[str]:
    """Words, code, white space, scripts, combining marks, emoji and arbitrary characters."""
    dice = random.Random(0)
    code = Path(__file__).read_text()
    emoji = ["\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea"]
    scripts = "\u4f60\u597d\u0416\u044f\u03b1\u05d0\u0627\u0928\u092e\u0938\u094d\ud55c\u3042"
    spaces = " \t\n\r\u00a0\u2003\u3000\u0085\x0b\x0c"

    def part() -> str:
        start = dice.randrange(len(TEXT) - 200)
        kind = dice.randrange(9)
        if kind == 0:
            return TEXT[start : start + dice.randrange(120)]
        if kind == 1:
            start = dice.randrange(len(code) - 200)
            return code[start : start + dice.randrange(120)]
        if kind == 2:
            return "".join(dice.choices(spaces, k=dice.randrange(1, 8)))
        if kind == 3:
            return " " * dice.randrange(1, 12) + "\n" * dice.randrange(3)
        if kind == 4:
            return "".join(dice.choices(scripts, k=dice.randrange(1, 8)))
        if kind == 5:
            return dice.choice(emoji) * dice.randrange(1, 3)
        if kind == 6:
            return str(dice.randrange(10 ** dice.randrange(1, 9)))
        if kind == 7:
            marks = dice.choices("e\u0301n\u0303\u00e9\u00df\u0130i'S'LL'd</s><|endoftext|>", k=9)
            return "".join(marks)
        codes = [dice.randrange(0x20, 0x3000) for _ in range(6)]
        return "".join(map(chr, codes))

    return ["".join(part() for _ in range(dice.randrange(1, 8))) for _ in range(count)]


def everything() -> str:
    return "".join(sorted(set("".join(texts()))))


TOKENIZERS = {
    "byte": lambda: ByteTokenizer(),
    "byte with an end": lambda: ByteTokenizer(end=True),
    "character": lambda: CharacterTokenizer(everything(), end=True),
    "character that skips": lambda: CharacterTokenizer(everything()[::2], "skip", end=True),
    "bpe": lambda: BpeTokenizer(1000, texts=texts()),
    "smollm": lambda: bpe(words("smollm")),
    "llama 3": lambda: bpe(words("llama 3"), ignore_merges=True),
    "llama 3 without ignore_merges": lambda: bpe(words("llama 3")),
    "qwen 2": lambda: bpe(words("qwen 2")),
    "added tokens": lambda: bpe(words("gpt-2"), ["<tool>", "  ", "    ", "tis"]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_of_a_thousand_texts(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    _, theirs = exported({"num_layers": 1}, tokenizer, tmp_path)
    different = [
        text for text in texts()
        if theirs.tokenize(text.encode(), add_bos=True, special=False)
        != tokenizer.encode(text).tolist()
    ]  # fmt: skip
    REPORT[f"ids {name}: differ"] = len(different)
    assert not different, ascii(different[:3])


def test_ids_of_ascii_characters_without_an_end(tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer(TEXT)
    _, theirs = exported({"num_layers": 1}, tokenizer, tmp_path)
    refused = 0
    for text in texts():
        ids = theirs.tokenize(text.encode(), add_bos=True, special=False)
        try:
            assert ids == tokenizer.encode(text).tolist()
        except DataError:
            refused += 1
            assert -1 in ids
    assert 0 < refused < 1000
    theirs.reset()
    with pytest.raises(RuntimeError):
        theirs.eval([0, -1])


def test_only_the_end_of_a_document_ends_a_text(tmp_path: Path) -> None:
    import llama_cpp

    for number, (tokenizer, ends) in enumerate(
        [
            (CharacterTokenizer(TEXT), []),
            (ByteTokenizer(), [0xFF]),
            (BpeTokenizer(300, texts=[TEXT]), [0]),
        ]
    ):
        _, theirs = exported({"num_layers": 1}, tokenizer, tmp_path / str(number))
        vocabulary = llama_cpp.llama_model_get_vocab(theirs.model)
        ids = range(tokenizer.vocab_size)
        assert [i for i in ids if llama_cpp.llama_vocab_is_eog(vocabulary, i)] == ends


# ------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_opens_the_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    tokenizer = BpeTokenizer(400, texts=[TEXT])
    # Of the GPT-2 layout it reads no other context length than the default of its own.
    fields = {**TANH, "sequence_length": 1024} if kind == "gpt2" else {"num_kv_heads": 2}
    model, _ = exported(fields, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf"
    )
    ids = torch.randint(tokenizer.vocab_size, (1, 200))
    with torch.no_grad():
        found = (model(ids) - theirs.eval()(ids).logits).abs().max().item()
    REPORT[f"transformers {kind}"] = found
    assert found < BOUND
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    prompt = "What is here, 'tis said?"
    assert read(prompt, add_special_tokens=False).input_ids == tokenizer.encode(prompt).tolist()
