"""Which directory a run uses, and whether it begins there or goes on.

`auto`   the unfinished run of the same configuration goes on; another one's directory is left
         alone and the next free `name-2`, `name-3`, ... is taken
`never`  always the next free directory
PATH     the run or checkpoint at PATH goes on; a configuration that differs is refused
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fundamentallm.config import RunConfig
from fundamentallm.config.difference import RESUME_MAY_DIFFER, config_differences
from fundamentallm.errors import CheckpointError
from fundamentallm.training.manifest import Manifest
from fundamentallm.training.store import CheckpointStore

BUDGET_FIELDS = ("num_epochs", "total_steps", "max_tokens", "max_seconds")


@dataclass(frozen=True)
class RunDirectory:
    """The place of a run.

    Attributes:
        path: the directory.
        checkpoints: where the run's checkpoints lie.
        checkpoint: what to go on from, None to begin.
        note: what to tell the user about the choice; may be empty.
        finished: why the run there is complete; empty if it is not.
    """

    path: Path
    checkpoints: Path
    checkpoint: Manifest | None = None
    note: str = ""
    finished: str = ""


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
        return _continue_at(Path(resume), config)
    if run_dir is not None:
        return _at(run_dir, config, resume)
    base = Path("runs") / config.name
    number = 1
    differing = ""
    while True:
        candidate = base if number == 1 else base.with_name(f"{base.name}-{number}")
        number += 1
        if _is_free(candidate, config):
            note = f"the run is a new one, in {candidate}"
            if differing:
                note += f": {differing}"
            elif resume == "never" and candidate != base:
                note += ": a fresh start was asked for"
            return RunDirectory(
                candidate,
                checkpoints_of(candidate, config),
                note=note if candidate != base else "",
            )
        newest = newest_checkpoint(checkpoints_of(candidate, config))
        if newest is None or resume == "never":
            continue
        differences = drift(newest, config)
        if not differences:
            return _going_on(candidate, newest, config)
        differing = differing or f"{candidate} has another configuration ({differences[0]})"


def drift(manifest: Manifest, config: RunConfig) -> list[str]:
    """Return the differences that make a configuration another run, as text."""
    saved = manifest.metadata.get("config_as_written", {})
    differences = config_differences(saved, config.model_dump(mode="json"))
    return [
        f"{key}: {was!r} there, {now!r} here"
        for key, was, now in differences
        if not any(key == free or key.startswith(free + ".") for free in RESUME_MAY_DIFFER)
    ]


def checkpoints_of(run: Path, config: RunConfig) -> Path:
    """Return where a run keeps its checkpoints: inside it, unless the path is absolute."""
    return run / config.training.checkpoint_dir


def newest_checkpoint(checkpoints: Path) -> Manifest | None:
    """Return the newest whole checkpoint of a run.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    store = CheckpointStore(checkpoints)
    path = store.resolve("last") if store.directory.is_dir() else None
    return store.manifest(path) if path is not None else None


def _at(path: Path, config: RunConfig, resume: str) -> RunDirectory:
    if _is_free(path, config):
        return RunDirectory(path, checkpoints_of(path, config))
    newest = newest_checkpoint(checkpoints_of(path, config))
    if newest is None:
        raise CheckpointError(
            "the directory is not empty and holds no run",
            where=str(path),
            fix="choose an empty or a new directory with --run-dir",
        )
    if resume == "never":
        raise CheckpointError(
            "the directory holds a run and a fresh start was asked for",
            where=str(path),
            fix="choose a new directory with --run-dir, or leave out --resume never",
        )
    _refuse_drift(newest, config, path)
    return _going_on(path, newest, config)


def _continue_at(path: Path, config: RunConfig) -> RunDirectory:
    if path.is_file() and path.name in ("best", "last"):
        path = CheckpointStore(path.parent).resolve(path.name) or path
    if (path / "MANIFEST.json").exists():
        checkpoints = path.parent
        manifest: Manifest | None = CheckpointStore(checkpoints).verify(path)
        run = checkpoints.parent
    else:
        if not path.is_dir():
            raise CheckpointError("there is no run or checkpoint here", where=str(path))
        checkpoints, run = checkpoints_of(path, config), path
        manifest = newest_checkpoint(checkpoints)
    if manifest is None:
        raise CheckpointError("there is no checkpoint in this run", where=str(path))
    _refuse_drift(manifest, config, path)
    finished = str(manifest.metadata.get("finished", ""))
    if _budget(manifest.metadata["config_as_written"]) != _budget(config.model_dump(mode="json")):
        finished = ""
    return RunDirectory(run, checkpoints, manifest, _note(run, manifest), finished)


def _budget(config: Mapping[str, Any]) -> list[Any]:
    return [config["training"][field] for field in BUDGET_FIELDS]


def _refuse_drift(manifest: Manifest, config: RunConfig, path: Path) -> None:
    differences = drift(manifest, config)
    if differences:
        raise CheckpointError(
            "the run there has another configuration:\n    " + "\n    ".join(differences),
            where=str(path),
            fix="undo the change, or start a fresh run with --resume never"
            " (budgets and logging may differ)",
        )


def _going_on(path: Path, newest: Manifest, config: RunConfig) -> RunDirectory:
    finished = str(newest.metadata.get("finished", ""))
    checkpoints = checkpoints_of(path, config)
    return RunDirectory(path, checkpoints, newest, _note(path, newest), finished)


def _note(path: Path, manifest: Manifest) -> str:
    return f"going on with {path} from step {manifest.step}"


def _is_free(path: Path, config: RunConfig) -> bool:
    """Whether nothing is lost by beginning here: no such directory, or no checkpoint was saved."""
    if not path.exists():
        return True
    if not path.is_dir():
        return False
    checkpoints = checkpoints_of(path, config)
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        return False
    # What a run leaves that ended before its first checkpoint.
    left = {"config.yaml", "log.txt", "metrics.jsonl", "tensorboard", "corpus.txt"}
    return {entry.name for entry in path.iterdir()} <= left | {checkpoints.name}


def describe(config: RunConfig, resolved: RunConfig, **parts: Any) -> Mapping[str, Any]:
    """Return what each checkpoint's manifest says about its run."""
    return {
        "config_as_written": config.model_dump(mode="json"),
        "config": resolved.model_dump(mode="json"),
        **parts,
    }
