"""The `run` command: train from a YAML file."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fundamentallm.compute.distributed import Ranks, leave_ranks
from fundamentallm.compute.plan import Machine
from fundamentallm.compute.watchdog import Watchdog, watched
from fundamentallm.config import RunConfig, load_config
from fundamentallm.engine.arguments import RUN_DIR, is_run_dir
from fundamentallm.engine.console import (
    command,
    console_output,
    logging_to,
    printable,
    program,
    say,
)
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.engine.stopping import signal_in_words
from fundamentallm.engine.wiring import run_directory
from fundamentallm.engine.wiring.assemble import (
    Run,
    assemble,
    check_names,
    keep_texts,
    open_machine,
)
from fundamentallm.engine.wiring.comparison import Position
from fundamentallm.engine.wiring.exactness import (
    refuse_other_rules,
    refuse_other_versions,
    tell_other_circumstances,
    tell_other_split,
)
from fundamentallm.engine.wiring.further import TypedCommand, ended_by, is_budget
from fundamentallm.engine.wiring.run_directory import RunDirectory
from fundamentallm.engine.wiring.run_readme import lists_changes, run_readme
from fundamentallm.errors import DataError, FundamentaLLMError, MachineError
from fundamentallm.files.filesystem import Filesystem, replace_file
from fundamentallm.files.lock import refuse_if_owned, run_lock
from fundamentallm.files.private import make_directory, open_to_read
from fundamentallm.files.run_layout import BEST, CONFIG, LAST, LOG, README, SAMPLES, TENSORBOARD
from fundamentallm.training.checkpoint.changes import in_words
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.checkpoint.scores import Scores
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.handlers.phases import Phases
from fundamentallm.training.metrics import named_metrics

logger = logging.getLogger(__name__)


def run(
    config_path: Path,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    run_dir: Path | None = None,
    plugins: Sequence[str] = (),
    allow_inexact: bool = False,
    change: bool = False,
) -> int:
    """Start or continue the run that a configuration describes.

    Returns:
        The exit code: 0, or 128 + n after signal n, with the state saved.

    Raises:
        FundamentaLLMError: of the class of the fault.
    """
    for word in overrides:
        if is_run_dir(word):
            run_dir = Path(word.removeprefix(RUN_DIR))
    overrides = [word for word in overrides if not is_run_dir(word)]
    config = load_config(config_path, overrides)
    machine = open_machine(config, join=True)
    ranks = machine.ranks
    try:
        patience = config.parallel.patience
        with (
            console_output(quiet=not ranks.is_writer),
            watched(ranks, patience.step, patience.save) as watchdog,
        ):
            load_plugins([*config.plugins, *plugins], config.locate("plugins"))
            check_names(config)
            directory = agree_on_directory(config, resume, run_dir, ranks, change)
            options = [word for module in plugins for word in ("--plugins", module)]
            options += ["--allow-inexact"] * allow_inexact
            typed = TypedCommand(config_path, overrides, options, resume, run_dir, change)
            if directory.finished:
                if ranks.is_writer:
                    _tell_finished(config, directory, typed)
                return 0
            if ranks.is_writer:
                refuse_if_owned(directory.path)
            if directory.note and ranks.is_writer:
                logger.info("%s", directory.note)
            if directory.checkpoint is not None:
                refuse_other_rules(directory.checkpoint)
                refuse_other_versions(directory.checkpoint, allow_inexact)
            return _train(config, directory, machine, typed, watchdog)
    except RuntimeError as error:
        if ranks.alone or not ("gloo" in str(error) or isinstance(error, dist.DistError)):
            raise
        raise MachineError(
            "another rank has ended or cannot be reached",
            where=f"rank {ranks.rank}",
            got=str(error).splitlines()[0],
            fix="read the messages of the other ranks, then start all ranks again to continue",
        ) from error
    finally:
        leave_ranks()


def agree_on_directory(
    config: RunConfig, resume: str, run_dir: Path | None, ranks: Ranks, change: bool = False
) -> RunDirectory:
    """Let the first rank choose, and every rank use its choice."""
    if ranks.alone:
        return run_directory.choose(config, resume, run_dir, change)
    chosen: list[RunDirectory] = []

    def decide() -> list[Any]:
        directory = run_directory.choose(config, resume, run_dir, change)
        chosen.append(directory)
        name = directory.checkpoint.name if directory.checkpoint else ""
        place = [str(directory.path), str(directory.checkpoints), name]
        return [*place, directory.note, directory.finished, *directory.changed]

    path, checkpoints, name, note, finished, *changed = ranks.first_decides(decide)
    if ranks.is_writer:
        return chosen[0]  # with the checkpoints that it has read
    manifest = CheckpointStore(checkpoints).manifest(Path(checkpoints) / name) if name else None
    return RunDirectory(Path(path), Path(checkpoints), manifest, note, finished, None, *changed)


def _train(
    config: RunConfig,
    directory: RunDirectory,
    machine: Machine,
    typed: TypedCommand,
    watchdog: Watchdog | None,
) -> int:
    """Train.

    Args:
        config: as written.
        directory: of the run.
        machine: where it computes.
        typed: the user's command.
        watchdog: of this rank; None without one.
    """
    if watchdog is not None:
        watchdog.folder = directory.path
    run = assemble(config, directory, machine, first=[Phases(watchdog)] if watchdog else [])
    trainer, ranks = run.trainer, machine.ranks
    with contextlib.ExitStack() as held:
        if ranks.is_writer:
            make_directory(directory.path)
            held.enter_context(run_lock(directory.path))
            text = run.config.to_yaml()
            replace_file(Filesystem(), directory.path / CONFIG, [text.encode()])
            if run.changes or _readme_is_stale(directory.path / README):
                text = run_readme(directory.path, directory.checkpoints, program(), run.changes)
                replace_file(Filesystem(), directory.path / README, [text.encode()])
            keep_texts(run)
            held.enter_context(logging_to(directory.path / LOG))
        ranks.barrier()
        if ranks.is_writer:
            _announce(run)
        if directory.checkpoint is not None:
            if not directory.changes_rows:
                tell_other_split(directory.checkpoint, run.config, ranks)
            tell_other_circumstances(directory.checkpoint, machine)
            if watchdog is not None:
                watchdog.enter("load", directory.checkpoint.step)
            trainer.resume(directory.checkpoints / directory.checkpoint.name, directory.survey)
        trainer.run()
        if trainer.interrupted_by is not None and not trainer.finished:
            if ranks.is_writer:
                logger.info(
                    "stopped by %s, saved at step %d; %s command goes on: %s",
                    signal_in_words(trainer.interrupted_by),
                    trainer.state.iteration,
                    "the same" if typed.resume == "auto" else "this",
                    typed.again(directory.path),
                )
            return 128 + trainer.interrupted_by
        if ranks.is_writer:
            _conclude(run, typed)
    return 0


def _readme_is_stale(path: Path) -> bool:
    """Return whether a run without changes has no README, or one that lists some."""
    if not path.exists():
        return True
    with open_to_read(path) as file:
        return lists_changes(file.readall().decode(errors="replace"))


def _announce(run: Run) -> None:
    trainer, config = run.trainer, run.config
    loader = trainer.train_loader
    for note in run.notes:
        logger.info("%s", note)
    if run.directory.is_changed:
        for words in in_words(run.changes[-1]):
            logger.info("change after step %d: %s", run.changes[-1]["step"], words)
    logger.info("validation: %s", run.source.validation_in_words(config.data.split))
    num_targets = getattr(trainer.val_loader, "num_tokens", 0)
    if num_targets < config.data.sequence_length and config.data.split[1]:
        logger.warning(
            "the validation part has %d tokens to predict, fewer than the context of %d, so its"
            " loss says little; raise the second fraction of data.split, or add text",
            num_targets,
            config.data.sequence_length,
        )
    num_parameters = sum(p.numel() for p in trainer.model.parameters())
    steps = (
        f"{trainer.total_steps:,} steps"
        if trainer.total_steps
        else (f"{trainer.budget.limits.max_seconds:g} seconds")
    )
    logger.info(
        "text: %s, SHA-256 %s; %s tokens in a vocabulary of %d",
        f"{len(run.source.text):,} characters" if run.source.text else run.source.name,
        run.source.sha256[:16],
        f"{run.trainer.description['data']['num_tokens']:,}",
        run.tokenizer.vocab_size,
    )
    logger.info(
        "model: %s parameters; %s of %s tokens, %d steps an epoch, on %s in %s%s",
        f"{num_parameters:,}",
        steps,
        f"{loader.tokens_per_step:,}",
        trainer.steps_per_epoch,
        trainer.device,
        config.training.precision,
        "" if trainer.ranks.alone else f" on {trainer.ranks.world_size} ranks",
    )
    logger.info("run directory: %s", run.directory.path)


def _conclude(run: Run, typed: TypedCommand) -> None:
    """Print how it ended, a sample, and the next commands."""
    trainer = run.trainer
    state = trainer.state
    path = run.directory.path
    if not trainer.finished:
        say(f"Saved at step {state.iteration}. Continue with: {typed.again(path)}")
        return
    say()
    say(
        f"Done: {state.iteration:,} steps, {state.tokens_seen:,} tokens"
        f" in {trainer.budget.elapsed_seconds():.0f} s ({trainer.finished})."
        + (f" Updates refused: {state.skipped_steps:,}." if state.skipped_steps else "")
    )
    best = _pointed(run.directory, BEST)
    if "val/loss" in state.metrics:
        scores = Scores(run.directory.checkpoints)
        say(
            f"Validation loss {state.metrics['val/loss']:.4f}"
            + (_in_words(scores, best) if best is not None else "")
            + f"{named_metrics(state.metrics)}."
        )
    samples = run.directory.path / SAMPLES
    if samples.exists():
        with open_to_read(samples) as file:
            lines = file.readall().decode().splitlines()
        if lines:
            say()
            sample = json.loads(lines[-1])
            say("It writes:")
            say(printable(sample["text"]))
            origin = f"by the weights of step {sample['step']:,}"
            if best is not None and best.step != sample["step"]:
                origin += f"; `generate` uses the best checkpoint, of step {best.step:,}"
            say(f"({origin})")
    say()
    say("Next:")
    say(f"  {command('generate', path, '--prompt', _prompt_for(run))}")
    say(f"  {command('evaluate', path)}")
    say(f"  {command('report', path)}")
    curves = shlex.join(["tensorboard", "--logdir", str(path / TENSORBOARD)])
    say(f"  {curves}    # pip install tensorboard")
    last = _pointed(run.directory, LAST)
    seconds = trainer.budget.elapsed_seconds()
    position = Position(state.iteration, state.tokens_seen, seconds, trainer.epochs)
    # The file may have been edited into something else since the run began.
    with contextlib.suppress(FundamentaLLMError):
        if last is not None:
            on = typed.further(path, last, position, trainer.finished)
            say(f"  {on}    # train it further")


def _prompt_for(run: Run) -> str:
    """Return the beginning of a text if the vocabulary has its characters."""
    try:
        run.tokenizer.encode("The ")
    except DataError:
        text = run.source.beginning(run.tokenizer)
        return (text.split() or [text[:1]])[0]
    return "The "


def _in_words(scores: Scores, best: Manifest) -> str:
    """Return what makes the best checkpoint the best, in brackets; empty if that is unknown."""
    score = scores.of(best)
    if score is not None and score.value is not None:
        return f" (best {score.metric} {score.value:.4g} at step {best.step})"
    loss = scores.val_loss(best)
    return f" (best {loss:.4f})" if loss is not None else ""


def _pointed(directory: RunDirectory, pointer: str) -> Manifest | None:
    """Return the manifest of the best or the last checkpoint, also of earlier processes."""
    store = CheckpointStore(directory.checkpoints)
    checkpoint = store.resolve(pointer)
    return store.manifest(checkpoint) if checkpoint is not None else None


def _tell_finished(config: RunConfig, directory: RunDirectory, typed: TypedCommand) -> None:
    """Say why a run is finished, and the commands for more of it and for a new one."""
    manifest, finished, survey = directory.checkpoint, directory.finished, directory.survey
    assert manifest is not None
    assert survey is not None
    position = Position.of(survey.look(manifest.name), manifest.name)
    reason = ended_by(config.training, position, finished)
    say(f"The run in {directory.path} is finished: {reason}.")
    budget = ", give it a larger budget, in the file or here" if is_budget(finished) else ""
    say(f"To train it further{budget}:")
    say(f"  {typed.further(directory.path, manifest, position, finished)}")
    say("To start a new run:")
    say(f"  {typed.fresh()}")
