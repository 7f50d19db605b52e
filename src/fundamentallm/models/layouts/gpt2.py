"""The GPT-2 layout: LayerNorm, learned positions, GELU (Radford et al. 2019, section 2.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from fundamentallm.config.component import Component
from fundamentallm.config.model import TransformerConfig
from fundamentallm.models.layers.feedforward import FEEDFORWARDS
from fundamentallm.models.layers.normalization import NORMALIZATIONS
from fundamentallm.models.layouts.base import (
    LAYOUTS,
    Described,
    Entry,
    Layout,
    Obstacle,
    option,
)

_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_new"}  # ours -> theirs
_OUR_ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_PREFIX = "transformer."

# Theirs -> ours, inside a block. Theirs are "Conv1D" layers, which keep a matrix as (in, out).
_LINEAR = {
    "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
    "attn.c_proj": ("attention.output",),
    "mlp.c_fc": ("feedforward.input",),
    "mlp.c_proj": ("feedforward.output",),
}
_NORMS = {"ln_1": "attention_norm", "ln_2": "feedforward_norm"}


@LAYOUTS.register("gpt2")
class GPT2Layout(Layout):
    """`GPT2LMHeadModel`: both variants of GELU, tied and untied heads.

    It always has biases; a model without them is written with zeros, which compute the same.
    """

    title = "the GPT-2 layout"
    components: ClassVar[Mapping[str, str]] = {
        "normalization": "layernorm",
        "positions": "learned",
        "feedforward": "gelu",
    }
    always_has_biases = True
    derived = (".attn.bias", ".attn.masked_bias")  # the causal mask

    def obstacles(self, config: TransformerConfig) -> list[Obstacle]:
        """Return what it cannot express; it has as many key as query heads."""
        found = super().obstacles(config)
        if config.kv_heads != config.num_heads:
            found.append(Obstacle("num_kv_heads", str(config.kv_heads), str(config.num_heads)))
        return found

    def describe(self, config: TransformerConfig) -> dict[str, Any]:
        """Return `config.json`."""
        approximate = option(FEEDFORWARDS, config.feedforward, "approximate")
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_positions": config.sequence_length,
            "n_embd": config.d_model,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.hidden_width,
            "activation_function": _ACTIVATIONS[approximate],
            "layer_norm_epsilon": option(NORMALIZATIONS, config.normalization, "eps"),
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "tie_word_embeddings": config.tie_embeddings,
        }

    def fields(self, described: Described) -> dict[str, Any]:
        """Return the fields of `TransformerConfig`."""
        described.absent("quantization_config")
        described.choice("scale_attn_weights", [True], True)
        described.choice("scale_attn_by_inverse_layer_idx", [False], False)
        described.choice("add_cross_attention", [False], False)
        activation = described.choice("activation_function", list(_OUR_ACTIVATIONS), "gelu_new")
        width = described.count("n_embd")
        heads = described.count("n_head")
        return {
            "vocab_size": described.count("vocab_size"),
            "d_model": width,
            "num_layers": described.count("n_layer"),
            "num_heads": heads,
            "num_kv_heads": heads,
            "d_ff": described.count("n_inner", 4 * width),
            "sequence_length": described.count("n_positions"),
            "normalization": Component(
                name="layernorm",
                options={"eps": described.number("layer_norm_epsilon", 1e-5)},
            ),
            "positions": Component(name="learned"),
            "feedforward": Component(
                name="gelu", options={"approximate": _OUR_ACTIVATIONS[activation]}
            ),
            "bias": True,
            "qk_norm": False,
            "tie_embeddings": described.flag("tie_word_embeddings", True),
            "logit_softcap": None,
        }

    def entries(self, config: TransformerConfig) -> Iterator[Entry]:
        """Yield the table of tensors."""
        yield Entry(f"{_PREFIX}wte.weight", ("token_embedding.weight",))
        yield Entry(f"{_PREFIX}wpe.weight", ("positions.table.weight",))
        for number in range(config.num_layers):
            ours, theirs = f"blocks.{number}", f"{_PREFIX}h.{number}"
            for their_name, name in _NORMS.items():
                for kind in ("weight", "bias"):
                    yield Entry(f"{theirs}.{their_name}.{kind}", (f"{ours}.{name}.{kind}",))
            for their_name, names in _LINEAR.items():
                for kind in ("weight", "bias"):
                    yield Entry(
                        f"{theirs}.{their_name}.{kind}",
                        tuple(f"{ours}.{name}.{kind}" for name in names),
                        transposed=kind == "weight",
                    )
        for kind in ("weight", "bias"):
            yield Entry(f"{_PREFIX}ln_f.{kind}", (f"norm.{kind}",))
        if not config.tie_embeddings:
            yield Entry("lm_head.weight", ("head.weight",))

    def canonical(self, name: str) -> str:
        """Return the name with the prefix that the first published files lack."""
        return name if name.startswith((_PREFIX, "lm_head.")) else _PREFIX + name
