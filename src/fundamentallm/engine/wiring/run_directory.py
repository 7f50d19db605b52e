"""Which directory a run uses, and whether it starts there or continues.

`auto`   the run of the same configuration continues, or one that differs in a budget alone; another
         run's directory is kept, and the next free `name-2`, `name-3`, ... is used
`never`  always the next free directory
PATH     the run or checkpoint at PATH continues; a different configuration is refused

With `--change` a run continues although more than a budget differs (`comparison.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fundamentallm.config import RunConfig
from fundamentallm.engine.wiring.comparison import FLAG, Comparison, Position
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.files.names import numbered
from fundamentallm.files.run_layout import (
    BEFORE_A_CHECKPOINT,
    RUNS,
    RunOrCheckpoint,
    check_entries,
)
from fundamentallm.inference.stored_model import stored_config
from fundamentallm.training.checkpoint.catalogue import Survey
from fundamentallm.training.checkpoint.changes import Record, records_in
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.checkpoint.scores import Scores
from fundamentallm.training.checkpoint.snapshot import check_usable
from fundamentallm.training.checkpoint.store import HIDDEN_NAME, CheckpointStore
from fundamentallm.training.decision import LAST_STEP, STOPPED_BY, USED_UP


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run.

    Attributes:
        path: the directory.
        checkpoints: where the run's checkpoints lie.
        checkpoint: the checkpoint to continue from; None for a new run.
        note: what to tell the user about the choice; may be empty.
        finished: why the run there is finished; empty if it is not.
        survey: the checkpoints as read; None on a rank that read none.
        changes: those with which the run went on before, and last the one with which it does now.
        is_changed: whether there is one with which it does now.
        changes_rows: whether a step now has other rows than before.
    """

    path: Path
    checkpoints: Path
    checkpoint: Manifest | None = None
    note: str = ""
    finished: str = ""
    survey: Survey | None = None
    changes: Sequence[Record] = ()
    is_changed: bool = False
    changes_rows: bool = False

    @property
    def changed(self) -> tuple[Sequence[Record], bool, bool]:
        """What the other ranks are to know of the changes: the last three fields."""
        return self.changes, self.is_changed, self.changes_rows


@dataclass(frozen=True)
class _Found:
    """A run that may go on.

    Attributes:
        path: its directory.
        newest: the checkpoint to continue from.
        survey: its checkpoints.
        comparison: of its configuration with the present one.
    """

    path: Path
    newest: Manifest
    survey: Survey
    comparison: Comparison


def choose(
    config: RunConfig, resume: str, run_dir: Path | None, change: bool = False
) -> RunDirectory:
    """Choose the directory; nothing is written.

    Args:
        config: the configuration as written.
        resume: "auto", "never" or a path.
        run_dir: the user's own choice of a directory; None for `runs/<name>`.
        change: the user accepts a changed configuration of the run that goes on.

    Raises:
        CheckpointError: the path cannot be resumed, its configuration differs, or the user's
            directory holds something else.
        ConfigError: the arguments contradict each other.
    """
    if resume == "never" and change:
        raise ConfigError(
            f"{FLAG} goes on with a run, but --resume never asks for a new one",
            fix="remove one of them",
        )
    if resume not in ("auto", "never"):
        return _continue_at(Path(resume), config, run_dir, change)
    if run_dir is not None:
        return _at(run_dir, config, resume, change)
    return _in_runs(config, resume, change)


def _in_runs(config: RunConfig, resume: str, change: bool) -> RunDirectory:
    """Choose among `runs/name`, `runs/name-2`, and so on.

    The run of this configuration goes on; else the first that differs from it in a budget alone;
    else, with `change`, the only one; else a new one starts.
    """
    base = RUNS / config.name
    near: list[_Found] = []
    others: list[_Found] = []
    candidates = numbered(base)
    while True:
        candidate = next(candidates)
        is_free = _is_free(candidate, config)
        if resume == "never" and not is_free:
            continue
        check_entries(candidate, config.checkpoints_in(candidate))
        if is_free:
            break
        survey = survey_of(config.checkpoints_in(candidate))
        newest = newest_checkpoint(survey)
        if newest is None:
            continue
        found = _Found(candidate, newest, survey, Comparison.of(newest, config))
        if not found.comparison.differs:
            return _going_on(found, change)
        (others if found.comparison.others else near).append(found)
    if near:
        return _going_on(near[0], change)
    if change and others:
        if len(others) > 1:
            raise ConfigError(
                f"{FLAG} could mean several runs",
                got=", ".join(str(found.path) for found in others),
                fix=f"name one: --resume {others[-1].path} {FLAG}",
            )
        return _going_on(others[0], change)
    note = f"a new run starts in {candidate}"
    if others:
        first = others[0]
        note += f": {first.path} has another configuration ({first.comparison.others[0]})"
        if first.comparison.can_be_changed:
            note += f"; {FLAG} would go on with it"
    elif resume == "never" and candidate != base:
        note += ": --resume never was given"
    checkpoints = config.checkpoints_in(candidate)
    return RunDirectory(candidate, checkpoints, note=note if candidate != base else "")


def nowhere(config: RunConfig) -> RunDirectory:
    """Return the directory that a new run would get, for commands that create none."""
    path = RUNS / config.name
    return RunDirectory(path, config.checkpoints_in(path))


def survey_of(checkpoints: Path) -> Survey:
    """Return a survey of a run's checkpoints; none of them is read yet."""
    return Survey(CheckpointStore(checkpoints), check_usable)


def newest_checkpoint(survey: Survey, pointer: str = "") -> Manifest | None:
    """Return the checkpoint that a pointer names, else the newest that is whole and finite.

    Raises:
        CheckpointError: there are checkpoints, and none of them is.
    """
    newest = survey.newest(pointer)
    if newest is None and survey.faults:
        raise CheckpointError(
            "the run cannot continue: it has no usable checkpoint",
            where=str(survey.store.directory),
            got="\n            ".join(str(f).splitlines()[0] for f in survey.faults.values()),
            fix="restore a copy, or start a new run with --resume never",
        )
    return newest


def _at(path: Path, config: RunConfig, resume: str, change: bool) -> RunDirectory:
    check_entries(path, config.checkpoints_in(path))
    if _is_free(path, config):
        return RunDirectory(path, config.checkpoints_in(path))
    survey = survey_of(config.checkpoints_in(path))
    newest = newest_checkpoint(survey)
    if newest is None:
        raise CheckpointError(
            "the directory is not empty and holds no run",
            where=str(path),
            fix="choose an empty or new directory with --run-dir",
        )
    if resume == "never":
        raise CheckpointError(
            "the directory holds a run, but --resume never asks for a new one",
            where=str(path),
            fix="choose a new directory with --run-dir, or remove --resume never",
        )
    return _going_on(_Found(path, newest, survey, Comparison.of(newest, config)), change)


def _continue_at(path: Path, config: RunConfig, run_dir: Path | None, change: bool) -> RunDirectory:
    named = RunOrCheckpoint.parse(path, config.checkpoints_in)
    run = path if named.is_run else config.run_of(named.checkpoints)
    check_entries(run, named.checkpoints)
    survey = survey_of(named.checkpoints)
    manifest = (
        survey.open(named.checkpoint)
        if named.checkpoint
        else newest_checkpoint(survey, named.pointer)
    )
    if manifest is None:
        raise CheckpointError("there is no checkpoint in this run", where=str(path))
    if run_dir is not None and run_dir.resolve() != run.resolve():
        raise ConfigError(
            "--resume continues in the directory of its run, but --run-dir names another",
            got=f"--run-dir {run_dir}",
            expected=str(run),
            fix="remove --run-dir",
        )
    found = _Found(run, manifest, survey, Comparison.of(manifest, config))
    return _going_on(found, change, named=path)


def _going_on(found: _Found, change: bool, named: Path | None = None) -> RunDirectory:
    """Go on with a run, or say that it is finished.

    Args:
        found: the run.
        change: the user accepts a changed configuration.
        named: the path by which the user named it; None if it was found.

    Raises:
        CheckpointError: its configuration differs too much, or its checkpoint cannot be used.
    """
    manifest, survey, comparison = found.newest, found.survey, found.comparison
    where = str(named or found.path)
    comparison.refuse_others(where, change)
    _check_resumable(manifest)
    checkpoints = survey.store.directory
    finished = Scores(checkpoints).end_of(manifest)
    position = None
    if comparison.differs:
        position = Position.of(survey.look(manifest.name), manifest.name)
        is_new_end = bool(comparison.budgets) or finished not in (LAST_STEP, USED_UP)
        if is_new_end and not position.spent(comparison.config.training):
            finished = ""
    if named is not None and finished.startswith(STOPPED_BY):
        finished = ""
    note, changes = f"continuing {found.path} from step {manifest.step}", records_in(manifest)
    is_changed = position is not None and not finished
    if position is not None and not finished:
        moves = comparison.moves_schedule(position)
        if moves and not change:
            comparison.refuse_moved_schedule(where)
        note += comparison.in_words(moves)
        changes.append(comparison.record(position))
    return RunDirectory(
        found.path,
        checkpoints,
        manifest,
        note,
        finished,
        survey,
        changes,
        is_changed,
        is_changed and comparison.changes_rows,
    )


def _check_resumable(manifest: Manifest) -> None:
    """Refuse a checkpoint that lacks what a run has to be told to go on from it.

    Raises:
        CheckpointError: so it is, or its configuration is not one of this version.
    """
    for part in ("config", "tokenizer", "data"):
        if part not in manifest.metadata:
            raise CheckpointError(
                "the checkpoint does not say what its run was trained with",
                where=manifest.name,
                got=f"no {part} in its manifest",
                fix="name a checkpoint that `run` wrote, or start a fresh run with --resume never",
            )
    if "sha256" not in manifest.metadata["data"]:
        raise CheckpointError(
            "the checkpoint does not say which text its run was trained on",
            where=manifest.name,
            fix="start a fresh run with --resume never",
        )
    stored_config(manifest.metadata["config"], manifest.name)


def _is_free(path: Path, config: RunConfig) -> bool:
    """Whether a new run may start here: the directory is missing or has no checkpoint."""
    if not path.exists():
        return True
    if not path.is_dir():
        return False
    checkpoints = config.checkpoints_in(path)
    if checkpoints.is_dir() and any(not _is_torn(entry) for entry in checkpoints.iterdir()):
        return False
    # The files of a run that ended before its first checkpoint.
    left = {*BEFORE_A_CHECKPOINT, checkpoints.name}
    return all(
        entry.name in left
        or _is_torn(entry)
        or (entry.name.startswith(("corpus", "stacks-rank-")) and entry.suffix == ".txt")
        for entry in path.iterdir()
    )


def _is_torn(path: Path) -> bool:
    """Whether a killed process was still writing this; it is never read."""
    hidden = HIDDEN_NAME.fullmatch(path.name)
    return hidden is not None and hidden["kind"] == "tmp"


def describe(config: RunConfig, resolved: RunConfig, **parts: Any) -> Mapping[str, Any]:
    """Return the description of the run in each checkpoint's manifest."""
    return {
        "config_as_written": config.model_dump(mode="json"),
        "config": resolved.model_dump(mode="json"),
        **parts,
    }
