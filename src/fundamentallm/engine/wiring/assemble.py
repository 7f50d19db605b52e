"""From a configuration to a connected run: the only place that knows every part.

Read `assemble` from top to bottom as a recipe; a script can copy its lines and change one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.plan import Machine, ModelFacts, Plan
from fundamentallm.compute.processor import why_not_bf16
from fundamentallm.config import DataConfig, RunConfig
from fundamentallm.config.global_batch import with_global_batch
from fundamentallm.config.training import TrainingConfig, resolve_warmup
from fundamentallm.data.loaders import Batching
from fundamentallm.data.overlap import overlap
from fundamentallm.data.permutation import derive_key
from fundamentallm.data.sources import ExampleSource, Loaders, Source, read_source
from fundamentallm.data.tokenizer import (
    TOKENIZERS,
    Tokenizer,
    build_tokenizer,
    tokenizer_from_dict,
)
from fundamentallm.data.tokenizer.tokenizer_json import tokenizer_json
from fundamentallm.engine.tuning.auto import choose_auto
from fundamentallm.engine.tuning.fit import refuse_what_cannot_fit
from fundamentallm.engine.wiring.abilities import check_abilities
from fundamentallm.engine.wiring.bits_per_byte import BitsPerByte, validation_documents
from fundamentallm.engine.wiring.changed_rows import limits_of, rows_of
from fundamentallm.engine.wiring.comparison import keep_own_options, kept_warmup
from fundamentallm.engine.wiring.conflicts import settle_kept_checkpoints, unread_settings
from fundamentallm.engine.wiring.exactness import RULES, Split, refuse_other_rows, versions
from fundamentallm.engine.wiring.run_directory import RunDirectory, describe
from fundamentallm.engine.wiring.starting_point import StartingPoint, starting_point
from fundamentallm.errors import ConfigError, DataError, MachineError
from fundamentallm.files.filesystem import Filesystem, replace_file
from fundamentallm.files.private import check_file
from fundamentallm.files.run_layout import CORPUS
from fundamentallm.inference.stored_model import stored_config
from fundamentallm.models.build import build_model, check_model, uses_attention
from fundamentallm.models.native.library import find_compiler, load_library
from fundamentallm.training.checkpoint.changes import CHANGES, Record, changed_keys
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.clock import seconds_since_start
from fundamentallm.training.handlers import HANDLERS, Handler
from fundamentallm.training.handlers.criterion import Criterion
from fundamentallm.training.limits import Limits
from fundamentallm.training.losses import LOSSES
from fundamentallm.training.metrics import METRICS
from fundamentallm.training.optimizers import OPTIMIZERS, OptimizerBuilder, with_plain_dtype
from fundamentallm.training.schedulers import SCHEDULERS
from fundamentallm.training.trainer import Trainer

logger = logging.getLogger(__name__)

# The default handlers of every run; events decide their order. `handlers:` in a
# configuration adds to these, changes their options, or switches one off with `name: false`.
DEFAULT_HANDLERS: dict[str, dict[str, Any]] = {
    "usage": {},  # first, since it counts the time of the others
    "schedule": {},
    "loss_ema": {},
    "perplexity": {},
    "throughput": {},
    "evaluation": {},
    "checkpointing": {},
    "overfitting": {},
    "nan_rollback": {},
    "spikes": {},
    "signals": {},
    "stop_file": {},
    "progress": {},
    "logs": {},
    "tensorboard": {},
    "samples": {},
}


# The values for checkpoints that lack these fields.
BEFORE_THERE_WAS_A_CHOICE = {"bf16_weights": False, "attention": "flash"}

LEAST_OVERLAP = 0.01  # share of the validation text that causes a warning


@dataclass(frozen=True)
class Inputs:
    """The inputs that a run reads before its model is built.

    Attributes:
        start: where its weights come from; its `config` includes the folder's settings.
        source: the text and its origin.
        tokenizer: between text and token ids.
        loaders: the loaders of this rank.
    """

    start: StartingPoint
    source: Source
    tokenizer: Tokenizer
    loaders: Loaders


@dataclass
class Run:
    """A run with all its parts connected.

    Attributes:
        config: the configuration with everything resolved that the file leaves open.
        directory: the run's directory.
        trainer: ready to `run()`.
        tokenizer: between text and token ids.
        source: the text and its origin.
        notes: decisions to tell the user.
        changes: with which the run went on, in order; the last one now if
            `directory.is_changed`.
    """

    config: RunConfig
    directory: RunDirectory
    trainer: Trainer
    tokenizer: Tokenizer
    source: Source
    notes: list[str]
    changes: list[Record]


def assemble(
    written: RunConfig,
    directory: RunDirectory,
    machine: Machine,
    measuring: bool = True,
    first: Sequence[Handler] = (),
    inputs: Inputs | None = None,
) -> Run:
    """Build every part of a run and connect them.

    From a configuration to the first step: a folder to start from fills in its sizes; the text
    becomes tokens, and tokens become loaders; text and loaders fill in the sizes and budgets that
    the file leaves open, and the plan says how this machine computes them, by measuring where it
    says `auto`; the model is built and put in its place; optimizer, schedule and loss use its
    parameters; the trainer makes the step of them; the handlers listen to it.

    Args:
        written: the configuration as written; its names were checked (`check_names`).
        directory: the run's directory, and the checkpoint that it continues from.
        machine: where it computes, from `open_machine`.
        measuring: measure what `auto` leaves open, in a new run.
        first: handlers that listen before those of the configuration.
        inputs: what was read before, with `written` in its `start`; None reads it.

    Raises:
        FundamentaLLMError: of the class that fits the part that cannot be built.
    """
    begins, ranks = directory.checkpoint is None, machine.ranks

    # data feeds
    if inputs is None:
        inputs = read_inputs(written, directory, ranks)
        if begins and ranks.is_writer:
            warn_of_overlap(written.data, inputs.source, inputs.tokenizer)
    source, tokenizer = inputs.source, inputs.tokenizer
    train_loader, val_loader, num_tokens = inputs.loaders

    # the plan says how
    changes = changes_of(directory, inputs, ranks)
    config, plan, notes = resolve(inputs, directory, machine, changes)
    notes += unread_settings(written)
    with config.locating_errors("model"):
        refuse_what_cannot_fit(config, plan.device)
    if measuring and begins:
        plan, chosen = choose_auto(written, config, plan, train_loader)
        config = plan.applied_to(config)
        notes += chosen
    if begins:
        notes += slower_types(config, plan)
    training = config.training

    # models compute; the ranks share the weights, and then each draws its own dropout
    torch.manual_seed(config.seed)
    with config.locating_errors("model"):
        model = build_model(config.model, inputs.start.load_into)
    model = plan.place(model)
    if not ranks.alone:
        torch.manual_seed(derive_key(config.seed, ranks.rank) % 2**63)

    # training steps
    with config.locating_errors("training.optimizer"):
        optimizer = OptimizerBuilder.from_config(training, model)
    keep_own_options(optimizer, changed_keys(changes))
    with config.locating_errors("training.scheduler"):
        scheduler = SCHEDULERS.build(
            training.scheduler.name,
            training.scheduler.options,
            optimizer=optimizer,
            # If only the clock ends a run, the schedule follows progress, not steps.
            total_steps=training.total_steps or 10**9,
            warmup_steps=training.warmup_steps,
            min_lr=training.min_learning_rate,
            steps_per_epoch=len(train_loader),
        )
    with config.locating_errors("training.loss"):
        loss_fn = LOSSES.build(training.loss.name, training.loss.options)
    check_abilities(config, model, loss_fn)
    trainer = Trainer(
        model,
        train_loader,
        val_loader,
        optimizer,
        scheduler,
        loss_fn,
        plan,
        training,
        first,
        Limits(training.total_steps, training.max_seconds, training.max_tokens),
    )
    trainer.budget.clock = seconds_since_start
    trainer.epochs.rows = rows_of(changes)
    trainer.description = dict(
        describe(
            written,
            config,
            tokenizer=tokenizer.to_dict(),
            data={
                "sha256": source.sha256,
                "num_tokens": num_tokens,
                "response_end": source.response_end,
            },
            rules=RULES,
            versions=versions(),
            circumstances=machine.circumstances(),
            **inputs.start.origin(),
            **({CHANGES: changes} if changes else {}),
        )
    )

    # metrics share the validation pass
    documents = validation_documents(source, val_loader, tokenizer, config.data.split)
    BitsPerByte(val_loader, documents, tokenizer).attach(trainer.evaluator)
    for name, component in config.evaluation.metrics.items():
        with config.locating_errors(f"evaluation.metrics.{name}"):
            metric = METRICS.build(
                component.name, component.options, device=plan.device, tokenizer=tokenizer
            )
        metric.attach(trainer.evaluator, name)

    # handlers listen
    def split_texts(part: str, limit: int) -> Iterator[tuple[str, str]]:
        return source.texts(part, tokenizer, config.data.split, limit)

    criteria: dict[str, Criterion] = {}
    for name, options in chosen_handlers(config).items():
        with config.locating_errors(f"handlers.{name}"):
            handler = HANDLERS.build(
                name,
                options,
                scheduler=scheduler,
                tokenizer=tokenizer,
                split_texts=split_texts,
                run_dir=directory.path,
                checkpoint_dir=directory.checkpoints,
                n_saved=training.keep_last,
                seed=config.seed,
            )
        handler.attach(trainer)
        if isinstance(criterion := getattr(handler, "criterion", None), Criterion):
            criteria[name] = criterion
    for name, criterion in criteria.items():
        with config.locating_errors(f"handlers.{name}"):
            criterion.require(trainer)
    return Run(config, directory, trainer, tokenizer, source, notes, changes)


def changes_of(directory: RunDirectory, inputs: Inputs, ranks: Ranks) -> list[Record]:
    """Return the changes with which a run went on, and does now."""
    changes = list(directory.changes)
    if directory.changes_rows:
        assert directory.checkpoint is not None
        saved, now = Split.saved_in(directory.checkpoint), Split.of(inputs.start.config, ranks)
        if saved is not None:
            changes[-1] = {**changes[-1], "rows": [saved.rows, now.rows]}
    return changes


def read_inputs(written: RunConfig, directory: RunDirectory, ranks: Ranks) -> Inputs:
    """Read the source and the tokenizer, and build the loaders of this rank.

    Raises:
        FundamentaLLMError: as `settle_kept_checkpoints`, `with_global_batch`, `refuse_other_rows`,
            `starting_point`, `read_data`, `choose_tokenizer`, `build_loaders`.
    """
    settled = settle_kept_checkpoints(written, begins=directory.checkpoint is None)
    agreed = with_global_batch(settled, ranks.world_size)
    if directory.checkpoint is not None and not directory.changes_rows:
        refuse_other_rows(directory.checkpoint, agreed, ranks)
    start = starting_point(agreed, directory)
    source = read_data(start.config.data, directory, ranks)
    tokenizer = choose_tokenizer(start.config, source, start.tokenizer(), directory)
    start.check_tokenizer(tokenizer)
    loaders = build_loaders(start.config, source, tokenizer, ranks)
    return Inputs(start, source, tokenizer, loaders)


def chosen_handlers(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Merge the configuration's handlers over the default set."""
    chosen = {name: dict(options) for name, options in DEFAULT_HANDLERS.items()}
    for name, options in config.handlers.items():
        if options is False:
            chosen.pop(name, None)
        else:
            chosen[name] = {} if options is True else dict(options)
    return chosen


def check_names(config: RunConfig) -> None:
    """Check every component's name and options before any data is read.

    Raises:
        ConfigError: with the file and line of the fault.
    """
    training = config.training
    with config.locating_errors("model"):
        check_model(config.model)
    for key, registry, component in (
        ("data.tokenizer", TOKENIZERS, config.data.tokenizer),
        ("training.optimizer", OPTIMIZERS, training.optimizer),
        ("training.scheduler", SCHEDULERS, training.scheduler),
        ("training.loss", LOSSES, training.loss),
    ):
        with config.locating_errors(key):
            registry.check(component.name, component.options)
    choose_warmup(config, training.total_steps)
    for name, metric in config.evaluation.metrics.items():
        with config.locating_errors(f"evaluation.metrics.{name}"):
            METRICS.check(metric.name, metric.options)
    for name, options in config.handlers.items():
        with config.locating_errors(f"handlers.{name}"):
            HANDLERS.check(name, options if isinstance(options, dict) else {})


def choose_warmup(config: RunConfig, total_steps: int | None) -> tuple[int, str | None]:
    """Return the warmup steps of a run of so many steps, and a note if they were chosen here.

    Raises:
        ConfigError: the schedule warms up, and longer than the run.
    """
    if not getattr(SCHEDULERS.get(config.training.scheduler.name), "uses_warmup", False):
        return config.training.warmup_steps, None
    with config.locating_errors("training"):
        return resolve_warmup(config.training, total_steps)


def open_machine(config: RunConfig, join: bool = False) -> Machine:
    """Find the device and the ranks of a configuration, and set its number of threads.

    Raises:
        ConfigError, MachineError: as `Machine.open`.
    """
    with config.locating_errors("training.device"):
        return Machine.open(config.training.device, config.training.threads, join)


def read_data(data: DataConfig, directory: RunDirectory, ranks: Ranks) -> Source:
    """Read the source, or the copy of a built-in one that the run keeps.

    The text of a built-in source can differ between two Python releases, so a run that is continued
    elsewhere must not read it again.

    Raises:
        DataError: the source cannot be used.
        CheckpointError: it differs from the source that the run started with.
    """
    if not ranks.is_writer:
        ranks.barrier()  # the first rank downloads, the others find it in the cache
    source = read_run_source(data, directory.path)
    if ranks.is_writer:
        ranks.barrier()
    if directory.checkpoint is not None:
        source.require_unchanged(
            directory.checkpoint.metadata["data"]["sha256"],
            fix="restore the text, or start a new run with --resume never",
        )
    return source


def read_run_source(data: DataConfig, run: Path) -> Source:
    """Read a run's source, with the run's copies in place of built-in texts.

    Raises:
        DataError: as `read_source`.
    """
    copy = run / CORPUS
    check_file(copy, writing=False)
    return read_source(
        str(copy) if copy.exists() else data.chosen_sources,
        kept=run,
        response_end=data.response_end,
    )


def choose_tokenizer(
    config: RunConfig, source: Source, given: Tokenizer | None, directory: RunDirectory
) -> Tokenizer:
    """Return the tokenizer of the token files, of the `init_from` folder, or of the configuration.

    A continued run takes the tokenizer of its checkpoint, so it is not trained again.

    Raises:
        ConfigError: the configured one cannot be built.
        DataError: the text does not suit it, or token files were made with another one than the
            weights to start from.
    """
    if source.tokenizer is not None:
        if given is not None and tokenizer_json(given) != tokenizer_json(source.tokenizer):
            raise DataError(
                "the tokens were made with another tokenizer than the weights of init_from",
                where=source.name,
                got=f"tokenizer {source.tokenizer.fingerprint()[:16]}",
                expected=f"tokenizer {given.fingerprint()[:16]}",
                fix="prepare the text with --tokenizer and the tokenizer.json in the folder of"
                " model.init_from",
            )
        return source.tokenizer
    if given is not None:
        return given
    if directory.checkpoint is not None:
        return tokenizer_from_dict(directory.checkpoint.metadata["tokenizer"])
    chosen = config.data.tokenizer
    with config.locating_errors("data.tokenizer"):
        return build_tokenizer(chosen.name, chosen.options, source.text)


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


def warn_of_overlap(data: DataConfig, source: Source, tokenizer: Tokenizer) -> None:
    """Warn if validation text also occurs in the training text."""
    share = overlap(source, tokenizer, data.split)
    if share >= LEAST_OVERLAP:
        logger.warning(
            "%.1f %% of the validation text is in the training text too, so its loss says less"
            " about new text; `prepare --split document` puts equal documents into the same part",
            100 * share,
        )


def build_loaders(config: RunConfig, source: Source, tokenizer: Tokenizer, ranks: Ranks) -> Loaders:
    """Split the source into its parts and build the loaders for training and validation.

    Raises:
        DataError: there is too little, or an example does not fit.
    """
    batching = Batching(
        config.data.sequence_length,
        config.data.batch_size,
        config.training.accumulation_steps,
        config.seed,
        ranks.rank,
        ranks.world_size,
    )
    end_id = end_of_documents(config, source)
    return source.loaders(tokenizer, config.data.split, batching, end_id)


def end_of_documents(config: RunConfig, source: Source) -> int | None:
    """Return the end id for packed documents; None without document packing.

    Raises:
        ConfigError: they must be separate, but nothing marks where a document ends.
    """
    if config.data.packing == "continuous" or isinstance(source, ExampleSource):
        return None  # an example is always a separate row
    if source.end_id is None:
        with config.locating_errors("data.packing"):
            raise ConfigError(
                "nothing in this source marks where a document ends",
                got="packing: document",
                fix="run `prepare` on the text, and set data.source to its folder",
            )
    return source.end_id


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
    model = config.model.model_copy(
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


def keep_texts(run: Run) -> None:
    """Store the text of built-in sources beside the run."""
    for name, text in run.source.kept_texts().items():
        path = run.directory.path / name
        if not path.exists():
            replace_file(Filesystem(), path, [text.encode()])
