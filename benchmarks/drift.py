"""Whether a long run grows slower or larger: step time and memory at step 10,000 against 1,000.

    python benchmarks/drift.py [--steps 10000]

Trains a small model with the handlers that a run has, its logs and checkpoints written. Behind each
step a bare loop, which has nothing that could drift, takes one of its own; what counts is the
engine's time over the loop's, since whatever else the machine does falls on both alike: processor
time, medians over the 400 steps before the two; resident memory is read at the two. Prints one JSON
object; exits with 1 if the time differs by more than 3 % or memory by more than 20 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from engine_overhead import BareLoop, bare_loop_of
from ignite.engine import Events

from fundamentallm.config import load_config
from fundamentallm.engine.console import logging_to
from fundamentallm.engine.wiring import run_directory
from fundamentallm.engine.wiring.assemble import assemble, open_machine
from fundamentallm.testing import TINY_TEXT
from fundamentallm.training.trainer import Trainer

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "nanogpt_cpu.yaml"
FIRST, SPAN = 1000, 400  # steps
MOST_SLOWER, MOST_MEGABYTES = 0.03, 20.0


def resident_megabytes() -> float:
    """Return the memory that this process has now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this benchmark reads /proc")


class Watch:
    """Notes each step's processor time beside the bare loop's, and memory at two steps."""

    def __init__(self, bare: BareLoop, last: int) -> None:
        self.bare = bare
        self.last = last
        self.seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.memory: dict[int, float] = {}
        self._began = 0.0

    def begin(self) -> None:
        """Note when a batch was asked for."""
        self._began = time.process_time()

    def end(self, trainer: Trainer) -> None:
        """Take in a step, and have the bare loop take one."""
        ended = time.process_time()
        self.seconds.append(ended - self._began)
        self.bare.step(trainer.window)
        self.bare_seconds.append(time.process_time() - ended)
        if trainer.state.iteration in (FIRST, self.last):
            self.memory[trainer.state.iteration] = resident_megabytes()

    def milliseconds_before(self, step: int) -> tuple[float, float]:
        """Return the medians of the steps up to one, the engine's and the bare loop's."""
        recent = slice(step - SPAN, step)
        return (
            statistics.median(self.seconds[recent]) * 1e3,
            statistics.median(self.bare_seconds[recent]) * 1e3,
        )


def train(steps: int) -> Watch:
    """Train for some steps, watched."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as held:
        text = Path(scratch) / "text.txt"
        text.write_text(TINY_TEXT * 400, encoding="utf-8")
        overrides = [
            f"data.source={text}",
            "data.sequence_length=32",
            "model.d_model=64",
            "model.num_layers=2",
            f"training.total_steps={steps}",
            "training.eval_steps=500",
        ]
        config = load_config(CONFIG, overrides)
        directory = run_directory.choose(config, "never", Path(scratch) / "run")
        trainer = assemble(config, directory, open_machine(config)).trainer
        directory.path.mkdir(exist_ok=True)
        held.enter_context(logging_to(directory.path / "log.txt"))
        watch = Watch(bare_loop_of(trainer), steps)
        trainer.add_event_handler(Events.GET_BATCH_STARTED, watch.begin)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, watch.end)
        trainer.run()
    return watch


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)  # processor time is counted
    watch = train(options.steps)
    (early, early_bare), (late, late_bare) = (
        watch.milliseconds_before(step) for step in (FIRST, options.steps)
    )
    ratio = (late / late_bare) / (early / early_bare)
    megabytes = watch.memory[options.steps] - watch.memory[FIRST]
    sound = abs(ratio - 1) <= MOST_SLOWER and megabytes <= MOST_MEGABYTES
    report = {
        "steps": options.steps,
        f"ms a step, up to step {FIRST}": round(early, 3),
        f"ms a step, up to step {options.steps}": round(late, 3),
        "the bare loop's": [round(early_bare, 3), round(late_bare, 3)],
        "ratio, over the bare loop's": round(ratio, 4),
        "resident MB": {step: round(size, 1) for step, size in watch.memory.items()},
        "MB more": round(megabytes, 1),
        "sound": sound,
    }
    print(json.dumps(report, indent=2))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
