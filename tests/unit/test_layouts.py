"""The layouts against forward passes written down here from the files' own conventions.

`tests/integration/test_export_command.py` does the same with the library itself (`-m long`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fundamentallm.config import TransformerConfig
from fundamentallm.errors import ConfigError
from fundamentallm.models.layouts import LAYOUTS, layout_for
from fundamentallm.models.layouts.base import Described
from fundamentallm.models.transformer import Transformer

GPT2 = {"normalization": "layernorm", "positions": "learned", "feedforward": "gelu"}
SIZES = {"vocab_size": 13, "sequence_length": 12, "d_model": 24, "num_layers": 2, "num_heads": 4}


def options(**fields: Any) -> TransformerConfig:
    return TransformerConfig(**{**SIZES, **fields})


LLAMA_CONFIGS = {
    "default": {},
    "grouped": {"num_kv_heads": 2},
    "multi-query": {"num_kv_heads": 1},
    "untied": {"tie_embeddings": False},
    "biased": {"bias": True},
    "eps": {"normalization": {"name": "rmsnorm", "eps": 1e-2}},
    "base": {"positions": {"name": "rotary", "base": 100}},
    "hidden width": {"d_ff": 20},
    "dropout": {"dropout": 0.5},
    "all": {
        "num_kv_heads": 2,
        "tie_embeddings": False,
        "bias": True,
        "normalization": {"name": "rmsnorm", "eps": 1e-3},
        "positions": {"name": "rotary", "base": 500_000.0},
        "d_ff": 16,
    },
}
GPT2_CONFIGS = {
    "default": {},
    "biased": {"bias": True},
    "tanh": {"feedforward": {"name": "gelu", "approximate": "tanh"}},
    "untied": {"tie_embeddings": False},
    "eps": {"normalization": {"name": "layernorm", "eps": 1e-2}, "bias": True},
    "hidden width": {"d_ff": 20},
    "dropout": {"dropout": 0.5},
    "all": {
        "bias": True,
        "tie_embeddings": False,
        "normalization": {"name": "layernorm", "eps": 1e-3},
        "feedforward": {"name": "gelu", "approximate": "tanh"},
        "d_ff": 16,
    },
}
CASES = [("llama", fields) for fields in LLAMA_CONFIGS.values()] + [
    ("gpt2", {**GPT2, **fields}) for fields in GPT2_CONFIGS.values()
]
NAMES = [f"llama {name}" for name in LLAMA_CONFIGS] + [f"gpt2 {name}" for name in GPT2_CONFIGS]
every_case = pytest.mark.parametrize(("kind", "fields"), CASES, ids=NAMES)


def random_model(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A model whose every weight counts: gains are not 1 and biases not 0."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def llama_logits(config: Mapping[str, Any], w: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """The Llama forward pass over one sequence (T,), head by head, in float64."""
    w = {name: tensor.double() for name, tensor in w.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width, time = config["head_dim"], len(ids)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[name]

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    half = width // 2
    rates = config["rope_theta"] ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones(1).double(), torch.arange(time)[:, None].double() * rates)

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[:, :half], x[:, half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    x = w["model.embed_tokens.weight"][ids]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        y = norm(x, f"{layer}.input_layernorm.weight")
        q, k, v = (linear(y, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        outs = []
        for head in range(heads):
            group = head * groups // heads
            own = slice(head * width, (head + 1) * width)
            shared = slice(group * width, (group + 1) * width)
            outs.append(attend(rotate(q[:, own]), rotate(k[:, shared]), v[:, shared]))
        x = x + linear(torch.cat(outs, -1), f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm.weight")
        gate = linear(y, f"{layer}.mlp.gate_proj")
        x = x + linear(
            gate * gate.sigmoid() * linear(y, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj"
        )
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm.weight") @ w[head].T


def gpt2_logits(config: Mapping[str, Any], w: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """The GPT-2 forward pass over one sequence (T,), head by head, in float64."""
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in w.items()}
    width = config["n_embd"] // config["n_head"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + config["layer_norm_epsilon"]).sqrt()
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def act(x: Tensor) -> Tensor:
        if config["activation_function"] == "gelu":
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    for number in range(config["n_layer"]):
        layer = f"h.{number}"
        q, k, v = conv(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").split(config["n_embd"], -1)
        outs = [
            attend(*(part[:, head * width : (head + 1) * width] for part in (q, k, v)))
            for head in range(config["n_head"])
        ]
        x = x + conv(torch.cat(outs, -1), f"{layer}.attn.c_proj")
        y = act(conv(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc"))
        x = x + conv(y, f"{layer}.mlp.c_proj")
    head = "wte.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "ln_f") @ w[head].T


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.T / math.sqrt(query.size(-1))
    past = torch.ones_like(scores).tril().bool()
    return scores.masked_fill(~past, -torch.inf).softmax(-1) @ value


REFERENCES = {"llama": llama_logits, "gpt2": gpt2_logits}


@every_case
def test_their_tensors_compute_our_logits(kind: str, fields: dict[str, Any]) -> None:
    config = options(**fields)
    layout = layout_for(config)
    described = layout.describe(config)
    assert described["model_type"] == kind
    model = random_model(config)
    theirs = layout.to_theirs(config, model.state_dict())
    ids = torch.randint(13, (12,))
    with torch.no_grad():
        expected = REFERENCES[kind](described, theirs, ids)
        torch.testing.assert_close(model(ids[None])[0].double(), expected, atol=1e-5, rtol=1e-5)


@every_case
def test_there_and_back_is_the_identity(kind: str, fields: dict[str, Any]) -> None:
    config = options(**fields)
    layout = layout_for(config)
    state = random_model(config).state_dict()
    back = layout.to_ours(config, layout.to_theirs(config, state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert layout.shapes(config) == {
        name: tensor.shape for name, tensor in layout.to_theirs(config, state).items()
    }


@every_case
def test_config_json_says_what_the_model_is(kind: str, fields: dict[str, Any]) -> None:
    config = options(**fields)
    layout = layout_for(config)
    read = layout.fields(Described(layout.describe(config), "config.json"))
    again = TransformerConfig(**read)
    model = random_model(config)
    # Its dropout is a choice for training, and GPT-2's layout knows no model without biases.
    torch.manual_seed(0)
    other = Transformer(again).eval()
    state = model.state_dict()
    other.load_state_dict(_with_zero_biases(state, other))
    ids = torch.randint(13, (3, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), other(ids), atol=1e-6, rtol=1e-6)


def _with_zero_biases(state: Mapping[str, Tensor], model: Transformer) -> dict[str, Tensor]:
    own = model.state_dict()
    assert all(name in state or name.endswith(".bias") for name in own)
    return {name: state.get(name, torch.zeros_like(own[name])) for name in own}


def test_no_random_number_is_drawn() -> None:
    config = options(**GPT2)
    state = Transformer(config).state_dict()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    LAYOUTS.build("gpt2").to_theirs(config, state)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- what no layout can express


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"embedding_norm": True}, "embedding_norm"),
        ({"token_shift": True}, "token_shift"),
        ({"residual_mix": True}, "residual_mix"),
        ({"logit_softcap": 30.0}, "logit_softcap"),
        ({"positions": "sinusoidal"}, "positions"),
        ({"positions": "learned"}, "positions"),
        ({"normalization": "layernorm"}, "normalization"),
        ({"feedforward": "relu_squared"}, "feedforward"),
        ({"feedforward": "gelu"}, "feedforward"),
        ({**GPT2, "qk_norm": True}, "qk_norm"),
        ({**GPT2, "logit_softcap": 1.0}, "logit_softcap"),
        ({**GPT2, "adapter": "low_rank"}, "adapter"),
        ({**GPT2, "num_kv_heads": 2}, "num_kv_heads"),
        ({**GPT2, "positions": "rotary"}, "positions"),
        ({**GPT2, "positions": "sinusoidal"}, "positions"),
        ({**GPT2, "normalization": "rmsnorm"}, "normalization"),
        ({**GPT2, "feedforward": "swiglu"}, "feedforward"),
        ({**GPT2, "feedforward": "relu_squared"}, "feedforward"),
    ],
)
def test_a_choice_that_no_layout_has_is_refused_by_name(fields: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layout_for(options(**fields))
    assert caught.value.key == f"model.{key}"
    assert f"model.{key}" in caught.value.expected
    assert "--format torch" in caught.value.fix


def test_no_option_of_the_model_was_forgotten() -> None:
    expressed = {"vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff"}
    expressed |= {"sequence_length", "normalization", "positions", "feedforward", "bias"}
    expressed |= {"tie_embeddings", "dropout"}
    refused = {"qk_norm", "logit_softcap", "embedding_norm", "token_shift", "residual_mix"}
    refused |= {"family", "adapter"}
    of_the_beginning_alone = {"init_from", "zero_init", "size"}
    known = expressed | refused | of_the_beginning_alone
    assert set(TransformerConfig.model_fields) == known


def test_every_obstacle_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        layout_for(options(qk_norm=True, logit_softcap=2.0, feedforward="gelu"))
    for name in ("feedforward gelu", "qk_norm true", "logit_softcap 2"):
        assert f"model.{name}" in caught.value.got


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("llama", {"rope_parameters": {"type": "linear", "factor": 4.0}}),
        ("llama", {"rope_parameters": {"type": "llama3"}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": None}}),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("llama", {"rope_scaling": {"type": "dynamic"}}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2}}),
        ("llama", {"rope_scaling": ["linear"]}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"head_dim": 16}),
        ("llama", {"hidden_size": None}),
        ("llama", {"hidden_size": "24"}),
        ("llama", {"num_hidden_layers": 0}),
        ("llama", {"num_hidden_layers": True}),
        ("llama", {"rms_norm_eps": 0}),
        ("llama", {"tie_word_embeddings": 1}),
        ("llama", {"quantization_config": {"bits": 4}}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"quantization_config": {"bits": 4}}),
    ],
)
def test_a_config_json_that_cannot_be_built_is_refused_by_its_key(
    kind: str, change: dict[str, Any]
) -> None:
    config = options(**(GPT2 if kind == "gpt2" else {}))
    values = {**layout_for(config).describe(config), **change}
    with pytest.raises(ConfigError) as caught:
        LAYOUTS.build(kind).fields(Described(values, "folder/config.json"))
    key, value = next(iter(change.items()))
    named = [f"{key}.{inside}" for inside in value] if isinstance(value, dict) else [key]
    if "quantization" in key:
        named = [key]
    assert caught.value.what.rpartition("cannot be built here: ")[2] in named
    assert caught.value.where == "folder/config.json"


@pytest.mark.parametrize(
    ("change", "base"),
    [
        ({"rope_scaling": {}}, 10_000.0),
        ({"rope_scaling": None}, 10_000.0),
        ({"rope_scaling": {"rope_type": "default"}}, 10_000.0),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, 10_000.0),
        ({"rope_scaling": {"type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1, "rope_theta": 2e4}}, 2e4),
    ],
)
def test_what_scales_no_positions_is_accepted(change: dict[str, Any], base: float) -> None:
    config = options()
    values = {**layout_for(config).describe(config), **change}
    fields = LAYOUTS.build("llama").fields(Described(values, ""))
    assert fields["positions"].options == {"base": base}


def test_keys_that_old_files_leave_out_have_their_defaults() -> None:
    llama = {
        "vocab_size": 13,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    fields = LAYOUTS.build("llama").fields(Described(llama, ""))
    assert (fields["num_kv_heads"], fields["sequence_length"], fields["bias"]) == (4, 2048, False)
    assert fields["normalization"].options == {"eps": 1e-6}
    assert fields["tie_embeddings"] is False
    gpt2 = {"vocab_size": 13, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 12}
    fields = LAYOUTS.build("gpt2").fields(Described(gpt2, ""))
    assert (fields["d_ff"], fields["tie_embeddings"], fields["bias"]) == (96, True, True)
    assert fields["feedforward"].options == {"approximate": "tanh"}
