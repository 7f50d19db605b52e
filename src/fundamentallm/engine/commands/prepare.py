"""The `prepare` command: convert text of any size to token files."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from fundamentallm.engine.arguments import add_plugins
from fundamentallm.engine.console import console_output, program, say
from fundamentallm.engine.stopping import ended_by_signals, loading

SUMMARY = "convert text of any size to token files, once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders, patterns, or - for standard input: text, Markdown, JSON lines,"
        " Parquet, gzip, Zstandard",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet"
    )
    parser.add_argument(
        "--tokenizer",
        default="character",
        metavar="NAME",
        help="character (default), byte, bpe, a tokenizer.json, or '{name: bpe, vocab_size: 4096}'",
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="vocabulary size, for bpe")
    parser.add_argument(
        "--field",
        metavar="NAME",
        help="the key or column that holds the text, in JSON lines and Parquet; default text; with"
        " it, standard input is JSON lines",
    )
    parser.add_argument(
        "--split",
        choices=("position", "document"),
        default="position",
        help="position (default): a run cuts the tokens by data.split; document: each document"
        " goes to training, validation or test as a whole, equal documents to the same part",
    )
    parser.add_argument(
        "--fractions",
        nargs=3,
        type=float,
        default=(0.9, 0.1, 0.0),
        metavar=("TRAIN", "VAL", "TEST"),
        help="the fractions with --split document; default 0.9 0.1 0",
    )
    add_plugins(parser)


def execute(options: argparse.Namespace) -> int:
    """Write the folder, unless it exists already, and print how to train on it."""
    with loading():
        from fundamentallm.data.preparing.folder import write_prepared
        from fundamentallm.data.preparing.options import Options, check_options, tokenizer_choice
        from fundamentallm.engine.plugins import load_plugins

    with console_output(), ended_by_signals():
        load_plugins(options.plugins, "--plugins")
        asked = Options(
            tokenizer_choice(options.tokenizer, options.vocab_size),
            options.field or "text",
            options.field is not None,
            options.split,
            tuple(options.fractions),
        )
        check_options(asked)
        done = write_prepared(options.inputs, options.out, asked)
    say(("Nothing to do: " if not done else "") + f"{options.out} is ready.")
    say("Put this in your YAML:")
    say(f"  data: {{source: {json.dumps(str(options.out))}}}")
    say("or train now:")
    source = shlex.quote(f"data.source={options.out}")
    say(f"  {program()} run quickstart name=mine {source}")
    return 0
