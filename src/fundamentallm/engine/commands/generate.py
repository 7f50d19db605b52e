"""The `generate` command."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fundamentallm.engine.arguments import add_model, refuse_a_missing_model
from fundamentallm.engine.console import console_output, printable, say
from fundamentallm.engine.stopping import loading
from fundamentallm.errors import ConfigError, FundamentaLLMError
from fundamentallm.files.private import make_directory

if TYPE_CHECKING:
    from fundamentallm.engine.copying import CopyingCheck
    from fundamentallm.inference.load import Trained
    from fundamentallm.models.generation.batch import Decode

SUMMARY = "generate text with a trained model"
logger = logging.getLogger(__name__)

HISTORY_LENGTH = 1000  # prompts
SAMPLES_AT_ONCE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser)
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the text to continue; without it, on a terminal, prompts are read interactively",
    )
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0 always takes the likeliest token; default 0.8",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the fewest likeliest tokens with total probability P",
    )
    parser.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="sample from tokens at least P times as likely as the likeliest",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1, tokens that are already in the text become less likely; default 1",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop before this text; may be given several times; default: the end of a"
        " response, if the model was trained with one",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the first sample; default 0"
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="texts per prompt, up to 16 at a time; default 1",
    )
    parser.add_argument(
        "--weights",
        choices=("fp32", "bf16", "int8"),
        default="fp32",
        help="the type of the weights that each token reads, on a CPU: bf16 and int8 are faster and"
        " round them; default fp32",
    )
    parser.add_argument(
        "--check-copying",
        action="store_true",
        help="tell how much of the texts stands in the training text, and where",
    )


def execute(options: argparse.Namespace) -> int:
    """Stream text to the terminal, for one prompt or for each that is typed."""
    refuse_a_missing_model(options.model)
    with loading():
        from fundamentallm.engine.plugins import load_plugins
        from fundamentallm.inference.generate import decoder_for
        from fundamentallm.inference.load import load_on_device

    with console_output():
        load_plugins(options.plugins, "--plugins")
        trained, _ = load_on_device(options.model, options.device)
        loss = trained.val_loss
        measured = f"; validation loss {loss:.4f}" if isinstance(loss, float) else ""
        logger.info("from %s%s", trained.origin, measured)
        if options.num_samples < 1:
            raise ConfigError(
                "num_samples is out of range", got=str(options.num_samples), expected="at least 1"
            )
        num_tokens = options.max_tokens * options.num_samples
        decode = decoder_for(trained.model, options.weights, num_tokens)
        check = None
        if options.check_copying:
            from fundamentallm.engine.copying import CopyingCheck

            check = CopyingCheck(trained)
        if options.prompt is None and sys.stdin.isatty() and sys.stdout.isatty():
            return _interactive(trained, options, decode, check)
        _write(trained, options, options.prompt or "", options.seed, decode, check)
    return 0


def _interactive(
    trained: Trained,
    options: argparse.Namespace,
    decode: Decode | None,
    check: CopyingCheck | None,
) -> int:
    seed = options.seed
    say("Type a prompt and press Enter; Ctrl-C stops the text, Ctrl-D quits.")
    with _history():
        while True:
            try:
                prompt = input("> ")
            except EOFError:
                say()
                return 0
            try:
                _write(trained, options, prompt, seed, decode, check)
            except KeyboardInterrupt:
                say()
            except FundamentaLLMError as error:
                say(printable(str(error)))
            seed += options.num_samples


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Give `input` line editing and a history of prompts, if readline is available."""
    try:
        import readline

        path = history_path()
    except (ImportError, RuntimeError):  # RuntimeError: a user without a home
        yield
        return
    # Prompts work even if the home directory cannot be read or written.
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LENGTH)
        with contextlib.suppress(OSError):
            make_directory(path.parent)
            # Prompts are private.
            path.touch(mode=0o600)
            readline.write_history_file(path)


def history_path() -> Path:
    """Return the file of the prompt history, as the XDG specification places it."""
    home = os.environ.get("XDG_STATE_HOME", "")
    state = Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "state"
    return state / "fundamentallm" / "prompts"


def _write(
    trained: Trained,
    options: argparse.Namespace,
    prompt: str,
    seed: int,
    decode: Decode | None,
    check: CopyingCheck | None,
) -> None:
    """Print the samples of a prompt one below the other, each as soon as it is generated."""
    from fundamentallm.inference.generate import in_order, stream_texts

    texts, shown = [""] * options.num_samples, None
    pieces = stream_texts(
        trained.model,
        trained.tokenizer,
        [prompt] * options.num_samples,
        options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=options.stop or trained.stop,
        stop_ids=trained.stop_ids,
        seeds=range(seed, seed + options.num_samples),
        decode=decode,
        batch_size=SAMPLES_AT_ONCE,
    )
    for piece in in_order(pieces):
        if piece.row != shown:
            shown = piece.row
            if options.num_samples > 1:
                say(f"--- sample {shown + 1} ---")
            say(printable(prompt), end="")
        texts[piece.row] += piece.text
        say(printable(piece.text), end="\n" if piece.last else "")
    if check is not None:
        say()
        say(printable(check.table(texts)))
