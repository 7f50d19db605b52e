"""Which directory a run uses, and whether it starts there or continues.

`auto`   the unfinished run of the same configuration continues; another run's directory is kept,
         and the next free `name-2`, `name-3`, ... is used
`never`  always the next free directory
PATH     the run or checkpoint at PATH continues; a different configuration is refused
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fundamentallm.config import RunConfig
from fundamentallm.config.global_batch import FREE_WITH_EQUAL_ROWS
from fundamentallm.config.yaml.difference import (
    config_differences,
    may_differ_on_resume,
    with_defaults,
)
from fundamentallm.engine.wiring.exactness import Split
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.files.names import numbered
from fundamentallm.files.run_layout import BEFORE_A_CHECKPOINT, RunOrCheckpoint, check_entries
from fundamentallm.inference.stored_model import stored_config
from fundamentallm.training.checkpoint.catalogue import Survey
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.checkpoint.scores import Scores
from fundamentallm.training.checkpoint.snapshot import check_usable
from fundamentallm.training.checkpoint.store import HIDDEN_NAME, CheckpointStore
from fundamentallm.training.decision import STOPPED_BY

BUDGET_FIELDS = ("num_epochs", "total_steps", "max_tokens", "max_seconds")


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run.

    Attributes:
        path: the directory.
        checkpoints: where the run's checkpoints lie.
        checkpoint: the checkpoint to continue from; None for a new run.
        survey: the checkpoints as read; None on a rank that read none.
        note: what to tell the user about the choice; may be empty.
        finished: why the run there is finished; empty if it is not.
    """

    path: Path
    checkpoints: Path
    checkpoint: Manifest | None = None
    note: str = ""
    finished: str = ""
    survey: Survey | None = None


def choose(config: RunConfig, resume: str, run_dir: Path | None) -> RunDirectory:
    """Choose the directory; nothing is written.

    Args:
        config: the configuration as written.
        resume: "auto", "never" or a path.
        run_dir: the user's own choice of a directory; None for `runs/<name>`.

    Raises:
        CheckpointError: the path cannot be resumed, its configuration differs, or the user's
            directory holds something else.
    """
    if resume not in ("auto", "never"):
        return _continue_at(Path(resume), config, run_dir)
    if run_dir is not None:
        return _at(run_dir, config, resume)
    base = Path("runs") / config.name
    differing = ""
    candidates = numbered(base)
    while True:
        candidate = next(candidates)
        is_free = _is_free(candidate, config)
        if resume == "never" and not is_free:
            continue
        check_entries(candidate, config.checkpoints_in(candidate))
        if is_free:
            note = f"a new run starts in {candidate}"
            if differing:
                note += f": {differing}"
            elif resume == "never" and candidate != base:
                note += ": --resume never was given"
            return RunDirectory(
                candidate,
                config.checkpoints_in(candidate),
                note=note if candidate != base else "",
            )
        survey = survey_of(config.checkpoints_in(candidate))
        newest = newest_checkpoint(survey)
        if newest is None:
            continue
        differences = drift(newest, config)
        if not differences:
            return _going_on(candidate, newest, survey)
        differing = differing or f"{candidate} has another configuration ({differences[0]})"


def nowhere(config: RunConfig) -> RunDirectory:
    """Return the directory that a new run would get, for commands that create none."""
    path = Path("runs") / config.name
    return RunDirectory(path, config.checkpoints_in(path))


def drift(manifest: Manifest, config: RunConfig) -> list[str]:
    """Return the differences that make a configuration a different run, as text.

    With a `data.global_batch` of as many rows as the run's steps have, they may be split otherwise.
    """
    differences = config_differences(as_written(manifest), config.model_dump(mode="json"))
    rows, split = config.data.global_batch, Split.saved_in(manifest)
    free = FREE_WITH_EQUAL_ROWS if split is not None and rows == split.rows else frozenset()
    return [
        f"{key}: {was!r} in the run, {now!r} now"
        for key, was, now in differences
        if key not in free and not may_differ_on_resume(key)
    ]


def as_written(manifest: Manifest) -> dict[str, Any]:
    """Return the configuration that a checkpoint's run was started with."""
    return with_defaults(manifest.metadata.get("config_as_written", {}), RunConfig)


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


def _at(path: Path, config: RunConfig, resume: str) -> RunDirectory:
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
    _refuse_drift(newest, config, path)
    return _going_on(path, newest, survey)


def _continue_at(path: Path, config: RunConfig, run_dir: Path | None) -> RunDirectory:
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
    _refuse_drift(manifest, config, path)
    _check_resumable(manifest)
    finished = Scores(named.checkpoints).end_of(manifest)
    has_more_to_do = _has_larger_budget(config, as_written(manifest)["training"])
    if has_more_to_do or finished.startswith(STOPPED_BY):
        finished = ""
    return RunDirectory(run, named.checkpoints, manifest, _note(run, manifest), finished, survey)


def _has_larger_budget(config: RunConfig, saved: Mapping[str, Any]) -> bool:
    budgets = [(getattr(config.training, field), saved[field]) for field in BUDGET_FIELDS]
    return any(now is not None and (was is None or now > was) for now, was in budgets)


def _refuse_drift(manifest: Manifest, config: RunConfig, path: Path) -> None:
    differences = drift(manifest, config)
    if differences:
        raise CheckpointError(
            "the run has a different configuration:\n    " + "\n    ".join(differences),
            where=str(path),
            fix="undo the change, or start a new run with --resume never"
            " (budgets and logging may differ)",
        )


def _going_on(path: Path, newest: Manifest, survey: Survey) -> RunDirectory:
    _check_resumable(newest)
    finished = Scores(survey.store.directory).end_of(newest)
    note = _note(path, newest)
    return RunDirectory(path, survey.store.directory, newest, note, finished, survey)


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


def _note(path: Path, manifest: Manifest) -> str:
    return f"continuing {path} from step {manifest.step}"


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
