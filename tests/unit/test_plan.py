"""How a configuration computes: a table of configurations, machines and plans, and their use."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from fundamentallm.compute import compilation, precision, processor
from fundamentallm.compute.compilation import CompiledBlocks
from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.plan import Machine, ModelFacts, Plan
from fundamentallm.config import RunConfig, TrainingConfig, TransformerConfig
from fundamentallm.engine.wiring.assemble import open_machine
from fundamentallm.errors import ConfigError, MachineError
from fundamentallm.models.transformer import Transformer
from fundamentallm.testing import UniformModel, tiny_loaders, tiny_model
from fundamentallm.training.trainer import Trainer

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
NATIVE = {"normalization": "rmsnorm", "positions": "rotary", "bias": False}
KNOWN = TransformerConfig(
    vocab_size=65, sequence_length=32, d_model=64, num_layers=1, num_heads=2, d_ff=96, **NATIVE
)
LONG = KNOWN.model_copy(update={"sequence_length": 2048})
OTHER = KNOWN.model_copy(update={"bias": True})  # which native code does not know


@pytest.fixture
def machine(monkeypatch):
    """A machine by what it has: bfloat16 units in its GPU, a C++ compiler."""

    def make(device: torch.device, bf16: bool = True, compiler: bool = True) -> Machine:
        monkeypatch.setattr(precision, "has_bf16", lambda device: bf16)
        monkeypatch.setattr(compilation, "find_compiler", lambda: "g++" if compiler else None)
        return Machine(device)

    return make


def plan(*values: object, device: torch.device = CPU, **options: object) -> Plan:
    return Plan(*values, batch_size=4, machine=Machine(device), **options)


OLD_GPU, BARE = {"bf16": False}, {"compiler": False}


@pytest.mark.parametrize(
    ("config", "model", "device", "has", "expected"),
    [
        # the defaults: float32, the fused kernel, nothing compiled
        ({}, KNOWN, CPU, {}, plan("fp32", False, False, "flash")),
        ({}, KNOWN, CUDA, {}, plan("fp32", False, False, "flash", device=CUDA)),
        # precision
        ({"precision": "auto"}, KNOWN, CPU, {}, plan("fp32", False, False, "flash")),
        (
            {"precision": "auto"},
            KNOWN,
            MPS,
            {},
            plan("fp32", False, False, "flash", device=MPS),
        ),
        (
            {"precision": "auto"},
            KNOWN,
            CUDA,
            {},
            plan("bf16", False, False, "flash", device=CUDA),
        ),
        (
            {"precision": "auto"},
            KNOWN,
            CUDA,
            OLD_GPU,
            plan("fp16", False, False, "flash", device=CUDA),
        ),
        ({"mixed_precision": True}, KNOWN, CPU, {}, plan("bf16", True, False, "explicit")),
        # bfloat16 copies of the weights and their kernel, on CPUs alone
        ({"precision": "bf16"}, KNOWN, CPU, {}, plan("bf16", True, False, "explicit")),
        ({"precision": "bf16"}, LONG, CPU, {}, plan("bf16", True, False, "flash")),
        (
            {"precision": "bf16", "bf16_weights": False},
            KNOWN,
            CPU,
            {},
            plan("bf16", False, False, "flash"),
        ),
        (
            {"precision": "bf16", "bf16_weights": True},
            KNOWN,
            CUDA,
            {},
            plan("bf16", True, False, "flash", device=CUDA),
        ),
        ({"bf16_weights": True}, KNOWN, CPU, {}, plan("fp32", False, False, "flash")),
        ({"precision": "bf16"}, None, CPU, {}, plan("bf16", False, False, "flash")),
        ({"attention": "explicit"}, LONG, CPU, {}, plan("fp32", False, False, "explicit")),
        # compilation
        ({"compile": True}, KNOWN, CPU, {}, plan("fp32", False, True, "flash")),
        ({"compile": "auto"}, KNOWN, CPU, {}, plan("fp32", False, True, "flash")),
        ({"compile": "auto"}, KNOWN, CPU, BARE, plan("fp32", False, False, "flash")),
        (
            {"compile": "native", "precision": "auto"},
            KNOWN,
            CPU,
            {},
            plan("bf16", False, "native", "flash"),
        ),
        ({"compile": "native"}, KNOWN, CPU, {}, plan("fp32", False, "native", "flash")),
        (
            {"compile": "native", "mixed_precision": True},
            KNOWN,
            CPU,
            {},
            plan("bf16", False, "native", "flash"),
        ),
        # what is not a choice
        (
            {"threads": 3, "gradient_checkpointing": True},
            KNOWN,
            CPU,
            {},
            plan("fp32", False, False, "flash", threads=3, gradient_checkpointing=True),
        ),
    ],
)
def test_what_a_configuration_means_on_a_machine(machine, config, model, device, has, expected):
    facts = ModelFacts() if model is None else ModelFacts.of(model)
    found = Plan.resolve(TrainingConfig(**config), facts, machine(device, **has), 4)
    assert found == expected


@pytest.mark.parametrize(
    ("config", "device", "has", "error", "what"),
    [
        ({"precision": "fp16"}, CPU, {}, ConfigError, "precision: precision fp16 needs a CUDA GPU"),
        ({"precision": "bf16"}, CUDA, OLD_GPU, ConfigError, "precision: precision bf16 needs"),
        (
            {"compile": "native", "precision": "bf16"},
            CPU,
            {},
            ConfigError,
            "(?s)compile: compile: native does not support.*bias: true",
        ),
        ({"compile": True}, CPU, BARE, MachineError, "compile: true needs a C"),
    ],
)
def test_what_cannot_be(machine, config, device, has, error, what):
    with pytest.raises(error, match=what):
        Plan.resolve(TrainingConfig(**config), ModelFacts.of(OTHER), machine(device, **has))


@pytest.mark.parametrize("config", [KNOWN, LONG, OTHER])
def test_a_model_has_the_facts_of_its_configuration(config):
    of_model, of_config = ModelFacts.of(Transformer(config)), ModelFacts.of(config)
    assert of_model.context == of_config.context == config.sequence_length
    assert of_model.follows_weight_type() is of_config.follows_weight_type() is True
    assert of_model.config == of_config.config == config


@pytest.mark.parametrize(("rates", "precision"), [((1e11, 5e11), "bf16"), ((1e11, 1e9), "fp32")])
def test_native_code_takes_the_type_that_the_processor_is_fast_in(monkeypatch, rates, precision):
    monkeypatch.setattr(processor, "cpu_rates", lambda: rates)
    config = TrainingConfig(compile="native", precision="auto")
    assert Plan.resolve(config, ModelFacts.of(KNOWN), Machine(CPU)).precision == precision
    asked = TrainingConfig(compile="native", precision="bf16")
    assert Plan.resolve(asked, ModelFacts.of(KNOWN), Machine(CPU)).precision == "bf16"


def test_nothing_is_known_of_another_model():
    facts = ModelFacts.of(UniformModel(7))
    assert facts == ModelFacts(0, None, None)
    assert facts.why_not_native(CPU)


@pytest.mark.parametrize(
    ("stored", "device", "elsewhere", "expected"),
    [
        # compiled code of either kind is left out, its types stay
        ({"precision": "bf16", "compile": "native", "attention": "flash"}, CPU, "fp32",
         ("bf16", False, "flash")),
        ({"precision": "bf16", "bf16_weights": True, "attention": "explicit", "compile": True}, CPU,
         "fp32", ("bf16", True, "explicit")),
        # from before there was a choice: autocast and the fused kernel
        ({"precision": "bf16"}, CPU, "fp32", ("bf16", False, "flash")),
        # fp16 is for GPUs alone
        ({"precision": "fp16"}, CUDA, "fp32", ("fp16", False, "flash")),
        ({"precision": "fp16"}, CPU, "fp32", ("fp32", False, "flash")),
        ({"precision": "fp16"}, CPU, "bf16", ("bf16", False, "flash")),
    ],
)  # fmt: skip
def test_what_a_run_computed_is_computed_again(stored, device, elsewhere, expected):
    config = TrainingConfig(**stored)
    found = Plan.again(config, ModelFacts.of(KNOWN), Machine(device), fp16_elsewhere=elsewhere)
    assert (found.precision, found.bf16_weights, found.attention) == expected
    assert (found.compile, found.machine) == (False, Machine(device))


def test_a_plan_resolves_to_itself_from_the_configuration_that_keeps_it(machine):
    written = RunConfig(training=TrainingConfig(precision="bf16", compile="auto", threads=2))
    facts, here = ModelFacts.of(KNOWN), machine(CPU)
    first = Plan.resolve(written.training, facts, here, written.data.batch_size)
    kept = RunConfig.from_yaml(first.applied_to(written).to_yaml())
    assert (kept.training.device, kept.training.mixed_precision) == ("cpu", True)
    assert "auto" not in (kept.training.bf16_weights, kept.training.compile)
    assert Plan.resolve(kept.training, facts, here, kept.data.batch_size) == first


class TestPrepare:
    def test_kernel_recomputation_and_types(self):
        model = tiny_model()
        narrow = Plan("bf16", True, False, "explicit", gradient_checkpointing=True)
        assert narrow.prepare(narrow.place(model)) is model
        assert {block.attention.kernel for block in model.blocks} == {"explicit"}
        assert model.gradient_checkpointing
        types = narrow.build_precision()
        assert (types.name, types.bf16_weights, types.device) == ("bf16", True, CPU)

    def test_the_next_plan_replaces_what_was_compiled(self):
        model = tiny_model()
        plain = Plan("fp32", False, False, "flash")
        replace(plain, compile=True).prepare(model, (4, 8))
        assert isinstance(model.run_block, CompiledBlocks)
        assert (model.run_block.rows, model.run_block.time) == (4, 8)
        plain.prepare(model)
        assert not isinstance(model.run_block, CompiledBlocks)

    def test_a_model_moves_to_the_device(self):
        placed = Plan("fp32", False, False, "flash", machine=Machine(torch.device("meta"))).place(
            nn.Linear(2, 3)
        )
        assert placed.weight.device.type == "meta"


class TestMachine:
    def test_a_gpu_is_made_the_current_one_and_each_rank_takes_its_own(self, monkeypatch):
        chosen = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        assert Machine.open("cuda").device == CUDA
        assert Machine.open("cuda:2").device == torch.device("cuda", 2)
        assert chosen == [CUDA, torch.device("cuda", 2)]
        monkeypatch.setattr(Ranks, "current", lambda: Ranks(rank=5, world_size=8, local_rank=1))
        chosen.clear()
        assert Machine.open("auto").device == torch.device("cuda", 1)
        assert chosen == [torch.device("cuda", 1)]
        assert Machine.open(CUDA).device == CUDA  # a script's own choice
        assert Machine.open("cpu").device == CPU
        assert chosen == [torch.device("cuda", 1)]

    def test_kernels_that_add_in_a_fixed_order_are_chosen_if_asked(self, monkeypatch, tmp_path):
        variables = ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC")
        config = RunConfig.from_yaml("training: {deterministic: true}")
        script = TrainingConfig(deterministic=True)
        openings = (
            lambda: open_machine(config),
            lambda: Trainer(tiny_model(), tiny_loaders()[0], device="cpu", config=script),
        )
        try:
            for opened in openings:
                for name in variables:
                    monkeypatch.delenv(name, raising=False)
                torch.use_deterministic_algorithms(False)
                Machine.open("cpu")
                assert not torch.are_deterministic_algorithms_enabled()
                opened()
                assert torch.are_deterministic_algorithms_enabled()
                assert [os.environ[name] for name in variables] == [":4096:8", "1"]
        finally:
            torch.use_deterministic_algorithms(False)
            for name in variables:
                os.environ.pop(name, None)

    def test_the_threads_are_set(self):
        before = torch.get_num_threads()
        try:
            Machine.open("cpu", before + 1)
            assert torch.get_num_threads() == before + 1
            Machine.open("cpu")
            assert torch.get_num_threads() == before + 1
        finally:
            torch.set_num_threads(before)


def test_a_trainer_takes_a_plan_or_makes_one():
    config = TrainingConfig(precision="bf16", attention="flash")
    own = Trainer(tiny_model(), *tiny_loaders(), device="cpu", config=config)
    assert own.plan == Plan("bf16", True, False, "flash")
    given = Plan("fp32", False, False, "explicit")
    trainer = Trainer(tiny_model(), *tiny_loaders(), device=given, config=config)
    assert trainer.plan is given
    assert trainer.precision.name == "fp32"
    assert {block.attention.kernel for block in trainer.model.blocks} == {"explicit"}
