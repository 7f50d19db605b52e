"""Families of models and adapters: one place builds, and what is missing is said by name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fundamentallm.config import (
    Component,
    FamilyConfig,
    RunConfig,
    TransformerConfig,
    config_differences,
    load_config,
)
from fundamentallm.config.yaml.difference import with_defaults
from fundamentallm.engine.wiring.abilities import check_abilities
from fundamentallm.engine.wiring.assemble import check_names
from fundamentallm.errors import ConfigError
from fundamentallm.models.build import (
    build_model,
    check_model,
    estimate_model,
    follows_weight_type,
)
from fundamentallm.models.estimate import estimate
from fundamentallm.models.families import ADAPTERS, MODELS
from fundamentallm.models.layouts import require_transformer
from fundamentallm.models.native.block import why_not
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.losses import LOSSES

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "fundamentallm"
TINY = TransformerConfig(vocab_size=11, sequence_length=8, d_model=16, num_layers=2, num_heads=2)


@MODELS.register("test_bigram")
class Bigram(nn.Module):
    """Logits from a token by way of one vector."""

    def __init__(self, vocab_size: int, width: int = 4, *, scale: float = 1.0) -> None:
        super().__init__()
        if width > 1000:
            raise ValueError(f"width must be at most 1000, got {width}")
        self.scale = scale
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.scale * self.head(self.embedding(input_ids))


@MODELS.register("test_reader")
class Reader(Bigram):
    """Reads the value of a tensor, which the meta device has not."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.norm = self.embedding.weight.norm().item()


@ADAPTERS.register("test_forgetful")
def forgetful(model: nn.Module) -> None:
    """Return nothing."""


@ADAPTERS.register("test_head_only")
def head_only(model: nn.Module, *, scale: float = 1.0) -> nn.Module:
    """Freeze all but the head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("head.")
    model.head.weight.data *= scale
    return model


@ADAPTERS.register("test_frozen")
def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def config_of(model: str) -> RunConfig:
    """Return a run with a model of `key: value` lines that semicolons part."""
    return RunConfig.from_yaml("\n  ".join(["model:", *model.split("; ")]))


def refusal(model: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_names(config_of(model))
    return caught.value


class TestNaming:
    def test_an_unknown_family_is_answered_with_line_and_hint(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("name: x\nmodel:\n  width: 3\n  family: test_bigrm\n")
        with pytest.raises(ConfigError) as caught:
            check_names(RunConfig.from_yaml(path))
        assert caught.value.where == f"{path}:4: model.family"
        assert caught.value.what == "unknown model family 'test_bigrm'"
        assert "transformer" in caught.value.expected
        assert caught.value.fix == "did you mean 'test_bigram'?"

    @pytest.mark.parametrize(
        ("model", "where", "what", "fix"),
        [
            ("family: test_bigram; widht: 3", 3, "has no option 'widht'", "did you mean 'width'?"),
            ("family: test_bigram; width: x", 3, "option 'width' of", ""),
            ("family: test_bigram; width: 2000", 1, "width must be at most 1000", ""),
            ("family: test_bigram; adapter: test_head_onl", 3, "unknown adapter", "test_head_only"),
            ("adapter: {name: test_head_only, scale: x}", 2, "option 'scale' of", ""),
            ("adapter: {name: test_head_only, sclae: 1}", 2, "no option 'sclae'", "'scale'"),
        ],
    )
    def test_options_are_checked_against_the_signature(self, model, where, what, fix):
        error = refusal(model)
        assert error.where.startswith(f"YAML text:{where}: model")
        assert what in error.what
        assert fix in error.fix

    def test_options_of_an_adapter_are_named_by_their_key(self):
        error = refusal("adapter: {name: test_head_only, scale: x}")
        assert error.key == "model.adapter.scale"

    def test_a_supplied_size_is_no_option_of_the_signature_but_a_field(self):
        config = config_of("family: test_bigram; vocab_size: 20")
        assert config.model.vocab_size == 20
        assert config.model.options == {}

    def test_the_transformer_may_be_named(self):
        named, silent = config_of("family: transformer; d_model: 64"), config_of("d_model: 64")
        assert named == silent
        assert named.model_dump(mode="json") == silent.model_dump(mode="json")

    def test_an_override_goes_into_an_adapter_and_keeps_its_name(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("model: {adapter: test_head_only}\n")
        adapter = load_config(path, ["model.adapter.scale=2.0"]).model.adapter
        assert adapter == Component(name="test_head_only", options={"scale": 2.0})
        path.write_text("name: x\n")
        with pytest.raises(ConfigError, match="a component needs a name"):
            load_config(path, ["model.adapter.scale=2.0"])

    def test_a_key_near_family_is_hinted_at(self):
        with pytest.raises(ConfigError, match="did you mean 'family'"):
            config_of("famly: test_bigram")


class TestStoredConfigurations:
    def test_the_default_family_is_never_written(self):
        for plain in (TINY.to_dict(), TINY.model_dump(mode="json")):
            assert not plain.keys() & {"family", "adapter"}

    @pytest.mark.parametrize(
        "model",
        ["d_model: 64", "family: test_bigram; width: 8", "adapter: {name: test_head_only}"],
    )
    def test_what_is_stored_is_read_back_and_does_not_drift(self, model):
        config = config_of(model)
        stored = config.model_dump(mode="json")
        assert type(RunConfig.model_validate(stored).model) is type(config.model)
        assert RunConfig.model_validate(stored).model == config.model
        assert RunConfig.from_yaml(config.to_yaml()) == config
        assert config_differences(with_defaults(stored, RunConfig), stored) == []

    def test_fields_that_came_later_are_completed_for_the_transformer_alone(self):
        transformer = with_defaults({"model": {"d_model": 64}}, RunConfig)["model"]
        bigram = with_defaults({"model": {"family": "test_bigram"}}, RunConfig)["model"]
        assert transformer["num_layers"] == 4
        assert bigram == {"family": "test_bigram"}

    def test_a_changed_adapter_is_another_run(self):
        plain, adapted = config_of("d_model: 64"), config_of("d_model: 64; adapter: test_head_only")
        differing = config_differences(
            plain.model_dump(mode="json"), adapted.model_dump(mode="json")
        )
        assert [key for key, *_ in differing] == ["model.adapter"]


class TestBuilding:
    def test_a_family_gets_the_sizes_and_its_options(self):
        model = build_model(
            FamilyConfig(family="test_bigram", vocab_size=7, sequence_length=3, width=2)
        )
        assert isinstance(model, Bigram)
        assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 7)

    def test_a_missing_size_is_an_error(self):
        with pytest.raises(ConfigError, match="needs a vocab_size"):
            build_model(FamilyConfig(family="test_bigram"))

    def test_the_default_family_has_the_weights_of_the_class(self):
        torch.manual_seed(3)
        expected = Transformer(TINY).state_dict()
        torch.manual_seed(3)
        built = build_model(TINY).state_dict()
        assert all(torch.equal(built[name], weight) for name, weight in expected.items())

    def test_an_adapter_changes_the_model_after_its_weights_were_loaded(self):
        adapter = {"name": "test_head_only", "scale": 3.0}
        config = TransformerConfig(
            **{**TINY.to_dict(), "tie_embeddings": False, "adapter": adapter}
        )

        def ones(model: nn.Module) -> None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(1.0)

        model = build_model(config, ones)
        assert torch.equal(model.head.weight, torch.full((11, 16), 3.0))
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head.weight"]

    def test_an_adapter_that_freezes_everything_is_refused(self):
        config = TransformerConfig(**{**TINY.to_dict(), "adapter": "test_frozen"})
        with pytest.raises(ConfigError, match="leaves no parameter to train") as caught:
            build_model(config)
        assert caught.value.key == "adapter"

    def test_an_adapter_that_forgets_to_return_the_model_is_told(self):
        config = TransformerConfig(**{**TINY.to_dict(), "adapter": "test_forgetful"})
        with pytest.raises(ConfigError, match="returned no model") as caught:
            build_model(config)
        assert caught.value.key == "adapter"

    def test_a_family_that_reads_values_in_its_constructor_is_told(self):
        with pytest.raises(ConfigError, match="cannot be built on the meta device") as caught:
            check_model(FamilyConfig(family="test_reader"))
        assert caught.value.key == "family"
        assert "torch.nn.init" in caught.value.fix

    def test_checking_draws_no_random_number(self):
        before = torch.get_rng_state()
        check_model(FamilyConfig(family="test_bigram"))
        assert torch.equal(torch.get_rng_state(), before)


class TestWhatAFamilyMayLack:
    @pytest.mark.parametrize(
        ("section", "key"),
        [
            ("data: {packing: document}", "data.packing"),
            ("training: {loss: chunked_cross_entropy}", "training.loss"),
            ("training: {gradient_checkpointing: true}", "training.gradient_checkpointing"),
        ],
    )
    def test_a_setting_that_needs_it_is_refused_with_its_line(self, section, key):
        config = RunConfig.from_yaml(f"model: {{family: test_bigram}}\n{section}\n")
        loss = LOSSES.build(config.training.loss.name)
        with pytest.raises(ConfigError) as caught:
            check_abilities(config, Bigram(5), loss)
        assert caught.value.where == f"YAML text:2: {key}"
        assert caught.value.got == "model.family test_bigram"
        check_abilities(config, Transformer(TINY), loss)

    def test_a_family_without_an_estimate_is_counted(self):
        config = FamilyConfig(family="test_bigram", vocab_size=10, sequence_length=6, width=3)
        cost = estimate_model(config, batch_size=2, optimizer_states=2)
        parameters = 10 * 3 + 3 * 10 + 10
        assert cost.parameters == parameters
        assert cost.non_embedding_parameters == parameters - 30
        assert cost.flops_per_token == 6 * parameters
        assert (cost.weight_bytes, cost.gradient_bytes) == (4 * parameters, 4 * parameters)
        assert cost.optimizer_bytes == 8 * parameters
        assert cost.activation_bytes == 3 * 4 * 2 * 6 * 10

    def test_the_transformers_estimate_is_its_own(self):
        assert estimate_model(TINY, batch_size=2, optimizer_states=1) == estimate(
            TINY, batch_size=2, optimizer_states=1
        )

    def test_frozen_parameters_cost_no_gradient(self):
        adapted = TransformerConfig(
            **{**TINY.to_dict(), "tie_embeddings": False, "adapter": "test_head_only"}
        )
        plain = adapted.model_copy(update={"adapter": None})
        cost = estimate_model(adapted, batch_size=2, optimizer_states=2)
        base = estimate(plain, batch_size=2)
        assert (cost.parameters, cost.weight_bytes) == (base.parameters, base.weight_bytes)
        assert cost.flops_per_token == base.flops_per_token
        assert (cost.gradient_bytes, cost.optimizer_bytes) == (4 * 11 * 16, 8 * 11 * 16)

    def test_what_is_unknown_of_a_family_is_not_assumed(self):
        config = FamilyConfig(family="test_bigram", vocab_size=7)
        adapted = TransformerConfig(**{**TINY.to_dict(), "adapter": "test_head_only"})
        assert follows_weight_type(TINY)
        assert not follows_weight_type(config)
        assert not follows_weight_type(adapted)
        assert "family test_bigram" in why_not(config, torch.device("cpu"))

    def test_native_blocks_are_not_for_an_adapted_model(self):
        fields: dict[str, Any] = {"d_model": 128, "num_heads": 4, "sequence_length": 64}
        plain = TransformerConfig(**fields)
        assert why_not(plain, torch.device("cpu")) == ""
        adapted = TransformerConfig(**fields, adapter="test_head_only")
        assert "adapter test_head_only" in why_not(adapted, torch.device("cpu"))

    def test_export_names_the_family(self):
        assert require_transformer(TINY) is TINY
        with pytest.raises(ConfigError) as caught:
            require_transformer(FamilyConfig(family="test_bigram"))
        assert (caught.value.key, caught.value.got) == ("model.family", "test_bigram")


@pytest.mark.long  # a start of Python
def test_the_default_family_is_known_wherever_models_are_built():
    code = "from fundamentallm.models.build import MODELS; print(MODELS.names())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['transformer']"


def names_the_class(path: Path) -> bool:
    """Whether a file calls the class Transformer."""
    return any(
        isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Transformer"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )


def test_every_door_builds_through_the_registry():
    """Only the fakes for users' tests, which promise a Transformer, call the class."""
    callers = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert {name for name in callers if names_the_class(PACKAGE / name)} == {"testing.py"}
