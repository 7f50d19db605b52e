"""How a configuration computes on this machine: resolved once, applied once.

A `Plan` says how a step is computed, not what it computes: two plans of one configuration take
the same steps up to rounding. `Plan.resolve` makes it from the training configuration, the
model's abilities, and the machine; nothing else chooses a device, type, kernel or compiler. To
apply it:

    model = plan.place(model)              on its device; parameters do not move later
    optimizer = ...                        over the parameters at their final place
    precision = plan.build_precision()     autocast, bfloat16 copies, loss scale
    forward = plan.prepare(model)          kernel, compilation, ranks: what a step calls

`tune` and `auto` compare plans that differ in a field, `check` times the one that `run` would use,
and `applied_to` writes a plan into the configuration that checkpoints keep.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fundamentallm.compute.compilation import compile_model, resolve_compile, uncompile
from fundamentallm.compute.determinism import use_deterministic_kernels
from fundamentallm.compute.distributed import Ranks, join_ranks
from fundamentallm.compute.precision import (
    Precision,
    resolve_bf16_weights,
    resolve_device,
    resolve_precision,
)
from fundamentallm.compute.processor import kind_of_processor, why_not_bf16
from fundamentallm.compute.threads import use_threads
from fundamentallm.config import RunConfig
from fundamentallm.config.model import ModelConfig, TransformerConfig
from fundamentallm.config.training import TrainingConfig
from fundamentallm.models.build import follows_weight_type
from fundamentallm.models.calling import recompute_activations
from fundamentallm.models.layers.attention import choose_kernel, use_kernel
from fundamentallm.models.native.block import require_native, why_not


@dataclass(frozen=True, slots=True)
class Machine:
    """The part of the machine that this process computes with.

    Attributes:
        device: a CUDA device has its index.
        ranks: this process among the others.
    """

    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    ranks: Ranks = field(default_factory=Ranks)

    @classmethod
    def open(
        cls,
        device: str | torch.device,
        threads: int | None = None,
        join: bool = False,
        deterministic: bool = False,
    ) -> Machine:
        """Find the device and the ranks; set the number of threads and the choice of kernels.

        Args:
            device: a name, as for `resolve_device`; each of several ranks takes its own GPU, and a
                GPU becomes torch's current one. A torch device is used unchanged.
            threads: of the CPU, as for `use_threads`.
            join: join the ranks that a launcher announces; else those that exist now.
            deterministic: `use_deterministic_kernels`; else torch's choice stays as it is.

        Raises:
            ConfigError: the kind of device is unknown.
            MachineError: this machine has no such device, or the ranks cannot be joined.
        """
        use_threads(threads)
        if deterministic:
            use_deterministic_kernels()
        found = resolve_device(device) if isinstance(device, str) else device
        ranks = join_ranks(found.type) if join else Ranks.current()
        if isinstance(device, str) and found.type == "cuda":
            if not ranks.alone:
                found = torch.device("cuda", ranks.own_gpu())
            # Torch chooses the kernel of attention by what the current GPU can do.
            torch.cuda.set_device(found)
        return cls(found, ranks)

    def is_slow_in_bf16(self) -> bool:
        """Whether bfloat16 is known to be no gain on some rank; every rank must call it.

        Ranks must compute alike, and their rates may differ.
        """
        return self.ranks.any(bool(why_not_bf16(self.device)))

    def circumstances(self) -> dict[str, str | int]:
        """Return the facts beside a plan that rounding and speed depend on, as plain values."""
        gpu = self.device.type == "cuda"
        kind: dict[str, str | int] = {}
        if self.device.type == "cpu":
            known = kind_of_processor()
            kind = {name: known[name] for name in ("processor", "instructions")}
        return {
            "device": torch.cuda.get_device_name(self.device) if gpu else self.device.type,
            **kind,
            "ranks": self.ranks.world_size,
            "threads": torch.get_num_threads(),
        }


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts about a model that a plan needs; the model need not be built.

    Attributes:
        context: T, tokens in a sequence; 0 if unknown.
        follows_weight_type: tells whether bfloat16 weights make the whole model compute in
            bfloat16; None if unknown.
        config: the configuration that native code checks; None for a script's model.
    """

    context: int = 0
    follows_weight_type: Callable[[], bool] | None = None
    config: ModelConfig | None = None

    @classmethod
    def of(cls, model: nn.Module | ModelConfig) -> ModelFacts:
        """Return the facts of a model, or of the model that a configuration describes."""
        if not isinstance(model, nn.Module):
            return cls(model.sequence_length or 0, partial(follows_weight_type, model), model)
        config = getattr(model, "config", None)
        return cls(
            getattr(model, "sequence_length", 0),
            getattr(model, "follows_weight_type", None),
            config if isinstance(config, TransformerConfig) else None,
        )

    def why_not_native(self, device: torch.device) -> str:
        """Return why native code cannot compute the model on a device; empty if it can."""
        if self.config is None:
            return "not this package's Transformer"
        return why_not(self.config, device)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a step is computed.

    Attributes:
        precision: "fp32", "bf16" or "fp16".
        bf16_weights: whether bfloat16 copies of the weights take the place of autocast.
        compile: whether the block is compiled: by torch (True) or as native code ("native").
        attention: the kernel's name.
        batch_size: rows of a micro-batch; the step's rows are fixed, so accumulation follows. 0 if
            a script's loader decides.
        threads: of the CPU; None for torch's choice.
        gradient_checkpointing: whether the backward pass recomputes activations.
        machine: the machine.
    """

    precision: str
    bf16_weights: bool
    compile: bool | Literal["native"]
    attention: str
    batch_size: int = 0
    threads: int | None = None
    gradient_checkpointing: bool = False
    machine: Machine = field(default_factory=Machine)

    @classmethod
    def resolve(
        cls,
        config: TrainingConfig,
        model: ModelFacts,
        machine: Machine,
        batch_size: int = 0,
    ) -> Plan:
        """Choose what the configuration leaves open, as far as that needs no measurement.

        Args:
            config: precision, bf16_weights, attention, compile, threads, gradient_checkpointing.
            model: what the model can do.
            machine: where it computes.
            batch_size: rows of a micro-batch.

        Raises:
            ConfigError: the device lacks the precision, or native code does not support the model;
                `key` is the field.
            MachineError: compilation is required, but there is no compiler.
        """
        device = machine.device
        if config.compile == "native":
            if model.config is not None:
                require_native(model.config, device)
            opens = config.precision == "auto" and not config.mixed_precision
            wide = machine.is_slow_in_bf16() if opens else config.precision == "fp32"
            precision, narrow = "fp32" if wide else "bf16", False
        else:
            precision = resolve_precision(config.precision, config.mixed_precision, device)
            narrow = resolve_bf16_weights(
                config.bf16_weights, precision, device, model.follows_weight_type
            )
        return cls(
            precision,
            narrow,
            resolve_compile(config.compile),
            choose_kernel(config.attention, device, narrow, model.context),
            batch_size,
            config.threads,
            config.gradient_checkpointing,
            machine,
        )

    @classmethod
    def again(
        cls, config: TrainingConfig, model: ModelFacts, machine: Machine, fp16_elsewhere: str
    ) -> Plan:
        """Return the plan to recompute a run's step, uncompiled.

        Args:
            config: the run's, resolved. Runs from before the fields `bf16_weights` and
                `attention` existed used autocast and the fused kernel.
            model: what the model can do.
            machine: where it computes; may be another kind than the run's.
            fp16_elsewhere: the precision in place of fp16 if the device is not a GPU.
        """
        precision: str = config.precision
        if precision == "fp16" and machine.device.type != "cuda":
            precision = fp16_elsewhere
        narrow = config.bf16_weights is True
        kernel = choose_kernel(config.attention, machine.device, narrow, model.context)
        return cls(precision, narrow, False, kernel, threads=config.threads, machine=machine)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.machine.device

    @property
    def ranks(self) -> Ranks:
        """This process's place among the ranks."""
        return self.machine.ranks

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to its device; call it before an optimizer holds the parameters."""
        return model.to(self.device)

    def build_precision(self) -> Precision:
        """Return the types of a step, with a new loss scale in fp16."""
        return Precision(self.precision, self.device, self.bf16_weights)

    def prepare(
        self, model: nn.Module, batch_shape: tuple[int | None, int | None] = (None, None)
    ) -> nn.Module:
        """Configure a placed model for this plan; return the module that a step calls.

        torch's compiler runs at the first call.

        Args:
            model: changed in place; an earlier plan's changes are undone.
            batch_shape: rows and tokens of a whole micro-batch, as far as known; compiled
                code is for that shape.

        Raises:
            ConfigError, MachineError: as `recompute_activations` and `compile_model`.
        """
        if self.gradient_checkpointing:
            recompute_activations(model)
        use_kernel(model, self.attention)
        uncompile(model)  # an earlier plan may have had another precision
        forward = model
        if self.compile:
            native = self.compile == "native"
            forward = compile_model(forward, *batch_shape, native, self.precision)
        if self.ranks.alone:
            return forward
        return DistributedDataParallel(
            forward,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            **_without_buffer_sync(),
        )

    def values(self, rows: int) -> dict[str, dict[str, Any]]:
        """Return the fields of a configuration that say how a step is computed, by section.

        Args:
            rows: sequences of one rank in an optimizer step.
        """
        return {
            "data": {"batch_size": self.batch_size},
            "training": {
                "accumulation_steps": rows // self.batch_size,
                "precision": self.precision,
                "bf16_weights": self.bf16_weights,
                "attention": self.attention,
                "compile": self.compile,
                "threads": self.threads,
            },
        }

    def applied_to(self, config: RunConfig) -> RunConfig:
        """Return the configuration with this plan's settings."""
        values = self.values(config.data.batch_size * config.training.accumulation_steps)
        training = {
            **values["training"],
            "mixed_precision": self.precision != "fp32",
            "device": str(self.device),
        }
        return config.model_copy(
            update={
                "data": config.data.model_copy(update=values["data"]),
                "training": config.training.model_copy(update=training),
            }
        )


def _without_buffer_sync() -> dict[str, Any]:
    """Return the options that keep DDP from sending buffers: ours are constants on every rank.

    Newer releases of torch warn at the name that older ones need.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}
