"""Fill in what a configuration leaves open, and plan how its steps are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fundamentallm.compute.plan import Machine, ModelFacts, Plan
from fundamentallm.compute.processor import why_not_bf16
from fundamentallm.config import RunConfig, TransformerConfig
from fundamentallm.config.model import SIZES, ModelConfig
from fundamentallm.config.training import TrainingConfig, resolve_warmup
from fundamentallm.data.sources import Source
from fundamentallm.engine.tuning.sizing import sized
from fundamentallm.engine.wiring.changed_rows import limits_of
from fundamentallm.engine.wiring.comparison import kept_warmup
from fundamentallm.engine.wiring.inputs import Inputs
from fundamentallm.engine.wiring.run_directory import RunDirectory
from fundamentallm.errors import ConfigError, MachineError
from fundamentallm.inference.stored_model import stored_config
from fundamentallm.models.build import uses_attention
from fundamentallm.models.native.library import find_compiler, load_library
from fundamentallm.training.checkpoint.changes import Record
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.optimizers import with_plain_dtype
from fundamentallm.training.schedulers import SCHEDULERS

# The values for checkpoints that lack these fields.
BEFORE_THERE_WAS_A_CHOICE = {"bf16_weights": False, "attention": "flash"}


def resolve(
    inputs: Inputs,
    directory: RunDirectory,
    machine: Machine,
    changes: Sequence[Record] = (),
) -> tuple[RunConfig, Plan, list[str]]:
    """Fill in everything that the file leaves open, as far as that needs no measurement.

    Args:
        inputs: of the run.
        directory: of the run.
        machine: where it computes.
        changes: with which the run went on.

    Returns:
        The configuration that the run uses and stores, how it is computed, and notes for the user.
    """
    config, tokenizer, loader = inputs.start.config, inputs.tokenizer, inputs.loaders.train
    training = config.training
    notes = [*inputs.start.notes, *without_effect(config, inputs.source)]
    limits = limits_of(training, loader, changes)
    warmup, note = choose_warmup(config, limits.total_steps)
    if directory.checkpoint is not None:
        kept = kept_warmup(config, directory.checkpoint, limits.total_steps)
        warmup, note = (warmup, note) if kept is None else (kept, None)
    notes += [note] if note else []
    model = config.model
    if isinstance(model, TransformerConfig) and model.size is not None:
        if directory.checkpoint is not None:
            model = as_sized(model, directory.checkpoint)
        else:
            model, note = sized(config, inputs.loaders.num_tokens, machine)
            notes.append(note)
    model = model.model_copy(
        update={
            "vocab_size": config.model.vocab_size or tokenizer.vocab_size,
            "sequence_length": config.model.sequence_length or config.data.sequence_length,
        }
    )
    assert model.vocab_size is not None
    if tokenizer.vocab_size > model.vocab_size:
        with config.locating_errors("model.vocab_size"):
            raise ConfigError(
                "the tokenizer has more tokens than the model's vocabulary",
                got=f"model.vocab_size {model.vocab_size}",
                expected=f"at least {tokenizer.vocab_size}, the tokenizer's",
                fix="choose the model's own tokenizer"
                if model.init_from
                else "remove model.vocab_size",
            )
    facts = ModelFacts.of(model)
    if directory.checkpoint is not None:
        training, lost = as_it_began(training, directory.checkpoint, facts, machine.device)
        notes += lost
    if training.compile == "native" and config.data.packing == "document":
        training = training.model_copy(update={"compile": False})  # as `without_effect` tells
    with config.locating_errors("training"):
        plan = Plan.resolve(training, facts, machine, config.data.batch_size)
    optimizer = training.optimizer
    if directory.checkpoint is None:
        optimizer = with_plain_dtype(optimizer, machine)
    filled = {
        "warmup_steps": warmup,
        "total_steps": limits.total_steps,
        "optimizer": optimizer,
    }
    completed = config.model_copy(
        update={"model": model, "training": config.training.model_copy(update=filled)}
    )
    return plan.applied_to(completed), plan, notes


def as_sized(model: ModelConfig, checkpoint: Manifest) -> ModelConfig:
    """Return the model of `size: auto` as it was sized when the run began."""
    known = stored_config(checkpoint.metadata["config"], checkpoint.name).model
    return model.model_copy(update={"size": None, **{name: getattr(known, name) for name in SIZES}})


def choose_warmup(config: RunConfig, total_steps: int | None) -> tuple[int, str | None]:
    """Return the warmup steps of a run of so many steps, and a note if they were chosen here.

    Raises:
        ConfigError: the schedule warms up, and longer than the run.
    """
    if not getattr(SCHEDULERS.get(config.training.scheduler.name), "uses_warmup", False):
        return config.training.warmup_steps, None
    with config.locating_errors("training"):
        return resolve_warmup(config.training, total_steps)


def without_effect(config: RunConfig, source: Source) -> list[str]:
    """Return a note for each written setting that another setting overrides."""
    data, training = config.data, config.training
    notes = []
    if data.packing == "document":
        if training.compile in (True, "native"):
            notes.append(
                "training.compile has no effect: with data.packing: document nothing is compiled"
            )
        if training.attention == "explicit":
            notes.append(
                "training.attention has no effect: data.packing: document has its own attention"
            )
    if training.compile == "native" and "attention" in training.model_fields_set:
        notes.append("training.attention has no effect: compile: native has its own attention")
    if "attention" in training.model_fields_set and not uses_attention(config.model):
        notes.append(f"training.attention has no effect: {config.model.family} has no attention")
    if training.bf16_weights is True and (training.precision or "fp32") == "fp32":
        notes.append("training.bf16_weights has no effect with precision fp32")
    if source.tokenizer is not None and "tokenizer" in data.model_fields_set:
        notes.append("data.tokenizer has no effect: the prepared text has its own")
    if source.has_own_split and "split" in data.model_fields_set:
        notes.append("data.split has no effect on text that was split when it was prepared")
    return notes


def slower_types(config: RunConfig, plan: Plan) -> list[str]:
    """Return a note for each use of bfloat16 in which this processor is slower than in float32."""
    optimizer = config.training.optimizer
    asked = {
        "precision: bf16 is slower than fp32": plan.precision == "bf16",
        f"{optimizer.name}'s dtype: bfloat16 is slower than float32": (
            optimizer.options.get("dtype") == "bfloat16"
        ),
    }
    if not any(asked.values()) or not (slower := why_not_bf16(plan.device)):
        return []
    return [
        f"{what}: {slower}; set it to auto or {what.split()[-1]}" for what in asked if asked[what]
    ]


def as_it_began(
    training: TrainingConfig, checkpoint: Manifest, model: ModelFacts, device: torch.device
) -> tuple[TrainingConfig, list[str]]:
    """Return the configuration to resolve for a continued run, and notes for the user.

    Earlier choices stay: another precision would change the results.
    """
    stored = checkpoint.metadata["config"]
    known = stored_config(stored, checkpoint.name).training
    fields = ("precision", "mixed_precision", "bf16_weights", "attention", "compile")
    choices = {name: getattr(known, name) for name in fields}
    said = stored.get("training", {})
    choices |= {
        name: value for name, value in BEFORE_THERE_WAS_A_CHOICE.items() if name not in said
    }
    chosen = known.optimizer.options.get("dtype")
    if training.optimizer.options.get("dtype") == "auto" and chosen is not None:
        options = {**training.optimizer.options, "dtype": chosen}
        choices["optimizer"] = training.optimizer.model_copy(update={"options": options})
    began = training.model_copy(update=choices)
    reason = _why_not_compiled(began, model, device) if began.compile else ""
    if not reason:
        return began, []
    return began.model_copy(update={"compile": False}), [
        f"the run was compiled so far, but this machine cannot compile ({reason}); it continues "
        "without compiled code, and its numbers differ in the last bits"
    ]


def _why_not_compiled(training: TrainingConfig, model: ModelFacts, device: torch.device) -> str:
    """Return why this machine cannot compile for a continued run; empty if it can."""
    if find_compiler() is None:
        return "there is no C++ compiler"
    if training.compile != "native":
        return ""
    if reason := model.why_not_native(device):
        return reason
    try:
        load_library(training.precision)
    except MachineError as error:
        return error.what
    return ""
