"""The `evaluate` command."""

from __future__ import annotations

import argparse

from fundamentallm.engine.arguments import add_model
from fundamentallm.engine.stopping import loading

SUMMARY = "measure the loss of a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser)
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="text to evaluate on, instead of the run's own validation split",
    )
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="the part of the run's own text, or of text that `prepare` split; default val",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="S",
        help="start a window every S tokens, so that each token is predicted from a fuller context,"
        " at (context length / S) times the cost; default the context length",
    )
    parser.add_argument(
        "--documents",
        action="store_true",
        help="read each document by itself and print a table of them: files, examples, what stands"
        " between the ends in prepared text",
    )
    parser.add_argument(
        "--document-separator",
        metavar="TEXT",
        help="what ends a document inside a file; with --documents",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    with loading():
        from fundamentallm.engine.evaluate import evaluate

    return evaluate(options)
