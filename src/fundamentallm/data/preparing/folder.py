"""A prepared folder, which is complete or absent.

Everything lies in a hidden folder beside the target until it is on the disk, and one rename gives
it its name. One thread reads, decodes and cuts; others encode what it cut; what comes of it is
written in order.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fundamentallm.data.documents import (
    STANDARD_INPUT,
    Fingerprint,
    Input,
    changed_while_read,
    copy_standard_input,
    find_inputs,
)
from fundamentallm.data.paths import PREPARED
from fundamentallm.data.prepared import FORMAT, PARTS, WHOLE, read_manifest
from fundamentallm.data.preparing.encoding import encoded
from fundamentallm.data.preparing.options import Options
from fundamentallm.data.preparing.pieces import Counts, cut, no_text, read_documents
from fundamentallm.data.preparing.token_writer import TokenWriter
from fundamentallm.data.preparing.tokenizer import build_with_end, learns
from fundamentallm.data.token_file import TokenHeader, read_header
from fundamentallm.data.tokenizer import TOKENIZER_FILE, TOKENIZERS, Tokenizer, load_tokenizer
from fundamentallm.errors import DataError, MachineError
from fundamentallm.files.filesystem import (
    Filesystem,
    make_directories,
    random_suffix,
    write_all,
    write_file,
)
from fundamentallm.files.lock import refuse_if_owned, run_lock
from fundamentallm.files.run_layout import LOCK
from fundamentallm.files.terminal import room_in

logger = logging.getLogger(__name__)

COPY = "standard-input"


def write_prepared(
    words: Sequence[str], out: Path, options: Options, filesystem: Filesystem | None = None
) -> bool:
    """Prepare inputs, unless the target holds them already.

    Args:
        words: as `find_inputs` takes them.
        out: the folder that appears.
        options: what is asked for.
        filesystem: makes every change of the disk.

    Returns:
        Whether anything was written.

    Raises:
        DataError: an input is not text, there is no text, or the target holds something else.
        ConfigError: the tokenizer cannot be built.
        MachineError: a package is missing, or another process writes there.
    """
    filesystem = filesystem or Filesystem()
    from_input = [word for word in words if word == STANDARD_INPUT]
    if not from_input and up_to_date(find_inputs(words), out, options):
        return False
    _refuse_occupied(out)
    out = out.absolute()
    make_directories(filesystem, out.parent)
    _remove_leftovers(out)
    staging = out.with_name(f".{out.name}.tmp-{random_suffix()}")
    filesystem.make_directory(staging)
    try:
        with run_lock(staging):
            copy = None
            if from_input:
                copy = staging / COPY
                _copy_input(filesystem, copy)
            inputs = find_inputs(words, copy, options.records_on_input)
            if from_input and up_to_date(inputs, out, options):
                return False
            _write_into(filesystem, staging, inputs, options)
            if copy is not None:
                filesystem.remove_file(copy)
        filesystem.remove_file(staging / LOCK)
        filesystem.sync_directory(staging)
        _give_name(filesystem, staging, out)
    finally:
        # A process killed here leaves a hidden folder, which the next run removes.
        shutil.rmtree(staging, ignore_errors=True)
    return True


def _give_name(filesystem: Filesystem, staging: Path, out: Path) -> None:
    try:
        filesystem.rename(staging, out)
    except OSError as error:
        if out.exists():
            raise DataError(
                "another process has written the target meanwhile",
                where=str(out),
                fix="look at it, or choose another --out",
            ) from error
        raise
    filesystem.sync_directory(out.parent)


def up_to_date(inputs: Sequence[Input], out: Path, options: Options) -> bool:
    """Tell whether a folder holds what these inputs and options would give.

    Size and time of change of an input are enough; where only the time differs, its contents are
    looked at. Of the folder, the tokenizer and the heads of the token files are read; a run looks
    at every token when it opens them.

    Raises:
        DataError: it was prepared from others, or is damaged.
    """
    if not (out / PREPARED).exists():
        return False
    manifest = read_manifest(out)
    fix = "choose another --out, or remove the folder"
    if manifest["options"] != options.to_dict():
        raise DataError(
            "the folder was prepared with other options",
            where=str(out),
            got=json.dumps(manifest["options"]),
            expected=json.dumps(options.to_dict()),
            fix=fix,
        )
    known = {entry["path"]: entry for entry in manifest["inputs"]}
    if [source.name for source in inputs] != list(known):
        raise DataError(
            "the folder was prepared from other inputs",
            where=str(out),
            got=", ".join(list(known)[:5]),
            expected=", ".join([source.name for source in inputs][:5]),
            fix=fix,
        )
    for source in inputs:
        if not _same(source, known[source.name]):
            raise DataError(
                "the folder was prepared from this input before it changed",
                where=f"{out}: {source.name}",
                fix=fix,
            )
    chosen = options.tokenizer
    if chosen.name == "file":
        named = TOKENIZERS.build(chosen.name, chosen.options)
        if named.fingerprint() != manifest["tokenizer"]:
            raise DataError(
                "the folder was prepared with this tokenizer before it changed",
                where=str(out),
                got=f"tokenizer {manifest['tokenizer'][:16]}",
                expected=f"tokenizer {named.fingerprint()[:16]}",
                fix=fix,
            )
    own = load_tokenizer(out / TOKENIZER_FILE).fingerprint()
    for name, said in manifest["files"].items():
        header = read_header(out / f"{name}.tokens")
        if (header.count, header.sha256) != (said["tokens"], said["sha256"]):
            raise DataError(
                "the token file has changed since it was prepared",
                where=str(out / f"{name}.tokens"),
                got=f"{header.count:,} tokens, SHA-256 {header.sha256[:16]}",
                expected=f"{said['tokens']:,} tokens, SHA-256 {said['sha256'][:16]}",
                fix=fix,
            )
        if not own == header.tokenizer == manifest["tokenizer"]:
            raise DataError(
                "the tokenizer in the folder differs from the one of its tokens",
                where=str(out / TOKENIZER_FILE),
                got=f"tokenizer {own[:16]}",
                expected=f"tokenizer {header.tokenizer[:16]}",
                fix=fix,
            )
    return True


def _same(source: Input, known: Mapping[str, Any]) -> bool:
    status = source.path.stat()
    if status.st_size != known["size"]:
        return False
    if status.st_mtime_ns == known["mtime_ns"]:
        return True
    digest = hashlib.sha256()
    with source.path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return bool(digest.hexdigest() == known["sha256"])


def _refuse_occupied(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.is_dir() and (out / PREPARED).exists():
        return  # looked at once the inputs are known
    if out.exists() or out.is_symlink():
        raise DataError(
            "the target exists and holds something else",
            where=str(out),
            expected="a folder that does not exist yet",
            fix="choose another --out",
        )


def _remove_leftovers(out: Path) -> None:
    """Remove what killed runs left; a live one holds its lock."""
    own = {LOCK, PREPARED, TOKENIZER_FILE, COPY, *(f"{name}.tokens" for name in (WHOLE, *PARTS))}
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.tmp-*"):
        with contextlib.suppress(MachineError, OSError):
            if {path.name for path in leftover.iterdir()} <= own:
                refuse_if_owned(leftover)
                shutil.rmtree(leftover, ignore_errors=True)


def _copy_input(filesystem: Filesystem, path: Path) -> None:
    with filesystem.create(path) as file:
        copy_standard_input(sys.stdin.buffer, lambda data: write_all(filesystem, file, data))


def _write_into(
    filesystem: Filesystem, staging: Path, inputs: Sequence[Input], options: Options
) -> None:
    """Write all files of a folder and wait until they are on the disk."""
    counts = Counts()
    learning = learns(options.tokenizer.name)
    with _progress(inputs, passes=2 if learning else 1) as on_bytes:
        learned: list[Fingerprint] = []
        tokenizer = build_with_end(inputs, options, learned, on_bytes)
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<")
        names = (WHOLE,) if options.split == "position" else PARTS
        writers = {}
        fingerprints: list[Fingerprint] = []
        with contextlib.ExitStack() as opened:
            for name in names:
                writer = TokenWriter(filesystem, staging / f"{name}.tokens", dtype)
                opened.callback(writer.file.close)
                writer.leave_room()
                writers[name] = writer
            documents = read_documents(inputs, options.field, fingerprints, on_bytes)
            batches = cut(documents, tokenizer, options, counts)
            for ids in encoded(batches, tokenizer, dtype):
                for name, part in ids.items():
                    writers[name].add(part)
    for before, after in zip(learned, fingerprints, strict=False):
        if before.sha256 != after.sha256:
            raise changed_while_read(after.path)
    counts.tokens = sum(writer.count for writer in writers.values())
    if not counts.seen:
        raise no_text(inputs, counts.documents)
    files = {}
    for name, writer in writers.items():
        if writer.count:
            header = TokenHeader(
                dtype.str,
                writer.count,
                tokenizer.vocab_size,
                tokenizer.end_id,
                tokenizer.fingerprint(),
                writer.hexdigest(),
            )
            writer.finish(header)
            files[name] = {"tokens": writer.count, "sha256": header.sha256}
        else:
            filesystem.remove_file(writer.path)
    manifest = {
        "format": FORMAT,
        "options": options.to_dict(),
        "inputs": [fingerprint.to_dict() for fingerprint in fingerprints],
        "tokenizer": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "files": files,
        **vars(counts),
    }
    write_file(filesystem, staging / TOKENIZER_FILE, [tokenizer.to_json().encode()])
    write_file(filesystem, staging / PREPARED, [f"{json.dumps(manifest, indent=1)}\n".encode()])
    _tell(counts, files, tokenizer)
    if options.split == "document":
        _tell_other_shares(counts, files, options.fractions)


def _tell_other_shares(
    counts: Counts, files: Mapping[str, Any], fractions: Sequence[float]
) -> None:
    """Warn where whole documents did not give the shares that were asked for."""
    for name, asked in zip(PARTS, fractions, strict=True):
        share = files.get(name, {"tokens": 0})["tokens"] / max(1, counts.tokens)
        if abs(share - asked) > max(0.02, asked / 4):
            logger.warning(
                "%s has %.1f %% of the tokens and not %.1f %%: whole documents are drawn one by"
                " one, and %s are too few, or too unlike in length; --split position keeps the"
                " share",
                name,
                100 * share,
                100 * asked,
                f"{counts.documents:,}",
            )


def _tell(counts: Counts, files: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    logger.info(
        "%s, %s characters, %s tokens in a vocabulary of %s",
        "1 document" if counts.documents == 1 else f"{counts.documents:,} documents",
        f"{counts.characters:,}",
        f"{counts.tokens:,}",
        f"{tokenizer.vocab_size:,}",
    )
    if len(files) > 1:
        logger.info("%s", ", ".join(f"{name}: {said['tokens']:,}" for name, said in files.items()))
    if counts.empty:
        logger.info("%s empty documents were left out", f"{counts.empty:,}")
    if counts.duplicates:
        logger.warning(
            "%s of %s documents repeat an earlier one word for word (%.1f %%)",
            f"{counts.duplicates:,}",
            f"{counts.documents:,}",
            100 * counts.duplicates / counts.documents,
        )


@contextlib.contextmanager
def _progress(inputs: Sequence[Input], passes: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    for source in inputs:
        if not source.path.exists():
            raise DataError("the file has gone", where=source.name)
    total = passes * sum(source.path.stat().st_size for source in inputs)
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="prepare",
        disable=None,
        leave=False,
        ncols=room_in(sys.stderr),
    ) as bar:
        yield bar.update
