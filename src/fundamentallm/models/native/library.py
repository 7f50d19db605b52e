"""From C++ to functions: compiled for this processor at the first use, kept for the next.

There is a library of the block for each type of its products, bfloat16 and float32, from the same
sources, and one of the decoding step. Each lies in the user's cache directory, under a name that
follows from its sources, the options, the compiler and the processor. It takes three to six seconds
to make.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from fundamentallm.errors import DataError, MachineError
from fundamentallm.files.cache_directory import default_cache_dir

logger = logging.getLogger(__name__)

_SHARED = ("rows.h", "numbers.h", "wide.h")
SOURCES = {  # of a library by its name; the first is compiled
    "block": ("block.cpp", "products.h", "tiles.h", "floats.h", *_SHARED),
    "decode": ("decode.cpp", *_SHARED),
}
FUNCTIONS = {
    "block": ("forward", "backward", "normalize", "normalize_backward"),
    "decode": ("decode",),
}
FLAGS = (
    "-std=c++17",
    "-O3",
    # Nobody reads errno or the flags of exceptions; NaN and infinity keep their meaning.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
)
DEFINES: dict[str, tuple[str, ...]] = {"bf16": (), "fp32": ("-DFLOAT32",)}  # by precision
OWN_PROCESSOR = "-march=native"
SECONDS = 300.0  # after which a compiler is given up, where nothing else wants the cores


def find_compiler() -> str | None:
    """Return the path of the C++ compiler that torch.compile would call; None without one."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


@cache
def load_library(precision: str = "bf16") -> ctypes.CDLL:
    """Return a library, compiled first if this processor has none yet.

    Args:
        precision: "bf16" or "fp32", the type of its products.

    Raises:
        MachineError: there is no compiler, it refuses the sources, or the system refuses the
            processor's tile registers.
    """
    library = _LOADED[precision] = _load(precision)
    return library


_LOADED: dict[str, ctypes.CDLL] = {}


def any_library() -> ctypes.CDLL:
    """Return a library for what both have in common: one that is in use, else as `load_library`."""
    return next(iter(_LOADED.values()), None) or load_library()


@cache
def load_decoding() -> ctypes.CDLL:
    """Return the library of the decoding step, compiled first if this processor has none yet.

    Raises:
        MachineError: as `load_library`.
    """
    return _load("fp32", "decode")


def _load(precision: str, name: str = "block") -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        raise MachineError("there is no C++ compiler", fix="install g++, or name it in CXX")
    try:
        directory = default_cache_dir() / "native"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = directory.resolve()  # what is looked at is what is loaded, whatever a link becomes
        if is_ours(place):
            return build(compiler, place, OWN_PROCESSOR, precision, name)
    except (DataError, OSError):
        pass  # no home, a full disk, or one from which nothing may be executed
    try:
        with tempfile.TemporaryDirectory(prefix="fundamentallm-") as scratch:
            # Used without a file.
            return build(compiler, Path(scratch), OWN_PROCESSOR, precision, name)
    except OSError as error:
        raise MachineError(
            f"compiled code can be neither stored nor loaded: {error}",
            fix="set TMPDIR to a directory with space, from which programs may be executed",
        ) from error


def is_ours(directory: Path) -> bool:
    """Whether nobody else can put a library there, or another directory in its place.

    The directory is this user's, and each one above it is this user's or the system's. Others may
    write to none of them, but for a shared one (the sticky bit) above a directory of ours, which
    they cannot move away.

    Args:
        directory: an absolute path without links.
    """
    if not hasattr(os, "getuid"):
        return True
    own = directory.lstat()
    if own.st_uid != os.getuid() or not stat.S_ISDIR(own.st_mode) or own.st_mode & 0o022:
        return False
    for parent in directory.parents:
        status = parent.lstat()
        if status.st_uid not in (os.getuid(), 0) or not stat.S_ISDIR(status.st_mode):
            return False
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            return False
    return True


def build(
    compiler: str,
    directory: Path,
    processor: str = OWN_PROCESSOR,
    precision: str = "bf16",
    name: str = "block",
) -> ctypes.CDLL:
    """Return a library, from a directory where it may lie already.

    Args:
        compiler: path of a GCC.
        directory: where no other user can put one.
        processor: the compiler's option for the processor.
        precision: as for `load_library`.
        name: which library, a key of `SOURCES`.

    Raises:
        MachineError: as `load_library`.
        OSError: it cannot be written, or not loaded from there.
    """
    options = [processor, *DEFINES[precision]]
    library = ctypes.CDLL(str(_compiled(compiler, directory, options, name)))
    if name == "block":
        library.fundamentallm_packed_size.restype = ctypes.c_int64
    for function in FUNCTIONS[name]:
        getattr(library, f"fundamentallm_{function}").restype = None
    if not library.fundamentallm_available():
        raise MachineError("the system refuses the processor's tile registers (AMX)")
    return library


def _compiled(compiler: str, directory: Path, options: Sequence[str], name: str) -> Path:
    here = Path(__file__).parent
    named = hashlib.sha256()
    for source in SOURCES[name]:
        named.update((here / source).read_bytes())
    named.update("\0".join([*_identity(compiler), *FLAGS, *options]).encode())
    target = directory / f"{name}-{named.hexdigest()[:24]}.so"
    if _is_kept(target):
        return target
    what = "generation" if name == "decode" else "fp32" if "-DFLOAT32" in options else "bf16"
    logger.info("building native code (%s) for this processor, once: some seconds", what)
    with tempfile.TemporaryDirectory(prefix="building-", dir=directory) as scratch:
        new = Path(scratch) / target.name
        command = [compiler, *FLAGS, *options, str(here / SOURCES[name][0]), "-o", str(new)]
        status, errors = _compile(command)
        if status:
            reason = next((line for line in errors.splitlines() if "error" in line), "")
            raise MachineError(
                "the C++ compiler refuses the native code",
                where=compiler,
                got=reason[:200] or f"exit code {status}",
                fix="name GCC 12 or newer in CXX, or set training.compile to true or false",
            )
        new.replace(target)  # complete or absent, also if others compile it now
    return target


def _is_kept(library: Path) -> bool:
    """Whether a library lies there that only this user can have put there."""
    try:
        status = library.lstat()
    except FileNotFoundError:
        return False
    if not hasattr(os, "getuid"):
        return True
    return (
        stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    )


def _compile(command: Sequence[str]) -> tuple[int, str]:
    """Run the compiler; return its exit code and what it said.

    It runs in a group of its own, and whatever ends the wait ends the group: the driver that was
    called hands the work to other programs, which would go on without it.

    Raises:
        MachineError: it does not start, or does not end within `SECONDS`, or as
            much more as the machine is busy.
    """
    try:
        process = subprocess.Popen(  # noqa: S603 - the compiler that the user has, on our own file
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise MachineError(f"the C++ compiler failed: {error}", where=command[0]) from error
    seconds = SECONDS * _crowding()
    try:
        _, errors = process.communicate(timeout=seconds)
    except BaseException as error:
        _end_group(process)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise MachineError(
            "the C++ compiler takes too long",
            where=command[0],
            got=f"more than {seconds:.3g} seconds",
            fix="try again when the machine has less to do, or set training.compile to false",
        ) from error
    return process.returncode, errors


def _crowding() -> float:
    """Return how many times longer work takes here because others want the same cores."""
    if not hasattr(os, "getloadavg"):
        return 1.0
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a process that was not waited for yet, with all that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    if process.stderr is not None:
        process.stderr.close()
    process.wait()


def _identity(compiler: str) -> list[str]:
    """Return what the compiled code depends on beside its sources: compiler and processor."""
    status = Path(compiler).resolve().stat()
    identity = [str(Path(compiler).resolve()), str(status.st_size), str(status.st_mtime_ns)]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        wanted = ("model name", "flags", "Features")
        identity += sorted({line for line in lines if line.startswith(wanted)})
    except OSError:
        identity.append(platform.processor() or platform.machine())
    return identity
