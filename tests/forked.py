"""The engine in processes of their own, without an import of torch for each.

A server imports what every command needs once and forks for each start. What a test sees is a real
process all the same: its own id, streams, signals, environment and exit code. Any number of them
may run at once.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ENGINE = "fundamentallm.engine"
SECONDS = 250.0  # until a process counts as hanging, on a busy machine too
GRACE = 10.0  # seconds for the others when one of several has failed
# torch imports _dynamo late, for the first tensor without memory: each run would do it.
PRELOADED = (
    "fundamentallm.testing",
    "fundamentallm.engine.run",
    "torch._dynamo",
    "tensorboardX",
    "tqdm",
)


class Forked:
    """A process of the engine, used like a `Popen`.

    Args:
        arguments: of the program.
        streams: file descriptors of its standard input, output and error.
        environment: its whole environment.
        program: a module, as with `python -m`, or a file that ends in .py.
        ignored: signals that it ignores from the start, as under `nohup`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        streams: Sequence[int],
        environment: Mapping[str, str],
        program: str = ENGINE,
        ignored: Sequence[int] = (),
    ) -> None:
        request = {
            "program": program,
            "arguments": list(arguments),
            "directory": str(Path.cwd()),
            "environment": dict(environment),
            "ignored": list(ignored),
            "path": sys.path,
        }
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        message = [json.dumps(request).encode()]
        socket.send_fds(_server(), message, [*streams, theirs.fileno()])
        theirs.close()
        self._channel.settimeout(SECONDS)
        self.pid = int(self._channel.recv(64))
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        """Send a signal to it, unless it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = SECONDS) -> int:
        """Return its exit code, below 0 after a signal."""
        if self.returncode is None:
            self._channel.settimeout(timeout)
            self.returncode = int(self._channel.recv(64))
            self._channel.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        with contextlib.suppress(BlockingIOError):
            self.wait(0.0)
        return self.returncode


def run(
    arguments: Sequence[str],
    directory: Path,
    program: str = ENGINE,
    ignored: Sequence[int] = (),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run a command of the engine to its end, with its output in files of a directory."""
    (result,) = run_all([(arguments, variables)], directory, program, ignored)
    return result


def run_ranks(
    arguments: Sequence[str], directory: Path, program: str = ENGINE, ranks: int = 2
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command as the ranks of one group, without torchrun."""
    commands = [(arguments, place) for place in rank_environments(ranks)]
    return run_all(commands, directory, program)


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """Return what torchrun sets for each rank of a group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_all(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]],
    directory: Path,
    program: str = ENGINE,
    ignored: Sequence[int] = (),
) -> list[subprocess.CompletedProcess[str]]:
    """Run commands at once, each with variables of its own; the first failure ends the others."""
    processes: list[Forked] = []
    outputs = []
    deadline = time.monotonic() + SECONDS
    try:
        for number, (arguments, variables) in enumerate(commands):
            paths = [directory / f"{name}-{number}.txt" for name in ("stdout", "stderr")]
            outputs.append(paths)
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context(Path(os.devnull).open())]
                files += [stack.enter_context(path.open("w")) for path in paths]
                streams = [file.fileno() for file in files]
                environment = {**os.environ, **variables}
                processes.append(Forked(arguments, streams, environment, program, ignored))
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                deadline = min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = []
    for (arguments, _), process, paths in zip(commands, processes, outputs, strict=True):
        texts = [path.read_text(encoding="utf-8") for path in paths]
        for path in paths:
            path.unlink()
        results.append(subprocess.CompletedProcess(list(arguments), process.wait(), *texts))
    return results


@cache
def _server() -> socket.socket:
    """Start the server; it ends with this process, whose end of the socket it reads."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    its.set_inheritable(True)
    words = [sys.executable, __file__, str(its.fileno())]
    os.posix_spawn(sys.executable, words, os.environ)
    its.close()
    return ours


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork for each request; return the request in the new process, None at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that attend
    while True:
        data, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 4)
        if not data:
            return None
        if os.fork() == 0:
            connection.close()
            return attend(json.loads(data), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def attend(request: dict[str, Any], descriptors: Sequence[int]) -> dict[str, Any]:
    """Fork once more, tell the id and the exit code; return the request in the new process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, report = descriptors
    pid = os.fork()
    if pid == 0:
        os.close(report)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return request
    for stream in streams:
        os.close(stream)
    with socket.socket(fileno=report) as channel:
        channel.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):  # whoever asked may have ended
            channel.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(request: Mapping[str, Any]) -> None:
    """Make of this process what a new one is when it begins, but for the imports."""
    # Tests may run under nohup, whose children ignore a hangup, and rightly so.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.path[:] = [request["directory"], *request["path"]]
    sys.argv = [request["program"], *request["arguments"]]
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - open until the end
    for name, number, buffering in (("stdout", 1, os.isatty(1)), ("stderr", 2, True)):
        stream = io.TextIOWrapper(
            open(number, "wb", closefd=False),  # noqa: SIM115 - open until the end
            encoding="utf-8",
            errors="strict" if number == 1 else "backslashreplace",
            line_buffering=buffering,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.__stdin__ = sys.stdin  # type: ignore[misc]


if __name__ == "__main__":
    for module in PRELOADED:
        __import__(module)
    gc.freeze()  # a process need not copy these objects to look through them, nor at its end
    begun = serve(socket.socket(fileno=int(sys.argv[1])))
    if begun is not None:
        become(begun)
        start = runpy.run_path if begun["program"].endswith(".py") else runpy.run_module
        start(begun["program"], run_name="__main__")
