from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.properties import examples

from fundamentallm.config import (
    RESUME_MAY_DIFFER,
    BaseConfig,
    Component,
    DataConfig,
    RunConfig,
    TrainingConfig,
    TransformerConfig,
    config_differences,
    load_config,
    may_differ_on_resume,
    resolve_warmup,
)
from fundamentallm.config.yaml.difference import ABSENT, value_in_words, with_defaults
from fundamentallm.errors import ConfigError, MachineError
from fundamentallm.registry import Registry

SECTIONS = [RunConfig, DataConfig, TransformerConfig, TrainingConfig]


def fault(text: str, config: type[BaseConfig] = RunConfig) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.from_yaml(textwrap.dedent(text))
    return caught.value


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "train.yaml"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write_file


class TestDefaults:
    def test_training(self):
        config = TrainingConfig()
        assert config.to_dict() == {
            "learning_rate": 1e-4,
            "optimizer": "adamw",
            "optimizer_eps": 1e-8,
            "optimizer_weight_decay": 0.01,
            "scheduler": "linear_warmup",
            "min_learning_rate": 0.0,
            "loss": "cross_entropy",
            "max_grad_norm": 1.0,
            "max_grad_value": None,
            "accumulation_steps": 1,
            "gradient_checkpointing": False,
            "mixed_precision": False,
            "precision": "fp32",
            "eval_epochs": True,
            "bf16_weights": "auto",
            "attention": "auto",
            "compile": False,
            "threads": None,
            "deterministic": False,
            "num_epochs": 3,
            "total_steps": None,
            "max_tokens": None,
            "max_seconds": None,
            "stop_after_seconds": None,
            "eval_steps": 100,
            "log_steps": 10,
            "checkpoint_steps": None,
            "checkpoint_dir": "./checkpoints",
            "keep_last": 3,
            "device": "cpu",
            "seed": 42,
        }
        assert config.warmup_steps == 500

    def test_model(self):
        assert TransformerConfig().to_dict() == {
            "init_from": None,
            "vocab_size": None,
            "d_model": 128,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": None,
            "d_ff": None,
            "sequence_length": None,
            "normalization": "rmsnorm",
            "positions": "rotary",
            "feedforward": "swiglu",
            "dropout": 0.0,
            "bias": False,
            "qk_norm": False,
            "tie_embeddings": True,
            "logit_softcap": None,
            "embedding_norm": False,
            "token_shift": False,
            "residual_mix": False,
            "zero_init": False,
        }

    def test_data(self):
        assert DataConfig().to_dict() == {
            "source": "python-docs",
            "response_end": "\n",
            "tokenizer": "character",
            "sequence_length": 128,
            "batch_size": 16,
            "global_batch": None,
            "packing": "continuous",
            "split": [0.9, 0.1, 0.0],
            "seed": 42,
        }

    def test_run(self):
        config = RunConfig()
        assert (config.name, config.seed, config.handlers, config.plugins) == ("run", 42, {}, [])
        assert config.model.sequence_length == config.data.sequence_length == 128

    @pytest.mark.parametrize("config", SECTIONS)
    def test_every_field_says_what_it_is(self, config):
        for name, field in config.model_fields.items():
            assert field.description, f"{config.__name__}.{name} has no docstring"

    def test_no_torch(self):
        code = "import sys, fundamentallm.config; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestStrictness:
    @pytest.mark.parametrize("config", SECTIONS)
    @pytest.mark.parametrize("wrong", [True, "3", "1e-4", math.nan, math.inf, -math.inf, -1])
    def test_no_number_takes_anything_but_a_number_in_range(self, config, wrong):
        numbers = [
            name
            for name, schema in config.model_json_schema()["properties"].items()
            if {"integer", "number"} & {part.get("type") for part in schema.get("anyOf", [schema])}
        ]
        assert numbers
        for name in numbers:
            with pytest.raises(ValidationError) as caught:
                config(**{name: wrong})
            assert [error["loc"] for error in caught.value.errors()] == [(name,)]

    @pytest.mark.parametrize("wrong", [0, 1, "true", "yes", None])
    def test_no_switch_takes_anything_but_true_and_false(self, wrong):
        for config, name in [
            (TransformerConfig, "bias"),
            (TrainingConfig, "mixed_precision"),
            (TrainingConfig, "compile"),
        ]:
            with pytest.raises(ValidationError):
                config(**{name: wrong})

    @pytest.mark.parametrize(
        ("config", "name", "value"),
        [
            (TrainingConfig, "learning_rate", 0),
            (TrainingConfig, "max_grad_norm", 0),
            (TrainingConfig, "max_seconds", 0),
            (TrainingConfig, "optimizer_eps", 0),
            (TrainingConfig, "eval_steps", 0),
            (TrainingConfig, "accumulation_steps", 0),
            (TrainingConfig, "total_steps", 0),
            (TrainingConfig, "num_epochs", 10**16),
            (TrainingConfig, "num_epochs", 2.0),
            (TrainingConfig, "learning_rate", 10**400),
            (TrainingConfig, "keep_last", 1),
            (TrainingConfig, "seed", 2**32),
            (TrainingConfig, "device", ""),
            (TransformerConfig, "dropout", 1.0),
            (TransformerConfig, "d_model", 10**400),
            (DataConfig, "batch_size", 0),
            (DataConfig, "source", []),
            (DataConfig, "source", ""),
            (DataConfig, "source", [""]),
        ],
    )
    def test_out_of_range(self, config, name, value):
        with pytest.raises(ValidationError):
            config(**{name: value})

    def test_an_integer_stands_for_a_number(self):
        config = TrainingConfig(learning_rate=1)
        assert config.learning_rate == 1.0
        assert isinstance(config.learning_rate, float)

    def test_unknown_arguments_and_assignments_are_refused(self):
        with pytest.raises(ValidationError):
            TrainingConfig(lerning_rate=1e-4)
        with pytest.raises(ValidationError):
            TrainingConfig().learning_rate = 1.0

    def test_gradient_clipping_can_be_switched_off(self):
        assert TrainingConfig.from_yaml("max_grad_norm: null").max_grad_norm is None


class TestMessages:
    """What a person reads: where, what, got, expected, and how to mend it."""

    def test_a_typo_in_full(self, write):
        path = write(
            """
            name: x
            training:
              num_epochs: 1
              lerning_rate: 1e-4
            """
        )
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value) == (
            f"{path}:5: training.lerning_rate: unknown key 'lerning_rate'\n"
            "  fix:      did you mean 'learning_rate'?"
        )
        assert caught.value.exit_code == 2
        assert caught.value.key == "training.lerning_rate"

    def test_a_value_in_full(self):
        assert str(fault("training:\n  learning_rate: -3e-4\n")) == (
            "YAML text:2: training.learning_rate: out of range\n"
            "  got:      -0.0003\n"
            "  expected: a number above 0"
        )

    @pytest.mark.parametrize(
        ("text", "fix"),
        [
            ("training: {d_model: 64}", "this key belongs under model:"),
            ("batch_size: 64", "this key belongs under data:"),
            ("training: {plugins: []}", "this key belongs at the top level"),
            ("training: {d_modle: 64}", "did you mean 'd_model' under model:?"),
            ("modle: {}", "did you mean 'model'?"),
            ("training: {zzz: 1}", "remove it, or choose one of these"),
            ("_target_: os.system", "remove it, or choose one of these"),
        ],
    )
    def test_unknown_keys(self, text, fix):
        error = fault(text)
        assert "unknown key" in error.what
        assert error.fix == fix
        assert error.where.startswith("YAML text:1: ")

    def test_an_unknown_key_with_no_near_one_lists_the_known(self):
        assert fault("zzz: 1").expected == "one of " + ", ".join(RunConfig.model_fields)

    @pytest.mark.parametrize(
        ("text", "what", "expected", "fix"),
        [
            ("model: {bias: yes}", "wrong type: text", "true or false", "write true"),
            ("model: {bias: Off}", "wrong type: text", "true or false", "write false"),
            ("model: {bias: 1}", "wrong type: an integer", "true or false", "write true"),
            ("seed: '7'", "wrong type: text", "an integer from 0 to 4,294,967,295", "write 7"),
            ("model: {d_ff: 1_000}", "wrong type: text", None, "write 1000"),
            ("model: {d_ff: 0o17}", "wrong type: text", None, "write 15"),
            ("model: {d_ff: 017}", "wrong type: text", None, "write 17"),
            ("model: {d_ff: 1e5}", "wrong type: a number", None, "write 100000"),
            ("model: {d_ff: 1.5}", "wrong type: a number", None, ""),
            ("model: {d_ff: true}", "wrong type: true or false", None, "true and false are no"),
            ("training: {learning_rate: nan}", "wrong type: text", "a number above 0", ""),
            ("training: {learning_rate: .nan}", "number is not finite", "a number above 0", ""),
            ("training: {learning_rate: -.inf}", "number is not finite", "a number above 0", ""),
            ("training: {learning_rate: 1e400}", "number is not finite", "a number above 0", ""),
            ("training: {learning_rate: '1" + "0" * 400 + "'}", "wrong type: text", None, ""),
            ("training: {learning_rate: 1" + "0" * 400 + "}", "out of range", None, ""),
            ("training: {max_grad_norm: 0}", "out of range", "a number above 0 or null", ""),
            (
                "training: {learning_rate: }",
                "key has no value",
                "a number above 0",
                "write a value",
            ),
            ("training: {learning_rate: [1]}", "wrong type: a list", "a number above 0", ""),
            ("training: {precision: bf17}", "unknown value", "one of fp32, bf16", "'bf16'?"),
            ("training: {compile: on}", "wrong type: text", "one of auto, native", "write true"),
            ("training: {device: 3}", "wrong type: an integer", "text", 'put it in quotes: "3"'),
            (
                "training: {keep_last: 1}",
                "one checkpoint is not safe",
                "from 2",
                "set keep_last to 2",
            ),
            ("training: 3", "wrong type: an integer", "a mapping of keys", ""),
            ("data: {source: }", "key has no value", "text or a list of text", "write a value"),
            ("data: {source: []}", "the value is empty", "text or a list of text", ""),
            ("data: {source: [a, 3]}", "wrong type", "text or a list of text", ""),
            ("data: {split: [0.9, x, 0]}", "wrong type: text", "a number from 0", ""),
            ("data: {split: 0.9}", "the split is invalid", "three fractions", ""),
            ("data: {split: [0.5, 0.5]}", "the split is invalid", "three fractions", ""),
            ("data: {split: [0.5, 0.6, 0]}", "sum to 1.1", "three fractions", ""),
            ("data: {split: [0, 1, 0]}", "training fraction is 0", "three fractions", ""),
            ("plugins: a.b", "wrong type: text", "a list of text", "write a list: [a.b]"),
            ("plugins: [a, b/c.py]", "not a module name", "a dotted name", "without .py"),
            ("handlers: {progress: 3}", "wrong type: an integer", "or a mapping of keys", ""),
            ("handlers: {samples: {every: .nan}}", "number is not finite", None, ""),
            ("name: ../up", "cannot be a directory name", None, "--run-dir"),
            ("name: ''", "cannot be a directory name", None, "choose a name"),
            ("training: {optimizer: 3}", "chosen by its name", "a name, or {name", ""),
            ("training: {optimizer: {betas: []}}", "needs a name", "a name, or", "add name: ..."),
            ("training: {optimizer: {nam: sgd}}", "needs a name", None, "in place of nam:"),
            ("training: {optimizer: {name: 3}}", "chosen by its name", "text", '"3"'),
            ("training: {optimizer: {name: a, b: .inf}}", "number is not finite", None, ""),
        ],
    )
    def test_values(self, text, what, expected, fix):
        error = fault(text)
        assert what in error.what
        assert (expected or "") in error.expected
        assert fix in error.fix if fix else not error.fix

    def test_the_topmost_fault_comes_first_and_others_are_mentioned(self):
        error = fault(
            """\
            training:
              eval_steps: 0
              num_epochs: 0
              learning_rate: 0
            model:
              d_ff: 0
            zzz: 0
            """
        )
        assert error.where == "YAML text:2: training.eval_steps"
        assert error.fix == (
            "then see YAML text:3: training.num_epochs; YAML text:4: training.learning_rate; "
            "YAML text:6: model.d_ff; 1 more"
        )

    @pytest.mark.parametrize(
        ("text", "where"),
        [
            ("handlers:\n  a: true\n  b:\n    every: .nan\n", "YAML text:4: handlers.b.every"),
            ("plugins:\n  - a\n  - b c\n", "YAML text:3: plugins[1]"),
            ("training:\n  loss:\n    name: x\n    a:\n      - .inf\n", "YAML text:4: "),
            ("data:\n  split:\n  - 1\n  - -1\n  - 1\n", "YAML text:4: data.split[1]"),
            ("model:\n  d_model: 100\n  num_heads: 3\n", "YAML text:3: model.num_heads"),
            ("model:\n  d_model: 129\n", "YAML text:1: model.num_heads"),
        ],
    )
    def test_places(self, text, where):
        assert fault(text).where.startswith(where)

    def test_control_characters_do_not_reach_the_terminal(self):
        message = str(fault('"\\e[31mred\\nline": "\\e]0;title\\a"'))
        assert "\x1b" not in message
        assert "\x07" not in message
        assert "\\x1b[31mred\\nline" in message

    def test_a_section_alone(self):
        error = fault("lerning_rate: 1", TrainingConfig)
        assert error.where == "YAML text:1: lerning_rate"
        assert error.fix == "did you mean 'learning_rate'?"


class TestCrossField:
    def test_heads(self):
        error = fault("model: {d_model: 100, num_heads: 3}")
        assert error.what == "d_model 100 is not divisible by num_heads 3"
        # 99 would have heads of 33, an odd width, which rotary positions refuse.
        assert error.fix == "set num_heads to 2, or d_model to 96 or 102"
        for width in (96, 102):
            TransformerConfig(d_model=width, num_heads=3)
        error = fault("model: {d_model: 100, num_heads: 3, positions: learned}")
        assert error.fix == "set num_heads to 2, or d_model to 99 or 102"

    @given(st.integers(1, 400), st.integers(1, 60))
    def test_suggested_heads_and_widths_are_valid(self, width, heads):
        try:
            TransformerConfig(d_model=width, num_heads=heads, positions="learned")
        except ValidationError as caught:
            assert width % heads
            near_heads, *near_widths = (
                int(word)
                for word in caught.errors()[0]["ctx"]["fix"].replace(",", "").split()
                if word.isdigit()
            )
            TransformerConfig(d_model=width, num_heads=near_heads, positions="learned")
            for near_width in near_widths:
                TransformerConfig(d_model=near_width, num_heads=heads, positions="learned")
        else:
            assert width % heads == 0

    def test_huge_widths_are_judged_at_once(self):
        error = fault("model: {d_model: 999999999999989, num_heads: 500000000000000}")
        assert "set num_heads to 1," in error.fix

    def test_key_and_value_heads(self):
        error = fault("model: {num_heads: 6, d_model: 96, num_kv_heads: 4}")
        assert error.what == "num_heads 6 is not divisible by num_kv_heads 4"
        assert error.fix == "set num_kv_heads to 3"
        assert TransformerConfig(num_heads=4, num_kv_heads=2).kv_heads == 2
        assert TransformerConfig(num_heads=4).kv_heads == 4

    def test_rotary_needs_pairs(self):
        error = fault("model: {d_model: 12, num_heads: 4}")
        assert "12" in error.what
        assert error.fix == "set d_model to 16, or positions to learned"
        assert TransformerConfig(d_model=12, num_heads=4, positions="learned").head_width == 3
        assert TransformerConfig(d_model=16, num_heads=4).head_width == 4

    @pytest.mark.parametrize(("width", "hidden"), [(96, 256), (100, 272), (128, 344), (3, 8)])
    def test_the_hidden_width_of_swiglu(self, width, hidden):
        config = TransformerConfig(d_model=width, num_heads=1, positions="learned")
        assert config.hidden_width == hidden
        assert hidden % 8 == 0
        assert 0 <= hidden - 8 / 3 * width < 8

    def test_the_hidden_width_otherwise(self):
        assert TransformerConfig(feedforward="gelu").hidden_width == 512
        assert TransformerConfig(d_ff=100).hidden_width == 100

    def test_learning_rates(self):
        error = fault("training: {learning_rate: 1e-3, min_learning_rate: 2e-3}")
        assert error.what == "min_learning_rate 0.002 is above learning_rate 0.001"
        TrainingConfig(learning_rate=1e-3, min_learning_rate=1e-3)

    @pytest.mark.parametrize(
        ("given", "mixed", "precision"),
        [
            ({}, False, "fp32"),
            ({"mixed_precision": True}, True, "auto"),
            ({"precision": "bf16"}, True, "bf16"),
            ({"precision": "fp16"}, True, "fp16"),
            ({"precision": "auto"}, False, "auto"),
            ({"precision": "fp32"}, False, "fp32"),
            ({"mixed_precision": True, "precision": "bf16"}, True, "bf16"),
            ({"mixed_precision": True, "precision": "auto"}, True, "auto"),
            ({"mixed_precision": False, "precision": "fp32"}, False, "fp32"),
        ],
    )
    def test_precision_is_said_once(self, given, mixed, precision):
        config = TrainingConfig(**given)
        assert (config.mixed_precision, config.precision) == (mixed, precision)
        again = TrainingConfig.from_yaml(config.to_yaml())
        assert (again.mixed_precision, again.precision) == (mixed, precision)

    def test_native_code_is_in_bf16_or_fp32_with_weights_in_float32(self):
        config = TrainingConfig(compile="native", precision="bf16")
        assert config.bf16_weights is False
        assert TrainingConfig.from_yaml(config.to_yaml()) == config
        assert TrainingConfig(compile="native", mixed_precision=True).compile == "native"
        assert TrainingConfig(compile="native").precision == "fp32"
        assert "precision: bf16" in fault("training: {compile: native, precision: fp16}").fix
        error = fault("training: {compile: native, precision: bf16, bf16_weights: true}")
        assert error.key == "training.bf16_weights"

    @pytest.mark.parametrize("given", [(True, "fp32"), (False, "bf16"), (False, "fp16")])
    def test_precisions_that_disagree(self, given):
        mixed, precision = given
        error = fault(f"training: {{mixed_precision: {mixed}, precision: {precision}}}")
        assert (
            error.what == f"mixed_precision {str(mixed).lower()} and precision {precision} disagree"
        )

    @pytest.mark.parametrize("option", ["eps", "weight_decay"])
    def test_an_optimizer_option_is_said_once(self, option):
        field = f"optimizer_{option}"
        optimizer = {"name": "adamw", option: 0.5}
        assert getattr(TrainingConfig(optimizer=optimizer), field) == 0.5
        assert getattr(TrainingConfig(optimizer=optimizer, **{field: 0.5}), field) == 0.5
        with pytest.raises(ValidationError, match=f"{field} 0.25 and .* {option} 0.5 disagree"):
            TrainingConfig(optimizer=optimizer, **{field: 0.25})
        with pytest.raises(ValidationError, match="out of range"):
            TrainingConfig(optimizer={"name": "adamw", option: -1})

    def test_weight_decay_may_be_zero_and_eps_not(self):
        optimizer = {"name": "adamw", "weight_decay": 0}
        assert TrainingConfig(optimizer=optimizer).optimizer_weight_decay == 0.0
        with pytest.raises(ValidationError, match="out of range"):
            TrainingConfig(optimizer={"name": "adamw", "eps": 0})

    @pytest.mark.parametrize(
        "text", ["seed: 7", "data: {seed: 7}", "training: {seed: 7}", "seed: 7\ndata: {seed: 7}"]
    )
    def test_one_seed(self, text):
        config = RunConfig.from_yaml(text)
        assert (config.seed, config.data.seed, config.training.seed) == (7, 7, 7)

    def test_seeds_that_disagree(self):
        error = fault("seed: 1\ntraining:\n  seed: 2\n")
        assert error.what == "seed 1 and training.seed 2 disagree"
        assert error.where == "YAML text:3: training.seed"
        assert "disagree" in fault("data: {seed: 1}\ntraining: {seed: 2}").what
        # The default is a value like any other once it is written.
        assert "disagree" in fault("seed: 42\ntraining: {seed: 2}").what

    @pytest.mark.parametrize(
        "text", ["data: {sequence_length: 64}", "model: {sequence_length: 64}"]
    )
    def test_one_sequence_length(self, text):
        config = RunConfig.from_yaml(text)
        assert config.data.sequence_length == config.model.sequence_length == 64

    def test_sequence_lengths_that_disagree(self):
        error = fault("data: {sequence_length: 64}\nmodel: {sequence_length: 128}")
        assert error.what == "data.sequence_length 64 and model.sequence_length 128 disagree"
        assert RunConfig.from_yaml("model: {sequence_length: null}").model.sequence_length == 128

    def test_a_section_of_somebody_else_is_left_alone(self):
        data, model = DataConfig(sequence_length=32), TransformerConfig()
        run = RunConfig(seed=5, data=data, model=model)
        assert (data.seed, model.sequence_length) == (42, None)
        assert (run.data.seed, run.model.sequence_length) == (5, 32)
        assert RunConfig(seed=6, data=run.data).data.seed == 6

    @pytest.mark.parametrize("name", ["a", "my-run_2.b", "A" * 100])
    def test_names_of_runs(self, name):
        assert RunConfig(name=name).name == name

    @pytest.mark.parametrize(
        "name", ["", ".", "..", ".a", "-a", "a/b", "a\\b", "a b", "a\n", "a.", "\u00e9", "A" * 101]
    )
    def test_names_that_are_no_directory(self, name):
        with pytest.raises(ValidationError):
            RunConfig(name=name)


class TestWarmup:
    @pytest.mark.parametrize(
        ("total", "steps"), [(None, 500), (100_000, 500), (5_000, 500), (4_999, 499), (9, 0)]
    )
    def test_left_unset(self, total, steps):
        chosen, message = resolve_warmup(TrainingConfig(), total)
        assert chosen == steps
        assert (message is not None) == (total is not None and total < 5_000)
        if message:
            assert f"{steps}," in message
            assert f"{total:,}" in message

    def test_set(self):
        assert resolve_warmup(TrainingConfig(warmup_steps=500), 501) == (500, None)
        assert resolve_warmup(TrainingConfig(warmup_steps=0), 1) == (0, None)
        assert resolve_warmup(TrainingConfig(warmup_steps=9999), None) == (9999, None)

    def test_set_and_too_long_names_both_values_and_the_line(self):
        config = RunConfig.from_yaml("training:\n  eval_steps: 1\n  warmup_steps: 500\n")
        with pytest.raises(ConfigError) as caught, config.locating_errors("training"):
            resolve_warmup(config.training, 500)
        assert caught.value.where == "YAML text:3: training.warmup_steps"
        assert "warmup_steps 500" in caught.value.what
        assert "total_steps 500" in caught.value.what

    def test_unset_survives_yaml(self):
        for config in (TrainingConfig(), TrainingConfig(warmup_steps=500)):
            again = TrainingConfig.from_yaml(config.to_yaml())
            assert ("warmup_steps" in again.model_fields_set) == (
                "warmup_steps" in config.model_fields_set
            )
        assert TrainingConfig() != TrainingConfig(warmup_steps=500)


class TestComponent:
    @pytest.mark.parametrize(
        ("written", "name", "options", "dumped"),
        [
            ("sgd", "sgd", {}, "sgd"),
            ({"name": "sgd"}, "sgd", {}, "sgd"),
            ({"name": "sgd", "options": {}}, "sgd", {}, "sgd"),
            ({"name": "a", "b": [1, 2]}, "a", {"b": [1, 2]}, {"name": "a", "b": [1, 2]}),
            ({"name": "a", "options": {"b": 1}}, "a", {"b": 1}, {"name": "a", "b": 1}),
            ({"name": "a", "b": (1, (2,))}, "a", {"b": [1, [2]]}, {"name": "a", "b": [1, [2]]}),
        ],
    )
    def test_forms(self, written, name, options, dumped):
        component = Component.model_validate(written)
        assert (component.name, component.options) == (name, options)
        assert component.model_dump() == component.to_plain() == dumped
        assert Component.model_validate(dumped) == component

    @pytest.mark.parametrize(
        "wrong",
        [
            "",
            None,
            3,
            ["sgd"],
            {},
            {"name": None},
            {"name": "a", "options": 3},
            {"name": "a", "options": {"name": "b"}},
            {"name": "a", "b": math.nan},
            {"name": "a", "b": [[math.inf]]},
            {"name": "a", "b": {"c": object()}},
            {"name": "a", "b": 2**63},
            {"name": "a", "b": {1: 2}},
        ],
    )
    def test_what_is_no_component(self, wrong):
        with pytest.raises(ValidationError):
            Component.model_validate(wrong)

    def test_options_nested_too_deep(self):
        deep: list = []
        for _ in range(1000):
            deep = [deep]
        with pytest.raises(ValidationError, match="nested deeper"):
            Component(name="a", options={"b": deep})


option_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
option_names = st.text(max_size=8).filter(lambda name: name not in ("name", "options"))
components = st.builds(
    Component,
    name=st.text(min_size=1, max_size=12),
    options=st.dictionaries(option_names, option_values, max_size=3),
)
positive = st.floats(min_value=1e-300, max_value=1e300)
counts = st.integers(1, 10**15)


@st.composite
def runs(draw) -> RunConfig:
    heads = draw(st.integers(1, 16))
    seeds = {"seed": draw(st.integers(0, 2**32 - 1))}
    learning_rate = draw(positive)
    # eps and weight_decay are two names of one field, and may disagree.
    optimizer = draw(components.filter(lambda c: not {"eps", "weight_decay"} & c.options.keys()))
    train = draw(st.floats(0.01, 1.0))
    return RunConfig(
        name=draw(st.from_regex(r"[a-z0-9_][a-z0-9._-]{0,20}[a-z]", fullmatch=True)),
        **draw(st.sampled_from([{}, seeds])),
        data=DataConfig(
            source=draw(st.text(min_size=1) | st.lists(st.text(min_size=1), min_size=1)),
            tokenizer=draw(components),
            sequence_length=draw(counts),
            split=(train, 1 - train, 0),
        ),
        model=TransformerConfig(
            num_heads=heads,
            d_model=heads * 2 * draw(st.integers(1, 64)),
            d_ff=draw(st.none() | counts),
            positions=draw(components),
            dropout=draw(st.floats(0, 0.99)),
            bias=draw(st.booleans()),
            logit_softcap=draw(st.none() | positive),
        ),
        training=TrainingConfig(
            learning_rate=learning_rate,
            min_learning_rate=learning_rate * draw(st.floats(0, 1)),
            optimizer=optimizer,
            **draw(st.sampled_from([{}, {"warmup_steps": 10}, {"mixed_precision": True}])),
            **draw(st.sampled_from([{}, {"compile": "auto"}, {"compile": True}])),
            max_seconds=draw(st.none() | positive),
            checkpoint_dir=draw(st.text(min_size=1)),
        ),
        handlers=draw(
            st.dictionaries(
                st.text(), st.booleans() | st.dictionaries(st.text(), option_values), max_size=3
            )
        ),
        plugins=draw(st.lists(st.sampled_from(["a", "a.b_c", "\u00e9.b"]))),
    )


class TestRoundTrip:
    @settings(max_examples=examples(60))
    @given(runs())
    def test_yaml(self, config):
        text = config.to_yaml()
        again = RunConfig.from_yaml(text)
        assert again == config
        assert again.model_dump() == config.model_dump()
        assert again.to_yaml() == text
        assert config_differences(again.to_dict(), config.to_dict()) == []

    @pytest.mark.parametrize("config", SECTIONS)
    def test_every_section(self, config):
        assert config.from_yaml(config().to_yaml()) == config()
        assert json.loads(json.dumps(config().to_dict())) == config().to_dict()

    def test_through_a_file(self, tmp_path):
        config = RunConfig(name="a", handlers={"samples": {"prompt": "caf\u00e9 \u2028"}})
        text = config.to_yaml(tmp_path / "config.yaml")
        assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == text
        assert RunConfig.from_yaml(tmp_path / "config.yaml") == config
        assert RunConfig.from_yaml(str(tmp_path / "config.yaml")) == config

    def test_the_order_is_that_of_the_fields(self):
        lines = RunConfig().to_yaml().splitlines()
        assert [line.partition(":")[0] for line in lines if line[0] != " "] == list(
            RunConfig.model_fields
        )
        assert "  split: [0.9, 0.1, 0.0]" in lines

    def test_an_unwritable_place(self, tmp_path):
        with pytest.raises(MachineError, match="cannot be written") as caught:
            RunConfig().to_yaml(tmp_path / "no" / "config.yaml")
        assert caught.value.where == str(tmp_path / "no" / "config.yaml")

    def test_what_holds_for_every_section_is_written_once(self):
        config = RunConfig.from_yaml("seed: 7\nmodel: {sequence_length: 64}")
        plain = config.to_dict()
        assert plain["seed"] == 7
        assert plain["data"]["sequence_length"] == 64
        assert not {"seed"} & (plain["data"].keys() | plain["training"].keys())
        assert "sequence_length" not in plain["model"]


class TestLoading:
    def test_overrides(self, write):
        path = write("training:\n  learning_rate: 1e-3\n  num_epochs: 2\n")
        config = load_config(
            path,
            [
                "training.learning_rate=3e-4",
                "model.d_model=64",
                "data.source=[a.txt, 'b=c.txt']",
                "name=x",
                "training.total_steps=null",
                "name=y",
            ],
        )
        assert config.training.learning_rate == 3e-4
        assert config.training.num_epochs == 2
        assert config.model.d_model == 64
        assert config.data.source == ["a.txt", "b=c.txt"]
        assert config.name == "y"

    @pytest.mark.parametrize(
        ("text", "override", "expected"),
        [
            ("seed: 1", "training.scheduler.rate=0.5", {"name": "linear_warmup", "rate": 0.5}),
            ("training: {scheduler: cosine}", "training.scheduler.a=1", {"name": "cosine", "a": 1}),
            (
                "training: {scheduler: {name: cosine, a: 1}}",
                "training.scheduler.b=2",
                {"name": "cosine", "a": 1, "b": 2},
            ),
            (
                "training: {scheduler: {name: cosine, a: 1}}",
                "training.scheduler=constant",
                "constant",
            ),
        ],
    )
    def test_overrides_of_components(self, write, text, override, expected):
        assert load_config(write(text), [override]).training.scheduler.to_plain() == expected

    @pytest.mark.parametrize("before", ["true", "false", "{}", ""])
    def test_overrides_of_handlers(self, write, before):
        path = write(f"handlers:\n  samples: {before}\n")
        assert load_config(path, ["handlers.samples.every=5"]).handlers == {"samples": {"every": 5}}

    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("data.response_end=###", "###"),
            ("data.response_end=\n\n", "\n\n"),
            ("data.response_end=A #B", "A #B"),
            ("data.response_end= END", " END"),
            ("data.response_end=a: b", "a: b"),
            ("data.response_end=- a", "- a"),
            ("data.response_end=*", "*"),
            ("data.response_end='", "'"),
            ("data.response_end=a=b", "a=b"),
            ("data.response_end='# '", "# "),
            ('data.response_end="\\n"', "\n"),
            ("data.response_end=null", None),
            ("data.response_end=7", "7"),
            ("data.source=notes #1.txt", "notes #1.txt"),
            ("data.source=.inf", ".inf"),
            ("data.source=[a, 'b #1']", ["a", "b #1"]),
            ("training.checkpoint_dir=ck #2", "ck #2"),
            ("name=2024", "2024"),
            ("name=1e5", "1e5"),
            ("name=true", "true"),
            ("training.learning_rate= 1e-3 ", 1e-3),
        ],
    )
    def test_what_stands_behind_the_first_equals_sign_is_the_value(self, write, override, value):
        found = load_config(write("seed: 1\n"), [override])
        for key in override.partition("=")[0].split("."):
            found = getattr(found, key)
        assert found == value

    def test_the_schema_of_overrides_is_made_once(self, write, monkeypatch):
        path = write("seed: 1\n")
        assert load_config(path, ["name=1"]).name == "1"  # made by now at the latest
        monkeypatch.setattr(RunConfig, "model_json_schema", None)
        assert load_config(path, ["name=2024", "training.total_steps=3"]).name == "2024"

    @pytest.mark.parametrize("override", ["data.source=[a] # b", "name='a' # 'b'", 'name="a" "b"'])
    def test_nothing_stands_behind_a_closing_bracket_or_quote(self, write, override):
        with pytest.raises(ConfigError) as caught:
            load_config(write("seed: 1\n"), [override])
        assert caught.value.where == f"command line: {override}"

    @pytest.mark.parametrize(
        ("override", "what", "fix"),
        [
            ("training.learning_rate=-1", "out of range", ""),
            ("training.learning_rate=.nan", "number is not finite", ""),
            ("training.lerning_rate=1", "unknown key", "did you mean 'learning_rate'?"),
            ("trainning.learning_rate=1", "unknown key", "did you mean 'training'?"),
            ("learning_rate=1", "unknown key", "this key belongs under training:"),
            ("batch_size=1", "unknown key", "this key belongs under data:"),
            ("training.batch_size=1", "unknown key", "this key belongs under data:"),
            ("training.max_steps=1", "unknown key", "did you mean training.total_steps?"),
            ("training.steps=1", "unknown key", "did you mean training.total_steps?"),
            ("training.lr=1", "unknown key", "did you mean training.learning_rate?"),
            ("data.block_size=1", "unknown key", "did you mean data.sequence_length?"),
            ("data.path=a.txt", "unknown key", "did you mean data.source?"),
            ("max_iters=1", "unknown key", "did you mean training.total_steps?"),
            ("model.n_head=1", "unknown key", "did you mean model.num_heads?"),
            ("data.sources=[{path: a, wieght: 1}]", "unknown key", "did you mean 'weight'?"),
            ("training.device.index=0", "wrong type: a mapping", ""),
            ("name.a=1", "has no keys", ""),
            ("training.learning_rate", "not an override", "no spaces around ="),
            ("=1", "not an override", "no spaces around ="),
            ("training.=1", "not an override", "no spaces around ="),
            ("training.optimizer=[1", "not YAML", "column"),
            ("training.optimizer=!!python/name:os.system", "tags", ""),
            ("data.seed=3", "disagree", ""),
        ],
    )
    def test_faults_of_overrides_name_the_override(self, write, override, what, fix):
        with pytest.raises(ConfigError) as caught:
            load_config(write("seed: 1\nname: a\n"), [override])
        assert caught.value.where == f"command line: {override}"
        assert what in caught.value.what
        assert fix in caught.value.fix

    def test_a_fault_of_the_file_still_names_its_line(self, write):
        path = write("seed: 1\ntraining:\n  eval_steps: 0\n")
        with pytest.raises(ConfigError) as caught:
            load_config(path, ["training.num_epochs=3"])
        assert caught.value.where == f"{path}:3: training.eval_steps"

    def test_an_override_mends_the_file(self, write):
        path = write("training:\n  eval_steps: 0\n")
        assert load_config(path, ["training.eval_steps=5"]).training.eval_steps == 5

    def test_plugins(self, write):
        path = write("plugins: [mine.a]\n")
        assert load_config(path, plugins=["mine.b", "mine.a"]).plugins == ["mine.a", "mine.b"]
        with pytest.raises(ConfigError) as caught:
            load_config(path, plugins=["x/y.py"])
        assert caught.value.where == "command line: --plugins x/y.py"

    @pytest.mark.parametrize("wrong", ["{}", "3", "null"])
    def test_plugins_of_both_kinds_with_a_fault_in_the_file(self, write, wrong):
        path = write(f"seed: 1\nplugins: {wrong}\n")
        with pytest.raises(ConfigError) as caught:
            load_config(path, plugins=["a"])
        assert caught.value.where == f"{path}:2: plugins"


class TestBlame:
    @pytest.fixture
    def config(self, write):
        path = write(
            """\
            training:
              optimizer:
                name: adamw
                betas: [0.9, 2]
              loss: cross_entropy
            """
        )
        return path, load_config(path, ["training.loss=focal"])

    def test_locate(self, config):
        path, run = config
        assert run.locate("training.optimizer") == f"{path}:2: training.optimizer"
        assert run.locate("training.optimizer.betas") == f"{path}:4: training.optimizer.betas"
        assert run.locate("training.optimizer.eps") == f"{path}:2: training.optimizer.eps"
        assert run.locate("model.d_model") == f"{path}: model.d_model"
        assert run.locate("training.loss") == "command line: training.loss=focal"
        assert run.locate("training.loss.gamma") == "command line: training.loss=focal"
        assert RunConfig().locate("training.loss") == "training.loss"

    def test_an_override_hides_the_lines_below_it(self, write):
        run = load_config(
            write("training: {loss: {name: a, b: 1}}"), ["training.loss.b=3", "training.loss=c"]
        )
        assert run.locate("training.loss.b") == "command line: training.loss=c"

    def test_a_registry_error_gets_its_line(self, config):
        path, run = config
        optimizers: Registry[object] = Registry("optimizer")

        @optimizers.register("adamw")
        def adamw(*, betas: tuple[float, float, float] = (0, 0, 0)) -> object:
            return object()

        optimizer = run.training.optimizer
        with pytest.raises(ConfigError) as caught, run.locating_errors("training.optimizer"):
            optimizers.check(optimizer.name, optimizer.options)
        assert caught.value.where == f"{path}:4: training.optimizer.betas"
        with pytest.raises(ConfigError) as caught, run.locating_errors("training.loss"):
            optimizers.get(run.training.loss.name)
        assert caught.value.where == "command line: training.loss=focal"

    def test_a_known_place_is_kept_and_other_errors_pass(self, config):
        _, run = config
        with pytest.raises(ConfigError) as caught, run.locating_errors("training"):
            raise ConfigError("x", where="elsewhere", key="a")
        assert (caught.value.where, caught.value.key) == ("elsewhere", "a")
        with pytest.raises(KeyError), run.locating_errors("training"):
            raise KeyError("x")

    def test_where_it_was_written_is_no_part_of_what_it_says(self, config):
        _, run = config
        again = RunConfig.from_yaml(run.to_yaml())
        assert again == run
        assert again.locate("seed") != run.locate("seed")
        assert "_document" not in run.model_dump()
        copy = run.model_copy(update={"name": "other"})
        assert copy.locate("training") == run.locate("training")


class TestDifferences:
    def test_values_sections_and_absent_keys(self):
        a = RunConfig(training=TrainingConfig(warmup_steps=10)).to_dict()
        b = RunConfig(seed=1, training=TrainingConfig(optimizer="sgd", compile=True)).to_dict()
        assert config_differences(a, b) == [
            ("seed", 42, 1),
            ("training.optimizer", "adamw", "sgd"),
            ("training.warmup_steps", 10, ABSENT),
            ("training.compile", False, True),
        ]

    @pytest.mark.parametrize(
        ("a", "b", "same"),
        [(1, 1.0, True), (1, True, False), (None, ABSENT, False), ([1], [2], False)],
    )
    def test_what_is_the_same(self, a, b, same):
        assert (config_differences({"k": a}, {"k": b}) == []) == same

    def test_a_description_that_lacks_fields_says_their_defaults(self):
        config = RunConfig(name="mine", training=TrainingConfig(optimizer={"name": "sgd"}))
        whole = config.model_dump(mode="json")
        stored = config.model_dump(mode="json")
        del stored["model"]["init_from"], stored["data"], stored["handlers"]
        stored["training"]["a field of old"] = 1
        before = json.dumps(stored)
        completed = with_defaults(stored, RunConfig)
        assert completed["training"].pop("a field of old") == 1
        assert completed == whole
        assert json.dumps(stored) == before
        assert with_defaults(whole, RunConfig) == whole

    def test_what_may_differ_exists(self):
        for key in RESUME_MAY_DIFFER:
            section, _, field = key.partition(".")
            if section != "handlers":
                assert (
                    field in TrainingConfig.model_fields
                    if field
                    else section in (RunConfig.model_fields)
                )

    @pytest.mark.parametrize(
        ("key", "free"),
        [
            ("training.num_epochs", True),
            ("name", True),
            ("handlers.samples", True),
            ("handlers.samples.every", True),
            ("handlers.samples_of_mine", False),
            ("handlers.early_stopping", False),
            ("training", False),
            ("training.learning_rate", False),
            ("seed", False),
        ],
    )
    def test_what_may_differ_on_resume(self, key, free):
        assert may_differ_on_resume(key) is free


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "null"),
        (True, "true"),
        (1e-5, "1.0e-05"),
        ("adamw", "adamw"),
        ("1", "'1'"),
        (["a", "b"], "[a, b]"),
        ({"name": "adamw", "betas": [0.9, 0.95]}, "{name: adamw, betas: [0.9, 0.95]}"),
        (Component(name="adamw"), "adamw"),
        (ABSENT, "unset"),
        ("a\nb\u202e", '"a\\nb\\u202e"'),
        ("https://me:secret@example.org/x", "https://***@example.org/x"),
    ],
)
def test_a_value_is_told_as_a_file_has_it(value, words):
    said = value_in_words(value)
    assert said == words
    if isinstance(value, (bool, float, str, list, dict)) and "***" not in said and said != "unset":
        assert yaml.safe_load(said) == value


def test_a_long_value_is_told_in_one_short_line():
    said = value_in_words([f"file {number}.txt" for number in range(100)])
    assert "\n" not in said
    assert len(said) == 200
