"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declare CONFIG.yaml, its overrides, and --plugins."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the file, for example training.learning_rate=3e-4",
    )
    add_plugins(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare RUN_OR_CHECKPOINT, --device and --plugins."""
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:0, mps")
    add_plugins(parser)


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """Declare --plugins."""
    parser.add_argument(
        "--plugins",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="your modules that register handlers, optimizers, blocks, ...",
    )
