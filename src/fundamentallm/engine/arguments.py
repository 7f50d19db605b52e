"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

RUN_DIR = "run_dir="

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


def refuse_a_faulty_config(options: argparse.Namespace) -> None:
    """Check the configuration before large libraries are imported, so that a typo answers at once.

    Raises:
        ConfigError: as `load_config`.
    """
    from fundamentallm.config import load_config

    load_config(options.config, [word for word in options.overrides if not is_run_dir(word)])


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
