"""The Llama layout: RMSNorm, rotary positions, SwiGLU (Touvron et al. 2023, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from fundamentallm.config.component import Component
from fundamentallm.config.model import TransformerConfig
from fundamentallm.models.layers.normalization import NORMALIZATIONS
from fundamentallm.models.layers.positions import POSITIONS
from fundamentallm.models.layouts.base import (
    LAYOUTS,
    Described,
    Entry,
    Layout,
    option,
)

# Ours -> theirs, inside a block; each has a weight, and a bias where there are any.
_LINEAR = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.input": "mlp.up_proj",
    "feedforward.output": "mlp.down_proj",
}


@LAYOUTS.register("llama")
class LlamaLayout(Layout):
    """`LlamaForCausalLM`: grouped-query attention, biases, tied and untied heads.

    Its rotary pairs are columns i and i + K/2, as ours are, so no column changes place.
    """

    title = "the Llama layout"
    components: ClassVar[Mapping[str, str]] = {
        "normalization": "rmsnorm",
        "positions": "rotary",
        "feedforward": "swiglu",
    }
    derived = ("rotary_emb.inv_freq",)

    def describe(self, config: TransformerConfig) -> dict[str, Any]:
        """Return `config.json`."""
        base = option(POSITIONS, config.positions, "base")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.hidden_width,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            "hidden_act": "silu",
            "max_position_embeddings": config.sequence_length,
            "rms_norm_eps": option(NORMALIZATIONS, config.normalization, "eps"),
            # The first name is read by transformers 4, the second by 5.
            "rope_theta": base,
            "rope_parameters": {"rope_type": "default", "rope_theta": base},
            "attention_bias": config.bias,
            "mlp_bias": config.bias,
            "attention_dropout": config.dropout,
            "tie_word_embeddings": config.tie_embeddings,
        }

    def fields(self, described: Described) -> dict[str, Any]:
        """Return the fields of `TransformerConfig`."""
        described.choice("hidden_act", ["silu"], "silu")
        described.absent("quantization_config")
        bias = described.flag("attention_bias", False)
        described.choice("mlp_bias", [bias], False)  # one switch is all that ours has
        width = described.count("hidden_size")
        heads = described.count("num_attention_heads")
        described.choice("head_dim", [width // heads], width // heads)
        eps = described.number("rms_norm_eps", 1e-6)
        return {
            "vocab_size": described.count("vocab_size"),
            "d_model": width,
            "num_layers": described.count("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": described.count("num_key_value_heads", heads),
            "d_ff": described.count("intermediate_size"),
            "sequence_length": described.count("max_position_embeddings", 2048),
            "normalization": Component(name="rmsnorm", options={"eps": eps}),
            "positions": Component(name="rotary", options={"base": _rotary_base(described)}),
            "feedforward": Component(name="swiglu"),
            "bias": bias,
            "qk_norm": False,
            "tie_embeddings": described.flag("tie_word_embeddings", False),
            "logit_softcap": None,
        }

    def entries(self, config: TransformerConfig) -> Iterator[Entry]:
        """Yield the table of tensors."""
        yield Entry("model.embed_tokens.weight", ("token_embedding.weight",))
        for number in range(config.num_layers):
            ours, theirs = f"blocks.{number}", f"model.layers.{number}"
            yield Entry(f"{theirs}.input_layernorm.weight", (f"{ours}.attention_norm.weight",))
            yield Entry(
                f"{theirs}.post_attention_layernorm.weight", (f"{ours}.feedforward_norm.weight",)
            )
            for name, their_name in _LINEAR.items():
                for kind in ("weight", "bias") if config.bias else ("weight",):
                    yield Entry(f"{theirs}.{their_name}.{kind}", (f"{ours}.{name}.{kind}",))
        yield Entry("model.norm.weight", ("norm.weight",))
        if not config.tie_embeddings:
            yield Entry("lm_head.weight", ("head.weight",))


def _rotary_base(described: Described) -> float:
    """Return the base of plain rotary positions; any scaling or cutting is refused.

    As transformers reads it (`modeling_rope_utils`): `rope_scaling` replaces `rope_parameters`
    unless it is empty, and the older key `type` for `rope_type`. Linear scaling by 1 is ignored.
    """
    described.choice("partial_rotary_factor", [1, 1.0], 1)
    scaling = described.section("rope_scaling")
    rope = scaling if scaling.values else described.section("rope_parameters")
    rope.choice("partial_rotary_factor", [1, 1.0], 1)
    key = "type" if rope.values.get("rope_type") is None else "rope_type"
    if rope.choice(key, ["default", "linear"], "default") == "linear":
        rope.choice("factor", [1, 1.0], None)
    return rope.number("rope_theta", described.number("rope_theta", 10_000.0))
