"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fundamentallm.config import RunConfig

RUN_DIR = "run_dir="

_LAUNCHED = {"RANK", "WORLD_SIZE", "SLURM_PROCID"}  # variables of a process among others

RUN_OR_CHECKPOINT = "a run (its best checkpoint, else its last), a checkpoint, or a pointer file"


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declare CONFIG.yaml, its overrides, and --plugins."""
    parser.add_argument(
        "config",
        type=Path,
        metavar="CONFIG.yaml",
        help="a file, or the name of a packaged one (quickstart)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the file, for example training.learning_rate=3e-4",
    )
    add_plugins(parser)


def refuse_a_faulty_config(options: argparse.Namespace) -> RunConfig:
    """Check the configuration before large libraries are imported, so that a typo answers at once.

    Raises:
        ConfigError: as `load_config`.
    """
    from fundamentallm.config import load_config

    return load_config(options.config, [word for word in options.overrides if not is_run_dir(word)])


def refuse_missing_inputs(config: RunConfig, plugins: Sequence[str]) -> None:
    """Check that a configuration's texts, and what a run starts from, are there.

    That is told before large libraries are imported.

    Plugins may have sources of their own, and the ranks of a group read together: both wait.

    Raises:
        DataError: as `refuse_missing`.
        CheckpointError: `model.init_from` leads nowhere.
    """
    from fundamentallm.data.paths import refuse_missing
    from fundamentallm.files.run_layout import no_start, starting_path

    is_launched = not _LAUNCHED.isdisjoint(os.environ)
    if config.plugins or plugins or is_launched:
        return
    sources = config.data.chosen_sources
    named = [one if isinstance(one, str) else one.path or one.name for one in sources]
    refuse_missing([name for name in named if name is not None])
    start = config.model.init_from
    if start is not None and not starting_path(start).exists():
        raise no_start(start)


def refuse_a_missing_run(path: Path) -> None:
    """Check that RUN_OR_CHECKPOINT is there, before large libraries are imported.

    Raises:
        CheckpointError: there is nothing.
    """
    from fundamentallm.files.run_layout import RunOrCheckpoint

    RunOrCheckpoint.parse(path, lambda run: run)


def refuse_a_missing_model(path: Path) -> None:
    """Check that RUN_OR_CHECKPOINT is there and may hold a checkpoint, as `refuse_a_missing_run`.

    Raises:
        CheckpointError: there is nothing, or nothing of a run.
    """
    from fundamentallm.files.run_layout import CONFIG, RunOrCheckpoint, no_checkpoint

    is_run = RunOrCheckpoint.parse(path, lambda run: run).is_run
    if is_run and not any(one.name == CONFIG or "step-" in one.name for one in path.iterdir()):
        raise no_checkpoint(path)


def refuse_no_file(out: Path) -> None:
    """Check that --out can be a file, before large libraries are imported.

    Raises:
        ConfigError: it is a directory.
        MachineError: its directory does not exist.
    """
    from fundamentallm.errors import ConfigError

    if out.is_dir():
        raise ConfigError(
            "a directory cannot be the page", where=f"--out {out}", fix=f"write {out / 'page.html'}"
        )
    refuse_no_directory(out)


def refuse_no_directory(out: Path) -> None:
    """Check that the directory of --out exists.

    Raises:
        MachineError: it does not.
    """
    from fundamentallm.errors import MachineError

    if not out.absolute().parent.is_dir():
        raise MachineError(
            "the directory does not exist",
            where=f"--out {out}",
            fix="make the directory first, or choose another",
        )


def is_run_dir(word: str) -> bool:
    """Return whether an override of `run` is `run_dir=DIR`, another way to write --run-dir."""
    return word.startswith(RUN_DIR)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare RUN_OR_CHECKPOINT, --device and --plugins."""
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT", help=RUN_OR_CHECKPOINT)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:0, mps")
    add_plugins(parser)


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """Declare --plugins."""
    parser.add_argument(
        "--plugins",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules that register handlers, optimizers, blocks, ..., or short names that"
        " installed packages offer",
    )


def add_plugins_to_show(parser: argparse.ArgumentParser) -> None:
    """Declare the --plugins of commands that show what exists: None without it."""
    parser.add_argument(
        "--plugins",
        nargs="*",
        metavar="MODULE",
        help="show what these modules register too; without a name, all plugins that installed"
        " packages offer",
    )
