"""The other door to `run`: `python -m fundamentallm.training.train --config FILE`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Translate the arguments to those of `run` and run it; return the exit code."""
    # Imported here: this module is a door of the engine, which stands above its package.
    from fundamentallm.engine import cli

    parser = argparse.ArgumentParser(
        prog="python -m fundamentallm.training.train",
        description="Train a model from a YAML file; the same as `fundamentallm run`.",
    )
    parser.add_argument("--config", required=True, metavar="CONFIG.yaml")
    parser.add_argument("--data-path", metavar="PATH", help="text to train on, as data.source")
    options, rest = parser.parse_known_args(argv)
    overrides = []
    if options.data_path is not None:
        overrides = [f"data.source={json.dumps(options.data_path)}"]  # JSON text is YAML text
    return cli.main(["run", options.config, *overrides, *rest])


if __name__ == "__main__":
    from fundamentallm.engine.cli import exit_process

    exit_process(main())
