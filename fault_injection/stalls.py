"""Stop one of two ranks in every phase of a run: it is named, all end, and the run goes on.

    python -m fault_injection.stalls [--trials 40] [--patience 10]

Each trial starts two ranks by torchrun with one restart. A plugin sends SIGSTOP to its own process
when the first start comes to a phase: the process stands still at that very place, and only SIGKILL
ends it. Phases and ranks take turns: start, step, evaluation, sample, save, load.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fault_injection.faults import scratch_directory

PHASES = ("start", "step", "evaluation", "sample", "save", "load")
NAMED_WITHIN = 1.5  # times the patience
GOES_ON_WITHIN = 70.0  # seconds; torchrun itself waits 30 for a process that is stopped
LONGEST_SECONDS = 300  # of a trial, which hangs then
CONFIG = """\
name: stalled
data: {source: text.txt, tokenizer: byte, sequence_length: 16, batch_size: 2}
model: {d_model: 16, num_layers: 1, num_heads: 2}
training: {total_steps: 12, eval_steps: 4, log_steps: 1}
handlers: {tensorboard: false, samples: {num_tokens: 4}}
plugins: [stop_in_phase]
"""
PLUGIN = '''
"""Sends this process SIGSTOP where PHASE begins, on the rank RANK_TO_STOP, in the first start."""
import os, signal, time
from pathlib import Path
from ignite.engine import Events
from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers import Checkpointing, Phases

PHASE = os.environ.get("PHASE", "")

def stop():
    if os.environ["RANK"] == os.environ["RANK_TO_STOP"] and not Path("stopped").exists():
        Path("stopped").write_text(f"{time.time()} {os.getpid()}")
        os.kill(os.getpid(), signal.SIGSTOP)

def attach(self, trainer, original=Phases.attach):
    original(self, trainer)
    events = {
        "step": Events.ITERATION_STARTED(once=6),
        "evaluation": TrainingEvents.FLLM_EVALUATION_STARTED(once=1),
        "sample": TrainingEvents.FLLM_EVALUATION_COMPLETED(once=1),
        "save": TrainingEvents.FLLM_CHECKPOINT_DUE(once=4),
    }
    if PHASE in events:
        trainer.add_event_handler(events[PHASE], stop)

def restore(self, *arguments, original=Checkpointing.restore):
    stop()
    original(self, *arguments)

Phases.attach = attach
if PHASE == "load":
    Checkpointing.restore = restore
if PHASE == "start":
    stop()
'''
TEXT = "".join(f"{n} bottles of water stand on the wall, and one may fall. " for n in range(200))


def prepare(place: Path) -> None:
    """Write what a run needs into a directory."""
    (place / "text.txt").write_text(TEXT)
    (place / "stalled.yaml").write_text(CONFIG)
    (place / "stop_in_phase.py").write_text(PLUGIN)


def environment(phase: str, rank: int) -> dict[str, str]:
    """Return the environment in which one rank stops in a phase."""
    stops = {"PHASE": phase, "RANK_TO_STOP": str(rank), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **stops, "PYTHONUNBUFFERED": "1"}


def command(patience: float, *options: str) -> list[str]:
    """Return the arguments of a run that waits so many seconds for a rank, behind `python`."""
    # A rank that goes on slowly, on a busy machine, is none that stands still.
    waits = [f"parallel.patience.step={patience}", f"parallel.patience.save={6 * patience}"]
    return ["-m", "fundamentallm.engine", "run", "stalled.yaml", *waits, *options]


def last_step(place: Path) -> int:
    """Return the last step in the metrics of the run, 0 before there is one."""
    metrics = place / "runs/stalled/metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def trial(place: Path, phase: str, rank: int, patience: float) -> dict[str, Any]:
    """Stop a rank in a phase and watch what becomes of the run.

    Returns:
        "named": seconds from the stop until another rank has named it; "ended": until the stopped
        process is gone; "goes on": until the next start writes a line of metrics; None for what did
        not come to pass. Besides, whether it hung, torchrun's exit code, and whether the run has
        all of its steps.
    """
    prepare(place)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    if phase == "load":  # of something
        first = [*torchrun, *command(patience, "training.stop_after_seconds=0.001")]
        subprocess.run([sys.executable, *first], cwd=place, env=environment("", 0), check=True)
    log, stopped, metrics = (
        place / name for name in ("log.txt", "stopped", "runs/stalled/metrics.jsonl")
    )
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *torchrun, "--max-restarts=1", *command(patience)],
            cwd=place,
            env=environment(phase, rank),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    found: dict[str, Any] = dict.fromkeys(("named", "ended", "goes on"))
    before = 0
    deadline = time.time() + LONGEST_SECONDS
    while process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
        said = stopped.read_text().split() if stopped.exists() else []
        if len(said) < 2:
            continue
        seconds = round(time.time() - float(said[0]), 1)
        written = metrics.stat().st_mtime_ns if metrics.exists() else 0
        if found["named"] is None and names(log.read_text(), rank):
            found["named"] = seconds
        if found["ended"] is None and not Path(f"/proc/{said[1]}").exists():
            found["ended"], before = seconds, written
        elif found["ended"] is not None and found["goes on"] is None and written > before:
            found["goes on"] = seconds
    found["hung"] = process.poll() is None
    process.terminate()
    found["code"] = process.wait(60)
    return {"phase": phase, "rank": rank, **found, "whole": last_step(place) == 12}


def names(log: str, rank: int) -> bool:
    """Return whether the other rank says that this one stands still."""
    return re.search(rf"error on rank {1 - rank}: .*rank {rank} .*stands still", log) is not None


def violations(seen: dict[str, Any], patience: float, slack: float = 1.0) -> list[str]:
    """Return what is wrong with a trial.

    Args:
        seen: what `trial` returned.
        patience: of a step, in seconds.
        slack: times the limits, for a machine that others use too.
    """
    limits = {"named": slack * NAMED_WITHIN * patience, "goes on": slack * GOES_ON_WITHIN}
    wrong = [
        f"{name} after {seen[name]} s"
        for name, limit in limits.items()
        if seen[name] is None or seen[name] > limit
    ]
    if seen["hung"] or seen["code"] or not seen["whole"] or seen["ended"] is None:
        wrong.append("the run did not end well")
    return [f"{seen['phase']}, rank {seen['rank']}: {what}" for what in wrong]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials and print their counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--patience", type=float, default=10.0)
    options = parser.parse_args(arguments)
    cells = [(phase, rank) for phase in PHASES for rank in range(2)]
    seen, failures = [], []
    for number in range(options.trials):
        with scratch_directory() as place:
            seen.append(trial(place, *cells[number % len(cells)], options.patience))
        print(json.dumps(seen[-1]), file=sys.stderr, flush=True)
        failures += violations(seen[-1], options.patience)
    report = {
        "trials": len(seen),
        "hangs": sum(one["hung"] for one in seen),
        "slowest seconds": {
            name: max((one[name] or 0.0 for one in seen), default=0.0)
            for name in ("named", "ended", "goes on")
        },
        "violations": failures,
        "sound": not failures,
    }
    print(json.dumps(report, indent=2))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
