"""Read the files of a run for a report: of a run that trains, has ended or was killed.

Nothing is written. A file that is missing, torn or damaged is left out and named in `notes`, since
a report is wanted most of the runs that went wrong.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from fundamentallm.config import RunConfig
from fundamentallm.errors import CheckpointError, FundamentaLLMError, MachineError
from fundamentallm.files.lock import refuse_if_owned
from fundamentallm.files.private import check_directory, open_to_read
from fundamentallm.files.run_layout import (
    BEST,
    CONFIG,
    INCIDENTS,
    LAST,
    LOG,
    METRICS,
    REPORT,
    SAMPLES,
    SCORES,
    USAGE,
    RunOrCheckpoint,
)
from fundamentallm.inference.load import checkpoints_in
from fundamentallm.reports.curves import Curve
from fundamentallm.training.checkpoint.changes import in_words, records_in
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.checkpoint.scores import Scores
from fundamentallm.training.checkpoint.store import CheckpointStore

MAX_CURVES = 60
MAX_NAME_CHARACTERS = 200
MAX_SAMPLES = 100
MAX_SAMPLE_CHARACTERS = 4_000
MAX_MARKS = 1_000
MAX_LINE_BYTES = 1 << 20
MAX_REPORT_BYTES = 64 << 20
MAX_SAFE_INTEGER = 2**53 - 1  # a larger one is another number in JavaScript

NOT_FINITE = ("NaN", "Infinity", "-Infinity")
WENT_BACK = re.compile(r"went back from step (\d{1,15}) to step \d{1,15} \(.*")


@dataclass(frozen=True)
class Mark:
    """An incident, that the run went back, or that it went on with a changed configuration.

    Attributes:
        step: where it happened.
        kind: "incident", "rollback" or "change".
        text: what happened.
    """

    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A text that the run wrote, and what it copies (`data.copying.CopyingFigures.of`).

    Attributes:
        step: of its weights.
        prompt: what it continues.
        text: the text.
        copying: plain figures by name; empty if they were not measured.
        usual: the same of validation text; empty if they were not measured.
        place: where the longest span stands; empty without one.
    """

    step: int
    prompt: str
    text: str
    copying: Mapping[str, float] = field(default_factory=dict)
    usual: Mapping[str, float] = field(default_factory=dict)
    place: str = ""


@dataclass(frozen=True)
class Spent:
    """What the processes of a run spent together.

    Attributes:
        seconds: by phase; empty if none recorded it.
        joules: by counter; empty if none is readable.
        num_processes: that recorded it.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    joules: Mapping[str, float] = field(default_factory=dict)
    num_processes: int = 0


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint and its proof.

    Attributes:
        name: its directory's name.
        hash: of its manifest, which has the hashes of all its files; empty if it is damaged.
        num_bytes: of its files.
        val_loss: nats per token; None if it was not measured there.
        pointers: "best", "last".
        fault: what is wrong; empty if its manifest is intact.
    """

    name: str
    hash: str = ""
    num_bytes: int = 0
    val_loss: float | None = None
    pointers: tuple[str, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class RunData:
    """What a run left on the disk.

    Attributes:
        path: its directory.
        name: the directory's name.
        state: running, finished (and why), or not finished.
        is_running: whether a process trains it now.
        config: its resolved configuration, plain; empty if it cannot be read.
        config_text: the file.
        curves: by metric name.
        marks: incidents, rollbacks and changes in the order of their steps.
        samples: in the order of their steps.
        num_samples: of the file, some of which `samples` may lack.
        checkpoints: newest first.
        bytes_per_token: UTF-8 bytes of validation text behind a predicted token; None if unknown.
        facts: what its newest intact checkpoint says about data, tokenizer, machine, versions.
        spent: time and energy.
        notes: what could not be read or is left out.
    """

    path: Path
    name: str
    state: str
    is_running: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    marks: tuple[Mark, ...] = ()
    samples: tuple[Sample, ...] = ()
    num_samples: int = 0
    checkpoints: tuple[CheckpointEntry, ...] = ()
    bytes_per_token: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    spent: Spent = Spent()
    notes: tuple[str, ...] = ()


def read_run(path: Path) -> RunData:
    """Read a run.

    Args:
        path: its directory, or RUN_OR_CHECKPOINT of it.

    Raises:
        CheckpointError: there is no run.
    """
    run, checkpoints = _places(path)
    if not any((run / name).exists() for name in (CONFIG, METRICS)):
        raise CheckpointError(
            "this is not a run: it has neither a configuration nor metrics",
            where=str(path),
            fix="name a directory like runs/quickstart",
        )
    notes: list[str] = []
    config, text = _config(run, notes)
    curves = _curves(run, notes)
    samples, num_samples = _samples(run, notes)
    entries, newest, ended = _checkpoints(checkpoints, notes)
    marks = [*_incidents(run, notes), *_rollbacks(run, notes), *_changes(newest)]
    facts = _facts(newest)
    is_running = _is_running(run)
    state = "running" if is_running else f"finished: {ended}" if ended else "not finished"
    return RunData(
        run,
        run.resolve().name,
        state,
        is_running,
        config,
        text,
        curves,
        tuple(sorted(marks, key=lambda mark: mark.step)[:MAX_MARKS]),
        samples,
        num_samples,
        entries,
        1.0 if facts.get("tokenizer") == "byte" else None,
        facts,
        _spent(run, notes),
        tuple(notes),
    )


def stamp(path: Path) -> tuple[bool, tuple[tuple[str, int, int], ...]]:
    """Return whether a run trains, and names, times and sizes of its files.

    It changes when the run does; the death of a process changes no file.
    """
    run, checkpoints = _places(path)
    names = [run / name for name in (CONFIG, METRICS, SAMPLES, USAGE, LOG, INCIDENTS)]
    found = []
    for file in [*names, *(checkpoints / name for name in ("", SCORES, BEST, LAST))]:
        try:
            status = file.stat()
        except OSError:
            continue
        found.append((str(file), status.st_mtime_ns, status.st_size))
    return _is_running(run), tuple(found)


def _places(path: Path) -> tuple[Path, Path]:
    """Return the directory of the run that RUN_OR_CHECKPOINT means, and of its checkpoints."""

    def found(run: Path) -> Path:
        try:
            return checkpoints_in(run)
        except FundamentaLLMError:  # its configuration is damaged or of another version
            return run / "checkpoints"

    named = RunOrCheckpoint.parse(path, found)
    if named.is_run:
        return path, named.checkpoints
    above = (one for one in named.checkpoints.parents if (one / CONFIG).exists())
    return next(above, named.checkpoints), named.checkpoints


def _config(run: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    text = ""
    try:
        with open_to_read(run / CONFIG) as file:
            text = (file.read(MAX_LINE_BYTES) or b"").decode(errors="replace")
        return RunConfig.from_yaml(run / CONFIG).to_dict(), text
    except (OSError, FundamentaLLMError) as error:
        notes.append(f"{CONFIG}: {str(error).splitlines()[0]}")
        return {}, text


def _lines(path: Path, notes: list[str]) -> Iterator[bytes]:
    """Yield the whole lines of a file; none if it does not exist."""
    try:
        with BufferedReader(open_to_read(path)) as file:
            while line := file.readline(MAX_LINE_BYTES):
                if line.endswith(b"\n"):  # else it is being written, or longer than any of ours
                    yield line
    except FileNotFoundError:
        return
    except (OSError, CheckpointError) as error:
        notes.append(f"{path.name}: {str(error).splitlines()[0]}")


def _records(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of a file of JSON lines that have a step."""
    damaged = 0
    for line in _lines(path, notes):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and _is_count(record.get("step")):
            yield record
        else:
            damaged += 1
    if damaged:
        notes.append(f"{path.name}: {damaged:,} lines are not records and are left out")


def _curves(run: Path, notes: list[str]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    left_out = set()
    for record in _records(run / METRICS, notes):
        step, tokens, seconds = (record.get(x) for x in ("step", "tokens", "elapsed_seconds"))
        place: Any = (
            step,
            tokens if _is_count(tokens) else 0,
            seconds if _is_finite(seconds) else 0.0,
        )
        for name, value in record.items():
            if "/" not in name or not _is_value(value):
                continue
            curve = curves.get(name)
            if curve is None:
                if len(curves) >= MAX_CURVES or len(name) > MAX_NAME_CHARACTERS:
                    left_out.add(name[:MAX_NAME_CHARACTERS])
                    continue
                curve = curves[name] = Curve()
            for column, number in zip(curve.columns, (*place, value), strict=True):
                column.append(number)
    if left_out:
        notes.append(f"{METRICS}: {len(left_out):,} metrics beyond {MAX_CURVES} are left out")
    return curves


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SAFE_INTEGER


def _is_finite(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= MAX_SAFE_INTEGER
    return type(value) is float and math.isfinite(value)


def _is_value(value: Any) -> bool:
    return _is_finite(value) or (isinstance(value, str) and value in NOT_FINITE)


def _samples(run: Path, notes: list[str]) -> tuple[tuple[Sample, ...], int]:
    """Return the samples, evenly chosen where there are many, and how many there are."""
    found = [_sample(record) for record in _records(run / SAMPLES, notes)]
    if len(found) <= MAX_SAMPLES:
        return tuple(found), len(found)
    last = len(found) - 1
    chosen = (round(i * last / (MAX_SAMPLES - 1)) for i in range(MAX_SAMPLES))
    return tuple(found[i] for i in chosen), len(found)


def _sample(record: Mapping[str, Any]) -> Sample:
    prompt, text = (str(record.get(key, ""))[:MAX_SAMPLE_CHARACTERS] for key in ("prompt", "text"))
    told = record.get("copying")
    copying = told if isinstance(told, dict) else {}
    usual, place = copying.get("validation"), copying.get("place")
    return Sample(
        record["step"],
        prompt,
        text,
        _numbers(copying),
        _numbers(usual if isinstance(usual, dict) else {}),
        place[:MAX_NAME_CHARACTERS] if isinstance(place, str) else "",
    )


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in record.items()
        if (isinstance(value, bool) or _is_finite(value)) and value >= 0
    }


def _spent(run: Path, notes: list[str]) -> Spent:
    """Add up the last lines of all processes."""
    last = {}
    for record in _records(run / USAGE, notes):
        process, seconds = record.get("process"), record.get("seconds")
        if _is_finite(process) and isinstance(seconds, dict):
            joules = record.get("joules")
            last[process] = _numbers(seconds), _numbers(joules if isinstance(joules, dict) else {})
    totals: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for figures in last.values():
        for total, figure in zip(totals, figures, strict=True):
            for name, value in figure.items():
                if len(name) <= MAX_NAME_CHARACTERS and (name in total or len(total) < MAX_CURVES):
                    total[name] = total.get(name, 0.0) + value
    return Spent(*totals, len(last))


def _incidents(run: Path, notes: list[str]) -> Iterator[Mark]:
    directory = run / INCIDENTS
    try:
        check_directory(directory)
        paths = sorted(directory.iterdir())[:MAX_MARKS]
    except FileNotFoundError:
        return
    except (OSError, CheckpointError) as error:
        notes.append(f"{INCIDENTS}: {str(error).splitlines()[0]}")
        return
    for path in paths:
        try:
            with open_to_read(path / REPORT) as file:
                report = json.loads(file.read(MAX_REPORT_BYTES) or b"")
            words = [str(report[key])[:2_000] for key in ("fault", "verdict", "decision")]
            if not _is_count(report["step"]):
                raise ValueError("no step")
        except (OSError, CheckpointError, ValueError, KeyError, TypeError, RecursionError):
            notes.append(f"{INCIDENTS}/{path.name}: its report cannot be read")
            continue
        fault, verdict, decision = words
        yield Mark(report["step"], "incident", f"{fault}; verdict {verdict}: {decision}")


def _rollbacks(run: Path, notes: list[str]) -> Iterator[Mark]:
    for line in _lines(run / LOG, notes):
        found = WENT_BACK.search(line.decode(errors="replace"))
        if found is not None:
            yield Mark(int(found[1]), "rollback", found[0].rstrip()[:2_000])


def _changes(newest: Manifest | None) -> Iterator[Mark]:
    for change in [] if newest is None else records_in(newest):
        yield Mark(change["step"], "change", "; ".join(in_words(change))[:2_000])


def _checkpoints(
    directory: Path, notes: list[str]
) -> tuple[tuple[CheckpointEntry, ...], Manifest | None, str]:
    """Return all checkpoints, the newest intact manifest, and why the run ended there."""
    store = CheckpointStore(directory)
    entries: list[CheckpointEntry] = []
    newest: Manifest | None = None
    ended = ""
    try:
        scores = Scores(directory)
        pointed = {pointer: store.pointed(pointer) for pointer in (BEST, LAST)}
        for name in store.step_names():
            pointers = tuple(pointer for pointer, at in pointed.items() if at == name)
            try:
                manifest = store.manifest(directory / name)
            except CheckpointError as error:
                fault = str(error).splitlines()[0]
                entries.append(CheckpointEntry(name, pointers=pointers, fault=fault))
                continue
            size = sum(record.size for record in manifest.files.values())
            loss = scores.val_loss(manifest)
            entries.append(CheckpointEntry(name, manifest.hash, size, loss, pointers))
            if newest is None:
                newest, ended = manifest, scores.end_of(manifest)
    except (OSError, CheckpointError) as error:
        notes.append(f"checkpoints: {str(error).splitlines()[0]}")
    return tuple(entries), newest, ended


def _is_running(run: Path) -> bool:
    try:
        refuse_if_owned(run)
    except MachineError:
        return True
    except CheckpointError:  # the lock is no plain file
        return False
    return False


def _facts(manifest: Manifest | None) -> dict[str, str]:
    """Return what a checkpoint says about its run, by topic."""
    if manifest is None:
        return {}
    metadata = manifest.metadata
    facts: dict[str, str] = {}
    data = metadata.get("data", {})
    for key, label in (("sha256", "data SHA-256"), ("num_tokens", "data tokens")):
        if data.get(key) is not None:
            facts[label] = str(data[key])
    if tokenizer := metadata.get("tokenizer"):
        text = json.dumps(tokenizer, sort_keys=True, ensure_ascii=True)
        facts["tokenizer"] = str(tokenizer.get("type", ""))
        facts["tokenizer SHA-256"] = hashlib.sha256(text.encode()).hexdigest()
    for topic in ("circumstances", "versions"):
        for key, value in metadata.get(topic, {}).items():
            facts[f"{topic}: {key}" if topic == "versions" else str(key)] = str(value)
    if metadata.get("run_id"):
        facts["run id"] = str(metadata["run_id"])
    return facts
