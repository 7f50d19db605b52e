"""A numerical incident: what happened, what was decided, and the evidence on disk.

incidents/00000137-data/
  report.json         fault, verdict, decision, modules, bad sequences with their text (else the
                      window's), the metrics before, environment, configuration
  evidence/step-00000136/   a checkpoint directory: the weights before the step, the random
                      generators before it and the window's tokens, with hashes. Of a transient
                      fault and a spike it has no weights; of a state that was found damaged after
                      its step it has the damaged weights, under the number of that step.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import Filesystem, write_file
from fundamentallm.files.names import numbered
from fundamentallm.files.private import check_directory, make_directory
from fundamentallm.files.run_layout import EVIDENCE, INCIDENTS, REPORT
from fundamentallm.training.checkpoint.store import CheckpointStore, step_name
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.recovery.diagnosis import (
    SPIKE,
    TRANSIENT,
    Diagnosis,
    Incident,
    TensorStatistics,
)

MAX_TOKENS_SHOWN = 1 << 18
# Named, not filtered: whatever else the environment holds may be a secret.
ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONHASHSEED", "RANK", "WORLD_SIZE")


def write_incident(
    run_dir: Path,
    incident: Incident,
    trainer: TrainingLoop,
    metrics: Iterable[Mapping[str, Any]] = (),
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write the evidence; return its directory.

    The trainer's weights are written as they are: those before the step if it was refused, which
    the evidence's name says (one step less), else those after it.

    Args:
        run_dir: the run's directory.
        incident: what happened.
        trainer: the run; its window is the incident's.
        metrics: of the steps before, oldest first.
        tokenizer: decodes the bad sequences.

    Raises:
        OSError, CheckpointError: the disk refuses.
    """
    named = run_dir / INCIDENTS / f"{incident.step:08d}-{incident.verdict}"
    directory = next(path for path in numbered(named) if not os.path.lexists(path))
    check_directory(directory.parent)
    make_directory(directory.parent)
    make_directory(directory)
    # Those without weights may come often. What a machine did once no evidence can show again, and
    # a finite step has no bad module.
    has_weights = incident.verdict not in (TRANSIENT, SPIKE)
    evidence = {
        "model": trainer.model.state_dict() if has_weights else {},
        "generators": trainer.generators_before,
        "window": list(trainer.window.micro_batches),
    }
    refused = bool(getattr(trainer.state.output, "rejection", ""))
    of_step = incident.step - 1 if refused else incident.step
    store = CheckpointStore(directory / EVIDENCE)
    store.write(step_name(of_step), evidence, {"incident": str(incident)}, step=of_step)
    bad = bad_sequences(incident, trainer, tokenizer)
    report = {
        "step": incident.step,
        "fault": incident.fault,
        "verdict": incident.verdict,
        "decision": incident.decision,
        "first_bad": first_bad(incident.diagnosis),
        "bad_sequences": bad,
        "window": [] if bad else window_sequences(trainer, tokenizer),
        "modules": incident.diagnosis.replay.table() if incident.diagnosis else [],
        "metrics": list(metrics),
        "ledger": trainer.interventions.state_dict(),
        "checkpoint": _checkpoint_before(trainer),
        "environment": environment(),
        "description": trainer.description,
    }
    text = json.dumps(plain(report), indent=2, allow_nan=False)
    write_file(Filesystem(), directory / REPORT, [f"{text}\n".encode()])
    return directory


def first_bad(diagnosis: Diagnosis | None) -> dict[str, Any]:
    """Return the names of the first bad places, None where there is none."""
    forward = diagnosis.first_bad_forward if diagnosis else None
    backward = diagnosis.first_bad_backward if diagnosis else None
    return {"forward": _place(forward), "backward": _place(backward)}


def bad_sequences(
    incident: Incident, trainer: TrainingLoop, tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """Say which sequences of the window are bad, where they stand in the corpus, and their text."""
    return [
        {
            "first_bad_position": bad.position,
            **_sequence(trainer, bad.micro_batch, bad.row, tokenizer),
        }
        for bad in (incident.diagnosis.bad_rows if incident.diagnosis else ())
    ]


def window_sequences(trainer: TrainingLoop, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """Say the same of a window none of whose sequences is known to be bad.

    A huge window is cut off at `MAX_TOKENS_SHOWN`; the evidence has all of it.
    """
    found: list[dict[str, Any]] = []
    num_tokens = 0
    for number, batch in enumerate(trainer.window.micro_batches):
        for row, ids in enumerate(batch["input_ids"]):
            num_tokens += len(ids)
            if num_tokens > MAX_TOKENS_SHOWN:
                return found
            found.append(_sequence(trainer, number, row, tokenizer))
    return found


def _sequence(
    trainer: TrainingLoop, micro_batch: int, row: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    ids = trainer.window.micro_batches[micro_batch]["input_ids"][row].tolist()
    return {
        "micro_batch": micro_batch,
        "row": row,
        **corpus_place(trainer, micro_batch, row),
        "token_ids": ids,
        "text": tokenizer.decode(ids) if tokenizer is not None else None,
    }


def corpus_place(trainer: TrainingLoop, micro_batch: int, row: int) -> dict[str, int | None]:
    """Return where a sequence begins in the training split: `corpus_offset` in tokens.

    In a mixture that is the offset in one source, and `source` its number. None if nobody knows.
    """
    rows_at = getattr(trainer.train_loader, "rows_at", None)
    if rows_at is None:
        return {"corpus_offset": None}
    loader, ranks = trainer.train_loader, trainer.ranks
    rows = rows_at(*divmod(trainer.state.iteration - 1, trainer.steps_per_epoch))
    index = (micro_batch * ranks.world_size + ranks.rank) * loader.batch_size + row
    if index >= len(rows):
        return {"corpus_offset": None}
    *source, offset = np.atleast_1d(rows[index]).tolist()
    return {"corpus_offset": offset, **({"source": source[0]} if source else {})}


def environment() -> dict[str, Any]:
    """Return what may matter of the machine, and nothing else of it."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def plain(value: Any) -> Any:
    """Return a value as strict JSON has it: numbers that it lacks by their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def _place(statistic: TensorStatistics | None) -> dict[str, Any] | None:
    if statistic is None:
        return None
    return {"module": statistic.module, "kind": statistic.kind, "what": str(statistic)}


def _checkpoint_before(trainer: TrainingLoop) -> dict[str, Any] | None:
    path = trainer.state.last_checkpoint
    if path is None or not path.is_dir():
        return None
    try:
        manifest = CheckpointStore(path.parent).manifest(path)
    except CheckpointError as error:  # what is known of it must not cost the rest of the report
        return {"name": path.name, "error": str(error)}
    files = {name: record.sha256 for name, record in manifest.files.items()}
    return {"name": manifest.name, "manifest": manifest.hash, "files": files}
