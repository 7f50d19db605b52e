"""From a configuration to a connected run: the only place that knows every part.

Read `assemble` from top to bottom as a recipe; a script can copy its lines and change one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.plan import Machine
from fundamentallm.config import RunConfig
from fundamentallm.data.permutation import derive_key
from fundamentallm.data.sources import Source
from fundamentallm.data.tokenizer import TOKENIZERS, Tokenizer
from fundamentallm.engine.tuning.auto import choose_auto
from fundamentallm.engine.tuning.fit import refuse_what_cannot_fit
from fundamentallm.engine.wiring.abilities import check_abilities
from fundamentallm.engine.wiring.bits_per_byte import BitsPerByte, validation_documents
from fundamentallm.engine.wiring.changed_rows import rows_of
from fundamentallm.engine.wiring.comparison import keep_own_options
from fundamentallm.engine.wiring.conflicts import unread_settings
from fundamentallm.engine.wiring.exactness import RULES, Split, versions
from fundamentallm.engine.wiring.inputs import Inputs, read_inputs, warn_of_overlap
from fundamentallm.engine.wiring.resolving import choose_warmup, resolve, slower_types
from fundamentallm.engine.wiring.run_directory import RunDirectory, describe
from fundamentallm.files.filesystem import Filesystem, replace_file
from fundamentallm.models.build import build_model, check_model
from fundamentallm.training.checkpoint.changes import CHANGES, Record, changed_keys
from fundamentallm.training.clock import seconds_since_start
from fundamentallm.training.handlers import HANDLERS, Handler
from fundamentallm.training.handlers.criterion import Criterion
from fundamentallm.training.limits import Limits
from fundamentallm.training.losses import LOSSES
from fundamentallm.training.metrics import METRICS
from fundamentallm.training.optimizers import OPTIMIZERS, OptimizerBuilder
from fundamentallm.training.schedulers import SCHEDULERS
from fundamentallm.training.trainer import Trainer

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


def open_machine(config: RunConfig, join: bool = False) -> Machine:
    """Find the device and the ranks of a configuration; set its threads and choice of kernels.

    Raises:
        ConfigError, MachineError: as `Machine.open`.
    """
    with config.locating_errors("training.device"):
        training = config.training
        return Machine.open(training.device, training.threads, join, training.deterministic)


def keep_texts(run: Run) -> None:
    """Store the text of built-in sources beside the run."""
    for name, text in run.source.kept_texts().items():
        path = run.directory.path / name
        if not path.exists():
            replace_file(Filesystem(), path, [text.encode()])
