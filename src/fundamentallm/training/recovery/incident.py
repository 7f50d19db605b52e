"""A numerical incident on disk: what happened, what was decided, and the evidence.

incidents/00000137-data/
  report.json         fault, verdict, decision, modules, bad sequences with their text (all
                      sequences of the step if none is known to be bad), earlier metrics,
                      environment, configuration
  evidence/step-00000136/   a checkpoint directory: weights and random generators before the step,
                      and the tokens of the step batch, with hashes. After a transient fault or a
                      spike it has no weights. If the state was found damaged after a step, it has
                      the damaged weights, under the number of that step.
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
# A list of names, not a filter: other variables may hold secrets.
ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONHASHSEED", "RANK", "WORLD_SIZE")


def write_incident(
    run_dir: Path,
    incident: Incident,
    trainer: TrainingLoop,
    metrics: Iterable[Mapping[str, Any]] = (),
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write report and evidence of an incident; return its directory.

    The current weights are written: those before the step if it was refused (the evidence then has
    the number of the step before), else those after it.

    Args:
        run_dir: the run's directory.
        incident: what happened.
        trainer: the run, with the step batch of the incident.
        metrics: of the steps before, oldest first.
        tokenizer: decodes the sequences of the report.

    Raises:
        OSError, CheckpointError: the files cannot be written.
    """
    named = run_dir / INCIDENTS / f"{incident.step:08d}-{incident.verdict}"
    directory = next(path for path in numbered(named) if not os.path.lexists(path))
    check_directory(directory.parent)
    make_directory(directory.parent)
    # Transient faults and spikes may be frequent. A replay of the first is finite, and a finite
    # step has no bad module, so weights would show nothing.
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
    """Return the first bad module of the forward and backward pass, None where there is none."""
    forward = diagnosis.first_bad_forward if diagnosis else None
    backward = diagnosis.first_bad_backward if diagnosis else None
    return {"forward": _place(forward), "backward": _place(backward)}


def bad_sequences(
    incident: Incident, trainer: TrainingLoop, tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """Return the bad sequences with their place in the corpus and their text."""
    return [
        {
            "first_bad_position": bad.position,
            **_sequence(trainer, bad.micro_batch, bad.row, tokenizer),
        }
        for bad in (incident.diagnosis.bad_rows if incident.diagnosis else ())
    ]


def window_sequences(trainer: TrainingLoop, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """Return all sequences of the step batch, with their place in the corpus and their text.

    At most `MAX_TOKENS_SHOWN` tokens; the evidence has all of them.
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

    In a mixture it is the offset in one source, and `source` is that source's number. None if the
    loader does not tell.
    """
    rows_at = getattr(trainer.train_loader, "rows_at", None)
    if rows_at is None:
        return {"corpus_offset": None}
    loader, ranks = trainer.train_loader, trainer.ranks
    rows = rows_at(*trainer.epochs.position(trainer.state.iteration - 1))
    index = (micro_batch * ranks.world_size + ranks.rank) * loader.batch_size + row
    if index >= len(rows):
        return {"corpus_offset": None}
    *source, offset = np.atleast_1d(rows[index]).tolist()
    return {"corpus_offset": offset, **({"source": source[0]} if source else {})}


def environment() -> dict[str, Any]:
    """Return versions, threads and the variables in `ENVIRONMENT`."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def plain(value: Any) -> Any:
    """Return a value in strict JSON: NaN and infinities become strings."""
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
    except CheckpointError as error:  # the report is worth more than this entry
        return {"name": path.name, "error": str(error)}
    files = {name: record.sha256 for name, record in manifest.files.items()}
    return {"name": manifest.name, "manifest": manifest.hash, "files": files}
