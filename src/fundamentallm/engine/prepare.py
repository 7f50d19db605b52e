"""The `prepare` command: text of any size to token files, streamed, once.

One thread reads, decodes and cuts; others encode what it cut, in order; what comes of it is written
in that order. Threads and not processes: numpy and the `tokenizers` library let go of Python's lock
while they encode, and a few batches under way are all that is ever held.

What is written appears whole or not at all: everything lies in a hidden folder beside the target
until it is on the disk, and one rename gives it its name.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import json
import logging
import os
import shlex
import shutil
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from fundamentallm.config.component import Component
from fundamentallm.config.yaml_source import parse_yaml
from fundamentallm.data.documents import (
    STANDARD_INPUT,
    Document,
    Fingerprint,
    Input,
    InputReader,
    changed_while_read,
    copy_standard_input,
    find_inputs,
)
from fundamentallm.data.permutation import derive_key
from fundamentallm.data.prepared import FORMAT, MANIFEST, PARTS, TOKENIZER, WHOLE, read_manifest
from fundamentallm.data.token_file import HEADER_BYTES, TokenHeader, read_header
from fundamentallm.data.tokenizer import (
    TOKENIZERS,
    SubwordTokenizer,
    Tokenizer,
    load_tokenizer,
)
from fundamentallm.engine.console import say, speaking
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.engine.stopping import ended_by_signals
from fundamentallm.errors import ConfigError, DataError, MachineError
from fundamentallm.files.filesystem import Filesystem, make_directories, random_suffix
from fundamentallm.files.lock import LOCK_FILE, owning, refuse_if_owned

logger = logging.getLogger(__name__)

BATCH = 1 << 20  # characters under way in one thread
# Of a document that its tokenizer cannot cut, and of many such at once: the library needs some 100
# bytes a character meanwhile, and all of `prepare` is to stay below 400 MB.
LONGEST_WHOLE = 1 << 20
BATCH_WHOLE = 1 << 18
SAMPLE_BLOCK = 1 << 16  # characters
SAMPLE_BLOCKS = 384  # 25 million characters teach a subword tokenizer
COPY = "standard-input"


@dataclass(frozen=True)
class Options:
    """What `prepare` was asked for.

    Attributes:
        tokenizer: as in `data.tokenizer`.
        field: the key or column of the text, in JSON lines and Parquet.
        records_on_input: whether standard input is JSON lines; else it is text.
        split: "position": one file, which a run cuts by `data.split`; "document": each document
            goes to training, validation or test as a whole.
        fractions: of train, val and test, for the latter.
    """

    tokenizer: Component
    field: str = "text"
    records_on_input: bool = False
    split: str = "position"
    fractions: tuple[float, float, float] = (0.9, 0.1, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return them as plain values."""
        fractions = {"fractions": list(self.fractions)} if self.split == "document" else {}
        return {
            "tokenizer": self.tokenizer.to_plain(),
            "field": self.field,
            "records_on_input": self.records_on_input,
            "split": self.split,
            **fractions,
        }


@dataclass
class Counts:
    """What was met on the way.

    Attributes:
        documents, characters, tokens: how many; an end is a token.
        empty: documents without a character, which are left out.
        seen: whether there was anything but white space.
        duplicates: documents that are equal to an earlier one.
    """

    documents: int = 0
    characters: int = 0
    tokens: int = 0
    empty: int = 0
    seen: bool = False
    duplicates: int = 0


@dataclass
class Pieces:
    """Some pieces of documents that are encoded in one go.

    Attributes:
        texts: one after the other.
        parts: which file each belongs to.
        ends: whether a document ends with it.
        wheres: the documents.
        size: characters.
    """

    texts: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)
    wheres: list[str] = field(default_factory=list)
    size: int = 0


def prepare(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    with speaking(), ended_by_signals():
        load_plugins(options.plugins, "--plugins")
        asked = Options(
            tokenizer_choice(options.tokenizer, options.vocab_size),
            options.field or "text",
            options.field is not None,
            options.split,
            tuple(options.fractions),
        )
        check_options(asked)
        done = write_prepared(options.inputs, options.out, asked)
    say(("Nothing to do: " if not done else "") + f"{options.out} is prepared.")
    say("Put this into your YAML:")
    say(f"  data: {{source: {json.dumps(str(options.out))}}}")
    say("or train right away:")
    source = shlex.quote(f"data.source={options.out}")
    say(f"  python -m fundamentallm.engine run configs/quickstart.yaml name=mine {source}")
    return 0


def tokenizer_choice(text: str, vocab_size: int | None) -> Component:
    """Return the tokenizer that a command line names.

    Args:
        text: a registered name, the path of a tokenizer.json, or `{name: ..., option: ...}`.
        vocab_size: the option of that name, if it was given by itself.

    Raises:
        ConfigError: it is none of these.
    """
    if text.endswith(".json"):
        choice: Any = {"name": "file", "path": str(Path(text).absolute())}
    else:
        choice = parse_yaml(f"tokenizer: {text}").data["tokenizer"]
    if vocab_size is not None:
        if isinstance(choice, str):
            choice = {"name": choice}
        if isinstance(choice, dict):  # else it is refused below
            choice = {**choice, "vocab_size": vocab_size}
    try:
        return Component.model_validate(choice)
    except ValueError as error:
        raise ConfigError(
            "this is not a tokenizer",
            where="--tokenizer",
            got=text,
            expected="a name, a tokenizer.json, or {name: bpe, vocab_size: 4096}",
        ) from error


def check_options(options: Options) -> None:
    """Check what was asked for before anything is read.

    Raises:
        ConfigError: a name, an option or a number that cannot be.
    """
    chosen = options.tokenizer
    try:
        TOKENIZERS.check(chosen.name, chosen.options)
    except ConfigError as error:
        error.where = error.where or "--tokenizer"
        raise
    fractions = options.fractions
    if not fractions[0] > 0 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(
            "these are not fractions of a whole",
            where="--fractions",
            got=" ".join(map(str, fractions)),
            expected="three from 0 that sum to 1, the first above 0",
        )


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
        DataError: an input is no text, there is none, or the target holds something else.
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
        with owning(staging):
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
        filesystem.remove_file(staging / LOCK_FILE)
        filesystem.sync_directory(staging)
        _give_name(filesystem, staging, out)
    finally:
        # Whoever was killed here leaves a hidden folder, which the next run removes.
        shutil.rmtree(staging, ignore_errors=True)
    return True


def _give_name(filesystem: Filesystem, staging: Path, out: Path) -> None:
    try:
        filesystem.rename(staging, out)
    except OSError as error:
        if out.exists():
            raise DataError(
                "another process has put something there meanwhile",
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
    if not (out / MANIFEST).exists():
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
    own = load_tokenizer(out / TOKENIZER).fingerprint()
    for name, said in manifest["files"].items():
        header = read_header(out / f"{name}.tokens")
        if (header.count, header.sha256) != (said["tokens"], said["sha256"]):
            raise DataError(
                "the token file is not the one that was prepared",
                where=str(out / f"{name}.tokens"),
                got=f"{header.count:,} tokens, SHA-256 {header.sha256[:16]}",
                expected=f"{said['tokens']:,} tokens, SHA-256 {said['sha256'][:16]}",
                fix=fix,
            )
        if not own == header.tokenizer == manifest["tokenizer"]:
            raise DataError(
                "the tokenizer in the folder is not that of its tokens",
                where=str(out / TOKENIZER),
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
    if out.is_dir() and (out / MANIFEST).exists():
        return  # looked at once the inputs are known
    if out.exists() or out.is_symlink():
        raise DataError(
            "there is something else at the target",
            where=str(out),
            expected="a folder that does not exist yet",
            fix="choose another --out",
        )


def _remove_leftovers(out: Path) -> None:
    """Remove what runs left that were killed; one that lives holds its lock."""
    own = {LOCK_FILE, MANIFEST, TOKENIZER, COPY, *(f"{name}.tokens" for name in (WHOLE, *PARTS))}
    for leftover in out.parent.glob(f".{glob_escaped(out.name)}.tmp-*"):
        with contextlib.suppress(MachineError, OSError):
            if {path.name for path in leftover.iterdir()} <= own:
                refuse_if_owned(leftover)
                shutil.rmtree(leftover, ignore_errors=True)


def glob_escaped(name: str) -> str:
    """Return a name as a pattern that matches it alone."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _copy_input(filesystem: Filesystem, path: Path) -> None:
    with filesystem.create(path) as file:
        copy_standard_input(sys.stdin.buffer, lambda data: _write_all(filesystem, file, data))


def _write_into(
    filesystem: Filesystem, staging: Path, inputs: Sequence[Input], options: Options
) -> None:
    """Write all files of a folder and wait until they are on the disk."""
    counts = Counts()
    learning = _learns(options.tokenizer.name)
    with _progress(inputs, passes=2 if learning else 1) as on_bytes:
        learned: list[Fingerprint] = []
        tokenizer = _build_tokenizer(inputs, options, learned, on_bytes)
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
            documents = _documents(inputs, options.field, fingerprints, on_bytes)
            batches = _cut(documents, tokenizer, options, counts)
            for ids in _encoded(batches, tokenizer, dtype):
                for name, part in ids.items():
                    writers[name].add(part)
    for before, after in zip(learned, fingerprints, strict=False):
        if before.sha256 != after.sha256:
            raise changed_while_read(after.path)
    counts.tokens = sum(writer.count for writer in writers.values())
    if not counts.seen:
        raise _no_text(inputs, counts.documents)
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
    _write_text(filesystem, staging / TOKENIZER, tokenizer.to_json())
    _write_text(filesystem, staging / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    _tell(counts, files, tokenizer)


def _no_text(inputs: Sequence[Input], num_blank: int = 0) -> DataError:
    return DataError(
        "there is no text in the inputs",
        where=", ".join(source.name for source in inputs[:5]),
        got="only white space" if num_blank else "empty documents alone",
        fix="name files with text",
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


class TokenWriter:
    """Writes a token file: an empty header, the ids, and at last the header.

    Args:
        filesystem: makes the changes.
        path: of the file, which does not exist.
        dtype: of an id.

    Attributes:
        count: ids so far.
    """

    def __init__(self, filesystem: Filesystem, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.count = 0
        self._filesystem = filesystem
        self._dtype = dtype
        self._digest = hashlib.sha256()
        self.file = filesystem.create(path)

    def leave_room(self) -> None:
        """Write an empty header."""
        _write_all(self._filesystem, self.file, memoryview(bytes(HEADER_BYTES)))

    def add(self, ids: np.ndarray) -> None:
        """Append ids."""
        data = memoryview(np.ascontiguousarray(ids, self._dtype).data).cast("B")
        self._digest.update(data)
        _write_all(self._filesystem, self.file, data)
        self.count += len(ids)

    def hexdigest(self) -> str:
        """Return the SHA-256 of the ids."""
        return self._digest.hexdigest()

    def finish(self, header: TokenHeader) -> None:
        """Make it a token file, on the disk. Until here it is none."""
        with self.path.open("r+b", buffering=0) as file:
            _write_all(self._filesystem, file, memoryview(header.to_bytes()))
            self._filesystem.sync(file)


def _write_all(filesystem: Filesystem, file: FileIO, data: memoryview) -> None:
    while data.nbytes:
        data = data[filesystem.write(file, data) :]


def _write_text(filesystem: Filesystem, path: Path, text: str) -> None:
    with filesystem.create(path) as file:
        _write_all(filesystem, file, memoryview(text.encode("utf-8")))
        filesystem.sync(file)


# ------------------------------------------------------------------ reading


def _documents(
    inputs: Sequence[Input],
    text_field: str,
    fingerprints: list[Fingerprint],
    on_bytes: Callable[[int], object],
) -> Iterator[Document]:
    """Yield the documents of all inputs, and note what each input was."""
    for source in inputs:
        reader = InputReader(source, text_field, on_bytes)
        yield from reader.documents()
        assert reader.fingerprint is not None
        fingerprints.append(reader.fingerprint)


def _cut(
    documents: Iterable[Document], tokenizer: Tokenizer, options: Options, counts: Counts
) -> Iterator[Pieces]:
    """Yield pieces of documents, enough for one go each; count the documents."""
    hashes = array(
        "Q"
    )  # 64 bits of each: a false duplicate in 5 million has odds of 1 to a million
    batch = Pieces()
    most = BATCH_WHOLE if _reads_whole(tokenizer) else BATCH
    for document in documents:
        digest = hashlib.blake2b(digest_size=8)
        part = ""
        size = 0
        try:
            for piece in tokenizer.pieces(document.chunks, LONGEST_WHOLE):
                data = piece.encode("utf-8")
                digest.update(data)
                # By its beginning, so that equal documents go to the same part.
                part = part or _part_of(data, options)
                size += len(piece)
                counts.seen = counts.seen or not piece.isspace()
                if batch.texts and batch.size + len(piece) > most:
                    yield batch
                    batch = Pieces()
                batch.texts.append(piece)
                batch.parts.append(part)
                batch.ends.append(False)
                batch.wheres.append(document.where)
                batch.size += len(piece)
        except DataError as error:
            error.where = error.where or document.where
            raise
        if not size:
            counts.empty += 1
            continue
        batch.ends[-1] = True
        counts.documents += 1
        counts.characters += size
        hashes.append(int.from_bytes(digest.digest(), "little"))
    if batch.texts:
        yield batch
    counts.duplicates = len(hashes) - len(np.unique(np.array(hashes, np.uint64)))


def _reads_whole(tokenizer: Tokenizer) -> bool:
    """Tell whether a tokenizer reads a document in one piece: it cuts no plain text."""
    return not tokenizer.find_cut("plain text " * 9)


def _part_of(data: bytes, options: Options) -> str:
    if options.split == "position":
        return WHOLE
    drawn = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") / 2**64
    bound = 0.0
    for name, fraction in zip(PARTS, options.fractions, strict=True):
        bound += fraction
        if drawn < bound:
            return name
    return PARTS[0]  # fractions that miss 1 by a rounding error


# ------------------------------------------------------------------ tokenizers


def _learns(name: str) -> bool:
    parameters = inspect.signature(TOKENIZERS.get(name)).parameters
    return bool({"texts", "vocabulary"} & set(parameters))


def _build_tokenizer(
    inputs: Sequence[Input],
    options: Options,
    learned: list[Fingerprint],
    on_bytes: Callable[[int], object],
) -> Tokenizer:
    """Build the tokenizer, from a first look at the inputs if it learns, with an end."""
    name, chosen = options.tokenizer.name, dict(options.tokenizer.options)
    parameters = inspect.signature(TOKENIZERS.get(name)).parameters
    if "end" in TOKENIZERS.options(name) and parameters["end"].default is False:
        chosen.setdefault("end", True)
    supplied: dict[str, Any] = {}
    documents = _documents(inputs, options.field, learned, on_bytes)
    if "texts" in parameters:
        supplied["texts"] = sample(documents)
        if not supplied["texts"]:
            raise _no_text(inputs)
    elif "vocabulary" in parameters:
        supplied["vocabulary"] = _characters(documents)
        if not supplied["vocabulary"]:
            raise _no_text(inputs)
    elif "text" in parameters:
        raise ConfigError(
            f"the tokenizer '{name}' needs the whole text at once, which `prepare` never has",
            where="--tokenizer",
            fix="give its constructor a parameter `texts` or `vocabulary`, or use it in a run",
        )
    tokenizer = TOKENIZERS.build(name, chosen, **supplied)
    if tokenizer.end_id is None:
        raise ConfigError(
            f"the tokenizer '{name}' has no token for the end of a document",
            where="--tokenizer",
            fix="name one of its tokens: {name: file, path: ..., end: ...}"
            if isinstance(tokenizer, SubwordTokenizer)
            else "give it a property `end_id`",
        )
    return tokenizer


def sample(documents: Iterable[Document]) -> list[str]:
    """Return texts from all over the documents, 25 million characters at most.

    Blocks of neighbouring texts are drawn with equal chances (algorithm R, Vitter 1985), by numbers
    that are the same each time.
    """
    blocks: list[list[str]] = []
    for number, block in enumerate(_blocks(documents)):
        if number < SAMPLE_BLOCKS:
            blocks.append(block)
        elif (place := derive_key(number) % (number + 1)) < SAMPLE_BLOCKS:
            blocks[place] = block
    return [text for block in blocks for text in block]


def _blocks(documents: Iterable[Document]) -> Iterator[list[str]]:
    block: list[str] = []
    size = 0
    for document in documents:
        for chunk in document.chunks:
            for start in range(0, len(chunk), SAMPLE_BLOCK):
                block.append(chunk[start : start + SAMPLE_BLOCK])
                size += len(block[-1])
                if size >= SAMPLE_BLOCK:
                    yield block
                    block, size = [], 0
    if size:
        yield block


def _characters(documents: Iterable[Document]) -> list[str]:
    """Return every character that occurs."""
    seen = np.zeros(0x110000, dtype=bool)
    for document in documents:
        for chunk in document.chunks:
            for start in range(0, len(chunk), SAMPLE_BLOCK):
                text = chunk[start : start + SAMPLE_BLOCK]
                seen[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
    return [chr(code) for code in np.flatnonzero(seen)]


# ------------------------------------------------------------------ encoding


def _encoded(
    batches: Iterator[Pieces], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the ids of each batch by the file that they belong to, in order."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    # The library of subwords uses all cores for one batch; the second is read out meanwhile.
    workers = 2 if isinstance(tokenizer, SubwordTokenizer) else min(cores, 8)
    if _reads_whole(tokenizer):
        workers = 1
    waiting: deque[Future[dict[str, np.ndarray]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode, batch, tokenizer, dtype))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _encode(batch: Pieces, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> dict[str, np.ndarray]:
    try:
        encoded = tokenizer.encode_many(batch.texts)
    except DataError:
        _find_fault(batch, tokenizer)
        raise
    end = np.array([tokenizer.end_id], dtype)
    ids: dict[str, list[np.ndarray]] = {}
    for part, piece, ends in zip(batch.parts, encoded, batch.ends, strict=True):
        own = ids.setdefault(part, [])
        own.append(piece)
        if ends:
            own.append(end)
    return {part: np.concatenate(pieces) for part, pieces in ids.items()}


def _find_fault(batch: Pieces, tokenizer: Tokenizer) -> None:
    """Raise the fault of a batch with the document that it lies in."""
    for text, where in zip(batch.texts, batch.wheres, strict=True):
        try:
            tokenizer.encode(text)
        except DataError as error:
            around = text[:30].encode("unicode_escape").decode()
            error.where = f"{where}: in the text that begins with '{around}'"
            raise


# ------------------------------------------------------------------ surroundings


@contextlib.contextmanager
def _progress(inputs: Sequence[Input], passes: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    for source in inputs:
        if not source.path.exists():
            raise DataError("the file has gone", where=source.name)
    total = passes * sum(source.path.stat().st_size for source in inputs)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="prepare", disable=None, leave=False
    ) as bar:
        yield bar.update
