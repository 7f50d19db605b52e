"""The command line: `python -m fundamentallm.engine COMMAND ...`.

Only the standard library is imported here, so that `--help` and a typo answer at once; each
command imports what it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from fundamentallm.errors import FundamentaLLMError, InterruptedRunError, MachineError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE = "free some space, or write to another disk; then do the same again"


def exit_process(code: int) -> NoReturn:
    """End this process with a code; one of several ranks at once.

    A thread of the process group may still let go of a tensor when the interpreter shuts down, and
    then aborts the process ("terminate called without an active exception", one end in a hundred on
    a busy machine), which torchrun takes for a rank that failed. By now files are closed and the
    state is on the disk, so there is nothing that shutting down would still do.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (see `errors.py` for the codes)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    try:
        return int(options.command(options))
    except FundamentaLLMError as error:
        if options.debug:
            raise
        report(error)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has enough; the interpreter would complain at its exit flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        if options.debug:
            raise
        report(InterruptedRunError("interrupted", signal_number=2))
        return 130
    except OSError as error:
        if options.debug:
            raise
        report(
            MachineError(
                f"the machine refused: {error.strerror or error}",
                where=str(error.filename or ""),
                fix=_NO_SPACE if error.errno in _FULL else "--debug shows where it happened",
            )
        )
        return MachineError.exit_code
    except MemoryError as error:
        if options.debug:
            raise
        report(
            MachineError(
                "out of memory", got=str(error), fix="lower data.batch_size or the model's size"
            )
        )
        return MachineError.exit_code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; `key=value` may stand anywhere after the config.

    argparse alone takes positional arguments only in one place, and would read those that follow
    `--plugins` as modules.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    late = [word for word in [*options.plugins, *rest] if is_override(word)]
    options.plugins = [word for word in options.plugins if not is_override(word)]
    unknown = [word for word in rest if not is_override(word)]
    if unknown or (late and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(unknown or late)}")
    if late:
        options.overrides = [*options.overrides, *late]
    return options


def is_override(word: str) -> bool:
    """Tell whether a word of a command line is a `key=value`."""
    return "=" in word and not word.startswith("-")


def report(error: FundamentaLLMError) -> None:
    """Print an error the way every command does."""
    from fundamentallm.engine.console import printable

    rank = os.environ.get("RANK", "0")
    prefix = "error" if rank == "0" else f"error on rank {rank}"
    print(f"{prefix}: {printable(str(error))}", file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m fundamentallm.engine",
        description="Train a language model on your own text.",
        epilog="Start with: python -m fundamentallm.engine run configs/quickstart.yaml",
    )
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = _add(commands, "run", _run, "train a model from a YAML file")
    _add_config(run)
    run.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): continue the unfinished run of the same config; never: start afresh;"
        " PATH: continue that run or checkpoint",
    )
    run.add_argument(
        "--allow-inexact",
        action="store_true",
        help="go on although other versions of the libraries make the course another one",
    )
    run.add_argument("--run-dir", type=Path, metavar="DIR", help="instead of runs/<name>")

    check = _add(commands, "check", _check, "validate a YAML file and show what it would do")
    _add_config(check)

    tune = _add(commands, "tune", _tune, "measure which settings this machine runs fastest")
    _add_config(tune)
    tune.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the file with the fastest settings goes; default CONFIG.tuned.yaml",
    )
    tune.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="begin no measurement after that time; default 600",
    )
    tune.add_argument(
        "--keep",
        nargs="+",
        default=[],
        choices=("precision", "compile", "attention", "micro-batch", "threads"),
        help="leave these as the file has them",
    )

    evaluate = _add(commands, "evaluate", _evaluate, "measure the loss of a trained model")
    _add_model(evaluate)
    evaluate.add_argument(
        "--data",
        metavar="PATH",
        help="text to evaluate on, instead of the run's own validation split",
    )
    evaluate.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="the part of the run's own text, or of text that `prepare` split; default val",
    )
    evaluate.add_argument(
        "--stride",
        type=int,
        metavar="S",
        help="start a window every S tokens, so that each token is predicted from a fuller context,"
        " at (context length / S) times the cost; default the context length",
    )
    evaluate.add_argument(
        "--documents",
        action="store_true",
        help="read each document by itself and print a table of them: files, examples, what stands"
        " between the ends in prepared text",
    )
    evaluate.add_argument(
        "--document-separator",
        metavar="TEXT",
        help="what ends a document inside a file; with --documents",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    prepare = _add(commands, "prepare", _prepare, "turn text of any size into token files, once")
    prepare.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders, patterns, or - for standard input: text, Markdown, JSON lines,"
        " Parquet, gzip, Zstandard",
    )
    prepare.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="must not exist; appears whole"
    )
    prepare.add_argument(
        "--tokenizer",
        default="character",
        metavar="NAME",
        help="character (default), byte, bpe, a tokenizer.json, or '{name: bpe, vocab_size: 4096}'",
    )
    prepare.add_argument("--vocab-size", type=int, metavar="N", help="of the tokenizer bpe")
    prepare.add_argument(
        "--field",
        metavar="NAME",
        help="the key or column that has the text, in JSON lines and Parquet; default text; with"
        " it, standard input is JSON lines",
    )
    prepare.add_argument(
        "--split",
        choices=("position", "document"),
        default="position",
        help="position (default): a run cuts the tokens by data.split; document: each document"
        " goes to training, validation or test as a whole, equal ones to the same",
    )
    prepare.add_argument(
        "--fractions",
        nargs=3,
        type=float,
        default=(0.9, 0.1, 0.0),
        metavar=("TRAIN", "VAL", "TEST"),
        help="with --split document; default 0.9 0.1 0",
    )
    _add_plugins(prepare)

    verify = _add(commands, "verify", _verify, "prove a run's checkpoints whole, or one")
    verify.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    _add_plugins(verify)

    export = _add(commands, "export", _export, "write a trained model for other tools")
    export.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    export.add_argument(
        "--format",
        required=True,
        choices=("hf", "torch"),
        help="hf: a folder for the transformers library; torch: one file for torch.load",
    )
    export.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="must not exist; appears whole"
    )
    _add_plugins(export)

    replay = _add(commands, "replay", _replay, "reproduce a recorded numerical incident")
    replay.add_argument("incident", type=Path, metavar="INCIDENT_DIR")
    replay.add_argument("--device", default="cpu", help="cpu (default), auto, cuda, cuda:0, mps")
    _add_plugins(replay)

    generate = _add(commands, "generate", _generate, "let a trained model write")
    _add_model(generate)
    generate.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the text to continue; without it, on a terminal, prompts are read one by one",
    )
    generate.add_argument("--max-tokens", type=int, default=200, metavar="N", help="default 200")
    generate.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0 takes the likeliest token; default 0.8",
    )
    generate.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest")
    generate.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample among the likeliest that hold probability P",
    )
    generate.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="sample among the tokens at least P times as likely as the likeliest",
    )
    generate.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1, tokens that the text holds already become less likely; default 1",
    )
    generate.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text is written; may be given several times; default: the end of a"
        " response, where the model learnt one",
    )
    generate.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the first sample; default 0"
    )
    generate.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="texts for a prompt, written as one batch; default 1",
    )
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    command: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
    parser.set_defaults(command=command)
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the file, as training.learning_rate=3e-4",
    )
    _add_plugins(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:0, mps")
    _add_plugins(parser)


def _add_plugins(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugins",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules of yours that register handlers, optimizers, blocks, ...",
    )


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """While large libraries are imported, let Ctrl-C end the process at once and without a word.

    A KeyboardInterrupt inside the import of an extension module comes out as an ImportError, or
    ends in an abort.
    """
    is_main = threading.current_thread() is threading.main_thread()
    ours = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(options: argparse.Namespace) -> int:
    with loading():
        from fundamentallm.engine.run import run

    return run(
        options.config,
        options.overrides,
        options.resume,
        options.run_dir,
        options.plugins,
        options.allow_inexact,
    )


def _check(options: argparse.Namespace) -> int:
    with loading():
        from fundamentallm.engine.check import check

    return check(options.config, options.overrides, options.plugins)


def _tune(options: argparse.Namespace) -> int:
    with loading():
        from fundamentallm.engine.tune import tune

    return tune(
        options.config,
        options.overrides,
        options.plugins,
        options.out,
        options.seconds,
        options.keep,
    )


def _evaluate(options: argparse.Namespace) -> int:
    with loading():
        from fundamentallm.engine.evaluate import evaluate

    return evaluate(options)


def _prepare(options: argparse.Namespace) -> int:
    with loading():
        from fundamentallm.engine.prepare import prepare

    return prepare(options)


def _verify(options: argparse.Namespace) -> int:
    with loading():
        from fundamentallm.engine.verify import verify

    return verify(options)


def _export(options: argparse.Namespace) -> int:
    with loading():
        from fundamentallm.engine.export import export

    return export(options)


def _replay(options: argparse.Namespace) -> int:
    with loading():
        from fundamentallm.engine.replay import replay

    return replay(options)


def _generate(options: argparse.Namespace) -> int:
    with loading():
        from fundamentallm.engine.generate import generate

    return generate(options)
