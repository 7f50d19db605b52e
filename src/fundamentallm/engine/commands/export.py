"""The `export` command: write a trained model for other tools."""

from __future__ import annotations

import argparse
from pathlib import Path

from fundamentallm.engine.arguments import add_plugins
from fundamentallm.engine.console import console_output, say
from fundamentallm.engine.stopping import loading

SUMMARY = "write a trained model for other tools"
READERS = {
    "hf": "transformers: AutoModelForCausalLM and AutoTokenizer, from_pretrained",
    "torch": "torch.load(..., weights_only=True)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument(
        "--format",
        required=True,
        choices=("hf", "torch"),
        help="hf: a folder for the transformers library; torch: one file for torch.load",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="a path that does not exist yet"
    )
    add_plugins(parser)


def execute(options: argparse.Namespace) -> int:
    """Write the model and print where."""
    with loading():
        import torch

        from fundamentallm.engine.plugins import load_plugins
        from fundamentallm.inference.export import export
        from fundamentallm.inference.load import load_trained

    with console_output():
        load_plugins(options.plugins, "--plugins")
        trained = load_trained(options.model, torch.device("cpu"))
        export(trained, options.format, options.out)
    say(trained.origin)
    say(f"written to {options.out} for {READERS[options.format]}")
    return 0
