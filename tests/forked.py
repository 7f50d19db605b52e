"""The engine in processes of their own, without an import of torch for each.

A server imports what every command needs once and forks for each start. What a test sees is a real
process all the same: its own id, streams, signals, environment and exit code.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ENGINE = "fundamentallm.engine"
SECONDS = 100.0  # until a process counts as hanging
PRELOADED = ("fundamentallm.testing", "tensorboardX", "tqdm")


class Forked:
    """A process of the engine, used like a `Popen`.

    Args:
        arguments: of the program.
        streams: file descriptors of its standard input, output and error.
        environment: its whole environment.
        program: a module, as with `python -m`, or a file that ends in .py.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        streams: Sequence[int],
        environment: Mapping[str, str],
        program: str = ENGINE,
    ) -> None:
        self.server = _server()
        request = {
            "program": program,
            "arguments": list(arguments),
            "directory": str(Path.cwd()),
            "environment": dict(environment),
        }
        socket.send_fds(self.server, [json.dumps(request).encode()], list(streams))
        self.server.settimeout(SECONDS)
        self.pid = int(self.server.recv(64))
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
            self.server.settimeout(timeout)
            self.returncode = int(self.server.recv(64))
        return self.returncode


def run(
    arguments: Sequence[str], directory: Path, program: str = ENGINE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the engine to its end, with its output in files of a directory."""
    paths = [directory / f"{name}.txt" for name in ("stdout", "stderr")]
    with Path(os.devnull).open() as nothing, paths[0].open("w") as out, paths[1].open("w") as err:
        streams = [file.fileno() for file in (nothing, out, err)]
        process = Forked(arguments, streams, {**os.environ, **variables}, program)
    try:
        code = process.wait()
    finally:
        process.kill()
    texts = [path.read_text(encoding="utf-8") for path in paths]
    for path in paths:
        path.unlink()
    return subprocess.CompletedProcess(list(arguments), code, *texts)


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
    """Fork for each request and tell its id and its end; return the request in the new process."""
    while True:
        data, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not data:
            return None
        pid = os.fork()
        if pid == 0:
            connection.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            request: dict[str, Any] = json.loads(data)
            return request
        for stream in streams:
            os.close(stream)
        connection.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def become(request: Mapping[str, Any]) -> None:
    """Make of this process what a new one is when it begins, but for the imports."""
    # Tests may run under nohup, whose children ignore a hangup, and rightly so.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.path[0] = request["directory"]
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
    begun = serve(socket.socket(fileno=int(sys.argv[1])))
    if begun is not None:
        become(begun)
        start = runpy.run_path if begun["program"].endswith(".py") else runpy.run_module
        start(begun["program"], run_name="__main__")
