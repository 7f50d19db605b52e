"""The command line: `fundamentallm COMMAND ...`, or `python -m fundamentallm COMMAND ...`.

Only the standard library is imported to parse, so that `--help` and a typo answer at once; each
command of `commands/` imports what it needs when it is executed.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

import fundamentallm
from fundamentallm.engine.commands import COMMANDS
from fundamentallm.engine.console import (
    discard,
    open_closed_streams,
    program,
    settle_streams,
    tell,
)
from fundamentallm.errors import (
    ConfigError,
    FundamentaLLMError,
    InterruptedRunError,
    MachineError,
    did_you_mean,
)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE = "free some space or write to another disk, then repeat the command"


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest option, command or choice to a mistyped one."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with 2."""
        mistyped = re.search(r"invalid choice: '(.+)' \(choose from (.+)\)$", message)
        if mistyped and (near := did_you_mean(mistyped[1], re.split("[', ]+", mistyped[2]))):
            message = f"{message}\n{near}"
        super().error(message)

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Print the usage and the unknown arguments, and exit with 2."""
        known = [option for action in self._actions for option in action.option_strings]
        found = (did_you_mean(word.split("=")[0], known) for word in words if word.startswith("--"))
        self.error("\n".join([f"unrecognized arguments: {' '.join(words)}", *filter(None, found)]))


def exit_process(code: int) -> NoReturn:
    """End this process with a code; where a thread may be at work, without Python's shutdown.

    A thread of the process group may still free a tensor while the interpreter shuts down, and
    abort the process ("terminate called without an active exception", about 1 exit in 100 on
    a busy machine), which torchrun reads as a failed rank. A logger whose service hangs would let
    the shutdown wait for it. At this point files are closed and the state is on the disk, so a
    shutdown has nothing left to do.
    """
    settle_streams()
    left_behind = any(thread.name.startswith("logger ") for thread in threading.enumerate())
    if left_behind or os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)
    gc.freeze()  # the shutdown would look through all that torch has made, for half a second
    sys.exit(code)


def console() -> NoReturn:
    """Run the command line of this process: the console command `fundamentallm`."""
    exit_process(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (see `errors.py` for the codes)."""
    open_closed_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        build_parser().print_help(sys.stderr)
        return ConfigError.exit_code
    options = parse(arguments)
    tell_start(options)
    try:
        return int(options.command(options))
    except FundamentaLLMError as error:
        if options.debug:
            raise
        report(error)
        return error.exit_code
    except SystemExit as error:
        # A command returns its code; what ends the program without one is part of a plugin, and a
        # run that was cut short must not look like one that is done.
        if options.debug or error.code not in (None, 0):
            raise
        report(
            ConfigError(
                "a part of a plugin ended the program with sys.exit",
                got=f"exit code {error.code}",
                fix="let it raise an error; add --debug to see where it happened",
            )
        )
        return ConfigError.exit_code
    except BrokenPipeError:
        # The reader of our output has closed it; the interpreter would complain at its exit flush.
        discard(sys.stdout)
        return 0
    except KeyboardInterrupt:
        if options.debug:
            raise
        stopped = InterruptedRunError("stopped by Ctrl-C", signal_number=signal.SIGINT)
        report(stopped)
        return stopped.exit_code
    except OSError as error:
        if options.debug:
            raise
        report(
            MachineError(
                f"the operating system reported: {error.strerror or error}",
                where=str(error.filename or ""),
                fix=_NO_SPACE if error.errno in _FULL else "--debug shows where it happened",
            )
        )
        return MachineError.exit_code
    except (MemoryError, RuntimeError) as error:
        # It imports torch, which a command that ran out of memory has done already.
        from fundamentallm.compute.memory import is_out_of_memory, out_of_memory

        if options.debug or not is_out_of_memory(error):
            raise
        report(out_of_memory(error))
        return MachineError.exit_code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; `key=value` may stand anywhere after the config.

    argparse takes positional arguments in one place only, and would read those that follow
    `--plugins` as modules.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    late = [word for word in [*(options.plugins or ()), *rest] if is_override(word)]
    if options.plugins:
        options.plugins = [word for word in options.plugins if not is_override(word)]
    unknown = [word for word in rest if not is_override(word)]
    if unknown or (late and "overrides" not in options):
        options.own.refuse(unknown or late)
    if late:
        options.overrides = [*options.overrides, *late]
    return options


def tell_start(options: argparse.Namespace) -> None:
    """Say what a command reads, resumes or writes, before it imports the large libraries.

    The first rank says it, on standard error.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    resume = getattr(options, "resume", "never")
    if resume not in ("auto", "never"):
        line = f"resuming {resume}"
    else:
        names = ("config", "model", "incident", "inputs", "runs", "path")
        read = next((getattr(options, name) for name in names if name in options), None)
        if read is None:
            return
        verb = "writing" if "path" in options else "reading"
        line = f"{verb} {', '.join(map(str, read)) if isinstance(read, list) else read}"
    tell(line)


def is_override(word: str) -> bool:
    """Return whether an argument is a `key=value`."""
    return "=" in word and not word.startswith("-")


def report(error: FundamentaLLMError) -> None:
    """Print an error in the format of all commands; that a signal ended one is no error."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, InterruptedRunError):
        tell("; ".join(filter(None, (error.what, error.fix))))
        return
    prefix = "error" if rank == "0" else f"error on rank {rank}"
    tell(f"{prefix}: {error}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="fundamentallm",
        description="Train a language model on your own text.",
        epilog=f"Start with: {program()} run quickstart",
    )
    parser.add_argument(
        "--version", action="version", version=f"fundamentallm {fundamentallm.__version__}"
    )
    parser.set_defaults(debug=False, plugins=None, parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        summary = command.SUMMARY
        own = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        own.set_defaults(command=command.execute, own=own)
        own.add_argument("--debug", action="store_true", help="show a traceback with an error")
        command.add_arguments(own)
    return parser
