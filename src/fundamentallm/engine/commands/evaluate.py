"""The `evaluate` command."""

from __future__ import annotations

import argparse

from fundamentallm.engine.arguments import add_model, refuse_a_missing_model
from fundamentallm.engine.stopping import loading

SUMMARY = "measure the loss of a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser)
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="text to evaluate on instead of the run's validation split",
    )
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="the part of the run's text, or of text that `prepare` split; default val",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="S",
        help="start a sequence every S tokens, so that each token is predicted from more context,"
        " at (context length / S) times the cost; default the context length",
    )
    parser.add_argument(
        "--documents",
        action="store_true",
        help="evaluate each document separately and print a table: files, examples, or the text"
        " between end tokens in prepared text",
    )
    parser.add_argument(
        "--document-separator",
        metavar="TEXT",
        help="the text that ends a document inside a file; needs --documents",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    refuse_a_missing_model(options.model)
    if options.data is not None and not options.plugins:  # which may have sources of their own
        from fundamentallm.data.paths import refuse_missing

        refuse_missing([options.data])
    with loading():
        from fundamentallm.engine.evaluate import evaluate

    return evaluate(options)
