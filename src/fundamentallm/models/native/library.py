"""From C++ to functions: compiled for this processor at the first use, kept for the next.

The library lies in the user's cache directory, under a name that follows from the sources, the
compiler and the processor. It takes about three seconds to make.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from fundamentallm.errors import DataError, MachineError
from fundamentallm.files.cache_directory import default_cache_dir

SOURCES = ("block.cpp", "rows.h", "tiles.h", "numbers.h")
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
OWN_PROCESSOR = "-march=native"
SECONDS = 300.0  # after which a compiler is given up


def find_compiler() -> str | None:
    """Return the path of the C++ compiler that torch.compile would call; None without one."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


@cache
def load_library() -> ctypes.CDLL:
    """Return the library, compiled first if this processor has none yet.

    Raises:
        MachineError: there is no compiler, it refuses the sources, or the system refuses the
            processor's tile registers.
    """
    compiler = find_compiler()
    if compiler is None:
        raise MachineError("there is no C++ compiler", fix="install g++, or name it in CXX")
    try:
        directory = default_cache_dir() / "native"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_ours(directory):
            return build(compiler, directory)
    except (DataError, OSError):
        pass  # no home, a full disk, or one from which nothing may be executed
    try:
        with tempfile.TemporaryDirectory(prefix="fundamentallm-") as name:
            return build(compiler, Path(name))  # a library in use needs no name
    except OSError as error:
        raise MachineError(
            f"compiled code can neither be kept nor loaded: {error}",
            fix="set TMPDIR to a directory with space, from which programs may be executed",
        ) from error


def _is_ours(directory: Path) -> bool:
    """Whether nobody else can put a library there, or another directory in its place."""
    if not hasattr(os, "getuid"):
        return True
    place = directory.resolve()
    if place.stat().st_uid != os.getuid() or place.stat().st_mode & 0o022:
        return False
    above = [parent.stat() for parent in place.parents]
    return not any(status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX for status in above)


def build(compiler: str, directory: Path, processor: str = OWN_PROCESSOR) -> ctypes.CDLL:
    """Return the library, from a directory where it may lie already.

    Args:
        compiler: path of a GCC.
        directory: where nobody else can put one.
        processor: the compiler's option for the processor.

    Raises:
        MachineError: as `load_library`.
        OSError: it cannot be written, or not loaded from there.
    """
    library = ctypes.CDLL(str(_compiled(compiler, directory, processor)))
    library.fundamentallm_packed_size.restype = ctypes.c_int64
    for name in ("forward", "backward", "normalize", "normalize_backward"):
        getattr(library, f"fundamentallm_{name}").restype = None
    if not library.fundamentallm_available():
        raise MachineError("the system refuses the processor's tile registers (AMX)")
    return library


def _compiled(compiler: str, directory: Path, processor: str) -> Path:
    here = Path(__file__).parent
    named = hashlib.sha256()
    for source in SOURCES:
        named.update((here / source).read_bytes())
    named.update("\0".join([*_identity(compiler), *FLAGS, processor]).encode())
    target = directory / f"block-{named.hexdigest()[:24]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(prefix="building-", dir=directory) as name:
        new = Path(name) / target.name
        command = [compiler, *FLAGS, processor, str(here / SOURCES[0]), "-o", str(new)]
        try:
            done = subprocess.run(  # noqa: S603 - the compiler that the user has, on our own file
                command, capture_output=True, text=True, timeout=SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:  # it does not start, or does not end
            raise MachineError(f"the C++ compiler failed: {error}", where=compiler) from error
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise MachineError(
                "the C++ compiler refuses the block's code",
                where=compiler,
                got=reason[:200] or f"exit code {done.returncode}",
                fix="name GCC 12 or newer in CXX, or set training.compile to true or false",
            )
        new.replace(target)  # whole or not at all, whoever else compiles it now
    return target


def _identity(compiler: str) -> list[str]:
    """Return what the compiled code depends on besides its sources: compiler and processor."""
    status = Path(compiler).resolve().stat()
    identity = [str(Path(compiler).resolve()), str(status.st_size), str(status.st_mtime_ns)]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        wanted = ("model name", "flags", "Features")
        identity += sorted({line for line in lines if line.startswith(wanted)})
    except OSError:
        identity.append(platform.processor() or platform.machine())
    return identity
