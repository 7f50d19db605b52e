"""A run directory from somebody else: every file that it may hold, made into something else.

    python -m fault_injection.hostile

In a copy of a sound run one of eleven places becomes one of fifteen things: links of every sort,
pipes, devices, sockets, folders. `run --resume`, `verify` and `generate` meet it, each trial in a
child of one process. It holds where each command ends with success or a typed error; `run` refuses
what it would write to; nothing outside is changed, shown or made; no code is started; and it takes
less than a GiB and 20 seconds of a processor. The table has a line for each kind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fault_injection.faults import scratch_directory, silent
from fault_injection.fuzz import in_child
from fault_injection.guard import watch
from fundamentallm.engine.cli import main as command_line

CONFIG = """
name: c
data: {source: python-docs, tokenizer: byte, sequence_length: 32, batch_size: 4,
  split: [0.98, 0.01, 0.01]}
model: {d_model: 32, num_layers: 1, num_heads: 2}
training: {total_steps: 2, eval_steps: 2, threads: 1}
handlers: {tensorboard: false, samples: {num_tokens: 5}}
"""
PRECIOUS = "echo mine\n"
RUN = Path("runs/c")

Kind = Callable[[Path, Path], None]


@contextlib.contextmanager
def inside(place: Path) -> Iterator[None]:
    """Work in a directory."""
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def link(path: Path, outside: Path) -> None:
    """Link to a file outside."""
    path.symlink_to(outside / ".bashrc")


def dangling(path: Path, outside: Path) -> None:
    """Link to a file outside that is not there."""
    path.symlink_to(outside / "new")


def relative(path: Path, outside: Path) -> None:
    """Link to a file outside by a relative path."""
    path.symlink_to(os.path.relpath(outside / ".bashrc", path.parent))


def hard_link(path: Path, outside: Path) -> None:
    """Give a file outside a second name."""
    path.hardlink_to(outside / ".bashrc")


def pipe(path: Path, outside: Path) -> None:
    """Make a pipe, which waits for its other end."""
    os.mkfifo(path)


def device(path: Path, outside: Path) -> None:
    """Link to a device without an end."""
    path.symlink_to("/dev/zero")


def folder(path: Path, outside: Path) -> None:
    """Make a folder with a link to a file outside."""
    path.mkdir()
    link(path / "x", outside)


def listening(path: Path, outside: Path) -> None:
    """Make a socket."""
    with inside(path.parent), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)  # the path of a socket may not be long


def linked_folder(path: Path, outside: Path) -> None:
    """Link to a folder outside."""
    path.symlink_to(outside)


def loop(path: Path, outside: Path) -> None:
    """Link to itself."""
    path.symlink_to(path.name)


def chain(path: Path, outside: Path) -> None:
    """Link to a link to a file outside."""
    path.with_name("between").symlink_to(outside / ".bashrc")
    path.symlink_to("between")


def linked_pipe(path: Path, outside: Path) -> None:
    """Link to a pipe."""
    os.mkfifo(path.with_name("between"))
    path.symlink_to("between")


def own_memory(path: Path, outside: Path) -> None:
    """Link to the memory of the process itself."""
    path.symlink_to("/proc/self/mem")


def parent(path: Path, outside: Path) -> None:
    """Link to the folder above."""
    path.symlink_to("..")


def standard_input(path: Path, outside: Path) -> None:
    """Link to the standard input of the process."""
    path.symlink_to("/proc/self/fd/0")


KINDS: tuple[Kind, ...] = (
    link, dangling, relative, hard_link, pipe, device, folder, listening, linked_folder, loop,
    chain, linked_pipe, own_memory, parent, standard_input,
)  # fmt: skip
# What `run` writes to, in a run directory; it refuses what is none of its own.
WRITTEN = (
    "README.md", "metrics.jsonl", "samples.jsonl", "log.txt", "config.yaml", ".lock", "corpus.txt",
    "STOP", "checkpoints",
)  # fmt: skip
READ = ("checkpoints/last", "checkpoints/step-00000002/MANIFEST.json")
PLACES = (*WRITTEN, *READ)
COMMANDS = (
    ["run", "c.yaml", "training.total_steps=4", "--resume", str(RUN)],
    ["verify", str(RUN)],
    ["generate", str(RUN), "--max-tokens", "1"],
)


def make_run(place: Path, *options: str) -> None:
    """Make a run of two steps in a directory, with everything that a run writes."""
    (place / "c.yaml").write_text(CONFIG)
    with inside(place):
        if command_line(["run", "c.yaml", *options]) != 0:
            raise RuntimeError("the sound run cannot be made")


def put(kind: Kind, path: Path, outside: Path) -> None:
    """Put one of the kinds in the place of what is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    kind(path, outside)


@contextlib.contextmanager
def beside_something_precious(trained: Path, place: Path) -> Iterator[Path]:
    """Copy a run into `place`/here; yield `place`/outside, which has to stay as it is.

    Raises:
        AssertionError: something outside was changed or made.
    """
    shutil.copytree(trained, place / "here")
    outside = place / "outside"
    outside.mkdir()
    (outside / ".bashrc").write_text(PRECIOUS)
    yield outside
    assert (outside / ".bashrc").read_text() == PRECIOUS, "a file outside was changed"
    assert [path.name for path in outside.iterdir()] == [".bashrc"], "something was made outside"


def trial(kind: Kind, name: str, outside: Path) -> str:
    """Do one trial in the working directory, a copy of a run; return the fault, empty for none."""
    put(kind, RUN / name, outside)
    watch(Path.cwd())
    sys.stdout = sys.stderr = said = Path("said.txt").open("w")  # noqa: SIM115 - until the end
    codes = [command_line(list(words)) for words in COMMANDS]
    said.flush()
    text = Path("said.txt").read_text()
    # Reading takes a file with other hard links, as copies by links have them; what stands in it is
    # no configuration then.
    refused = {2, 4} if name == "config.yaml" else {4}
    if not set(codes) <= {0, *refused} or "Traceback" in text:
        return f"exit codes {codes}: {text}"
    # An empty folder of checkpoints is one without any; there is nothing to refuse.
    if name in WRITTEN and codes[0] != 4 and not (kind is folder and name == "checkpoints"):
        return f"run went on: {text}"
    return f"text from outside is shown: {text}" if PRECIOUS.split()[1] in text else ""


def hostile(
    kinds: Sequence[Kind] = KINDS, places: Sequence[str] = PLACES
) -> dict[tuple[str, str], str]:
    """Try kinds at places; return the faults by kind and place, empty for none."""
    faults = {}
    with scratch_directory() as scratch, silent():
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
            (scratch / "trained").mkdir()
            make_run(scratch / "trained")
        for kind in kinds:
            for name in places:
                place = scratch / "trial"
                try:
                    with beside_something_precious(scratch / "trained", place) as outside:
                        faults[kind.__name__, name] = in_child(
                            place / "here",
                            scratch / "report",
                            lambda kind=kind, name=name, outside=outside: trial(
                                kind, name, outside
                            ),
                        )
                except AssertionError as error:
                    faults[kind.__name__, name] = str(error)
                shutil.rmtree(place)
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 where one trial failed."""
    faults = hostile()
    width = max(len(kind.__name__) for kind in KINDS)
    print(f"{'':{width}}  " + "  ".join(PLACES))
    for kind in KINDS:
        cells = [
            f"{'FAILED' if faults[kind.__name__, name] else 'held':{len(name)}}" for name in PLACES
        ]
        print(f"{kind.__name__:{width}}  " + "  ".join(cells))
    failed = {cell: fault for cell, fault in faults.items() if fault}
    for (kind_name, name), fault in failed.items():
        print(f"\n{kind_name} at {name}: {fault}")
    print(f"\n{len(faults) - len(failed)} of {len(faults)} held")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
