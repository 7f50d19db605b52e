"""The `export` command: write a trained model for other tools."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from fundamentallm.engine.arguments import RUN_OR_CHECKPOINT, add_plugins, refuse_a_missing_model
from fundamentallm.engine.console import console_output, say
from fundamentallm.engine.stopping import ended_by_signals, loading

if TYPE_CHECKING:
    from fundamentallm.inference.load import Trained

SUMMARY = "write a trained model for other tools"
READERS = {
    "hf": "transformers: AutoModelForCausalLM and AutoTokenizer, from_pretrained",
    "gguf": "llama.cpp and Ollama",
    "torch": "torch.load(..., weights_only=True)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT", help=RUN_OR_CHECKPOINT)
    parser.add_argument(
        "--format",
        required=True,
        choices=("hf", "gguf", "torch"),
        help="hf: a folder for the transformers library; gguf: a folder for llama.cpp and Ollama;"
        " torch: one file for torch.load",
    )
    parser.add_argument(
        "--type",
        choices=("F32", "F16", "Q8_0"),
        help="of the matrices in a gguf file; default F32, which is exact",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="a path that does not exist yet"
    )
    add_plugins(parser)


def execute(options: argparse.Namespace) -> int:
    """Write the model and print where."""
    refuse_a_missing_model(options.model)
    with loading():
        import torch

        from fundamentallm.engine.plugins import load_plugins
        from fundamentallm.inference.export import export
        from fundamentallm.inference.load import load_trained

    with console_output():
        load_plugins(options.plugins, "--plugins")
        trained = load_trained(options.model, torch.device("cpu"))
        with ended_by_signals():
            export(
                trained,
                options.format,
                options.out,
                {} if options.type is None else {"type": options.type},
            )
    say(trained.origin)
    say(f"written to {options.out} for {READERS[options.format]}")
    for line in next_steps(options.format, options.out, trained):
        say(line)
    return 0


def next_steps(format_name: str, path: Path, trained: Trained) -> list[str]:
    """Return the lines that say how to use an export."""
    if format_name != "gguf":
        return []
    from fundamentallm.data.tokenizer.gguf_vocabulary import gguf_vocabulary
    from fundamentallm.inference.gguf import MODEL_FILE, MODELFILE
    from fundamentallm.models.layouts import require_transformer

    config = require_transformer(trained.config.model)
    note = gguf_vocabulary(trained.tokenizer, config.vocab_size or 0).note
    name = re.sub("[^a-z0-9._-]", "-", trained.config.name.lower())
    model, description = (shlex.quote(str(path / file)) for file in (MODEL_FILE, MODELFILE))
    return [
        *([f"note: {note}"] if note else []),
        "next, with Ollama:",
        f"  ollama create {name} -f {description} && ollama run {name}",
        "or with llama.cpp (in older versions the program is llama-cli):",
        f"  llama-completion -m {model} -no-cnv -p 'the '",
    ]
