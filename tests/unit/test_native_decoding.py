"""Steps of generation as native code, against the same model in torch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from fundamentallm.config import TransformerConfig
from fundamentallm.errors import ConfigError, MachineError
from fundamentallm.inference import generate
from fundamentallm.inference.generate import decoder_for
from fundamentallm.models.generation.batch import generate_tokens
from fundamentallm.models.generation.cache import KVCache
from fundamentallm.models.generation.sampling import SamplingRules
from fundamentallm.models.layers.positions import POSITIONS
from fundamentallm.models.native import decoding, library
from fundamentallm.models.native.decoding import NativeDecoder, packed, why_not_decoded
from fundamentallm.models.native.library import find_compiler
from fundamentallm.models.transformer import Transformer

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")

V, T = 37, 24
PROMPTS = [[1, 2, 3], [4], list(range(T)), [5, 6, 7, 8, 9, 1, 2]]
PLAIN = {"d_model": 64, "num_layers": 2, "num_heads": 2, "d_ff": 100}
EXTRAS: list[dict[str, Any]] = [
    {},
    {"bias": True, "qk_norm": True, "logit_softcap": 5.0, "token_shift": True},
    {"embedding_norm": True, "residual_mix": True, "tie_embeddings": False, "num_heads": 1},
]
COMBINATIONS = [
    {"positions": positions, "feedforward": feedforward, "normalization": norm, **extra}
    for positions, feedforward, norm, extra in itertools.product(
        POSITIONS.names(), ("gelu", "swiglu", "relu_squared"), ("rmsnorm", "layernorm"), EXTRAS
    )
]


def lively(**fields: Any) -> Transformer:
    """A model whose weights are large enough that each part decides the logits."""
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=V, sequence_length=T, **{**PLAIN, **fields})
    model = Transformer(config).eval()
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim < 2 else 1.5 * parameter.size(-1) ** -0.5
        parameter.data = scale * torch.randn_like(parameter) + (parameter.ndim < 2)
    return model


def new_cache(model: Transformer, batch: int) -> KVCache:
    cache = model.new_cache(batch, T)
    assert cache is not None
    return cache


def stepped(model: Transformer, decode: Any, rows: int = 5, steps: int = 12) -> Any:
    """Return texts of different beginnings, and the logits of each step, (rows, steps, V)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (rows, T), generator=generator)
    lengths = [(3 * row + 2) % 7 for row in range(rows)]
    with torch.inference_mode():
        cache = new_cache(model, rows)
        begin = max(max(lengths), 1)
        model(ids[:, :begin], cache=cache.fill(list(range(rows)), lengths))
        places = torch.tensor(lengths)
        logits = []
        for step in range(steps):
            logits.append(decode(ids[torch.arange(rows), places + step], cache))
    return ids, lengths, torch.stack(logits, dim=1)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.double() - expected).norm() / expected.norm()).detach())


# Every fifth combination by default, each part in several of them.
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, marks=pytest.mark.long if number % 5 else [])
        for number, fields in enumerate(COMBINATIONS)
    ],
    ids=str,
)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_logits_are_those_of_whole_passes_in_float64(fields: dict[str, Any], kv_heads: int) -> None:
    heads = fields.get("num_heads", 2)
    model = lively(**{**fields, "num_kv_heads": min(kv_heads, heads)})
    ids, lengths, found = stepped(model, NativeDecoder(model))
    exact = model.double()
    for row, length in enumerate(lengths):
        whole = exact(ids[row : row + 1, : length + found.size(1)])[0, length:]
        assert difference(found[row], whole) < 1e-5


@pytest.mark.parametrize("part", ["mix", "value", "head"])
def test_the_check_would_notice_a_wrong_weight(part: str) -> None:
    model = lively(residual_mix=True, tie_embeddings=False)
    ids, lengths, found = stepped(model, NativeDecoder(model))
    with torch.no_grad():
        {
            "mix": model.blocks[1].residual_mix.weights,
            "value": model.blocks[0].attention.value.weight,
            "head": model.head.weight,
        }[part].mul_(1.001)
    whole = model.double()(ids[:1, : lengths[0] + found.size(1)])[0, lengths[0] :]
    assert difference(found[0], whole) > 1e-4


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_a_row_is_what_it_is_with_any_others_and_on_any_number_of_threads(weights: Any) -> None:
    model = lively(feedforward="swiglu", num_kv_heads=1)
    decode = NativeDecoder(model, weights)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        _, _, many = stepped(model, decode, rows=19, steps=3)
        torch.set_num_threads(3)
        _, _, on_three = stepped(model, decode, rows=19, steps=3)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(many, on_three)
    for rows in (1, 2, 3, 4, 7, 8, 16):
        _, _, fewer = stepped(model, decode, rows=rows, steps=1)
        # Keys and values that the model filled in differ with the shape of its products.
        torch.testing.assert_close(fewer[:, 0], many[:rows, 0], rtol=1e-4, atol=1e-5)
    cache = new_cache(model, 19)
    together = decode(torch.arange(19), cache)
    for rows in (1, 2, 3, 4, 7, 8, 16):
        assert torch.equal(decode(torch.arange(rows), new_cache(model, rows)), together[:rows])


@pytest.mark.parametrize("processor", ["x86-64-v3", pytest.param("x86-64", marks=pytest.mark.long)])
def test_code_for_other_processors_computes_the_same(
    processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = library.Path("/proc/cpuinfo").read_text() if library.sys.platform == "linux" else ""
    if "avx2" not in flags:
        pytest.skip("this processor has no AVX2")
    directory = library.default_cache_dir() / "native"
    other = library.build(find_compiler() or "", directory, f"-march={processor}", "fp32", "decode")
    model = lively(feedforward="swiglu")
    expected = {w: stepped(model, NativeDecoder(model, w))[2] for w in decoding.WEIGHT_TYPES}
    monkeypatch.setattr(decoding, "load_decoding", lambda: other)
    for weights, logits in expected.items():
        found = stepped(model, NativeDecoder(model, weights))[2]
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rules", [SamplingRules(temperature=0), SamplingRules(), SamplingRules(top_k=5)]
)
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_texts_are_those_of_the_model_far_past_the_context(
    rules: SamplingRules, positions: str
) -> None:
    model = lively(positions=positions, num_kv_heads=1)

    def texts(**options: Any) -> list[list[int]]:
        tokens = generate_tokens(model, PROMPTS, 3 * T, rules, [1, 2, 3, 4], **options)
        return torch.stack(list(tokens), dim=1).tolist()

    assert texts(decode=NativeDecoder(model)) == texts()


@pytest.mark.parametrize(("weights", "bound"), [("bf16", 2.0**-8), ("int8", 1 / 254)])
def test_weights_are_rounded_and_nothing_else(weights: Any, bound: float) -> None:
    model = lively(bias=True)
    found = NativeDecoder(model, weights)(torch.arange(5), new_cache(model, 5))
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = module.weight.detach()
        rounded = weight.bfloat16().float() if weights == "bf16" else in_eight_bits(weight)
        assert 0 < (rounded - weight).abs().max() <= bound * weight.abs().max()
        module.weight = torch.nn.Parameter(rounded)  # of tied weights the head's only
    expected = NativeDecoder(model)(torch.arange(5), new_cache(model, 5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def in_eight_bits(weight: torch.Tensor) -> torch.Tensor:
    """Return weights as the nearest of 255 multiples of a 127th of the largest of 32."""
    filled = torch.nn.functional.pad(weight, (0, -weight.size(1) % 32)).unflatten(1, (-1, 32))
    scales = filled.abs().amax(-1, keepdim=True) / 127
    return ((filled / scales).nan_to_num().round() * scales).flatten(1)[:, : weight.size(1)]


def test_a_decoder_keeps_the_weights_that_it_was_made_of() -> None:
    model = lively()
    decode = NativeDecoder(model)
    before = decode(torch.tensor([1]), new_cache(model, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(decode(torch.tensor([1]), new_cache(model, 1)), before)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"d_model": 48}, "not a multiple of 32"),
        ({"feedforward": {"name": "gelu", "approximate": "tanh"}}, "tanh"),
    ],
)
def test_models_that_are_not_supported_are_told_and_generate_as_ever(
    fields: dict[str, Any], reason: str
) -> None:
    model = lively(**fields)
    assert reason in why_not_decoded(model)
    assert decoder_for(model) is None
    with pytest.raises(ConfigError, match="int8") as caught:
        decoder_for(model, "int8")
    assert reason in caught.value.got
    with pytest.raises(ConfigError):
        NativeDecoder(model)
    assert "float32" in why_not_decoded(lively().double())
    assert "transformer" in why_not_decoded(torch.nn.Linear(2, 2))


def test_a_few_tokens_and_machines_without_a_compiler_are_left_to_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = lively()
    worth = generate.WORTH_COMPILING // model.num_parameters()
    assert decoder_for(model, "fp32", worth) is None
    assert isinstance(decoder_for(model, "fp32", worth + 1), NativeDecoder)
    assert isinstance(decoder_for(model, "bf16", 1), NativeDecoder)

    def none() -> None:
        raise MachineError("there is no C++ compiler")

    monkeypatch.setattr(decoding, "load_decoding", none)
    assert decoder_for(model) is None
    with pytest.raises(MachineError):
        decoder_for(model, "int8")


def test_packed_weights_take_what_their_type_says() -> None:
    weight = torch.randn(64, 96)
    sizes = {w: packed(weight, w).numel() / weight.numel() for w in decoding.WEIGHT_TYPES}
    assert sizes == {"fp32": 4.0, "bf16": 2.0, "int8": 1.125}


def test_a_build_is_told_and_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compiled(command: list[str]) -> tuple[int, str]:
        Path(command[-1]).touch(mode=0o600)
        return 0, ""

    monkeypatch.setattr(library, "_compile", compiled)
    caplog.set_level("INFO")
    first, again = (library._compiled("/bin/sh", tmp_path, ["-march=x"], "decode") for _ in "12")
    assert first == again
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "building native code (generation) for this processor"
    ]
