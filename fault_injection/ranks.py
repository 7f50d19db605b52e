"""Two ranks, a fault on one of them: both act on the same step, at once, and nobody hangs.

    python -m fault_injection.ranks [--cases 60] [--seed 0]

Starts two processes with torchrun, over gloo. In each case both train the same small model; one of
them meets a fault at a random step: a machine's error in the loss or in a gradient, a sequence
that is never finite, weights, moments or a learning rate gone wrong on this rank alone, or a loss
that is never finite again. Both must refuse the same steps, come to the same verdicts, pass over
the same windows and end with the same weights, or with exit code 20. Measured is the time from the
fault to the next update, or to the end. Prints one JSON object; exits with 1 after any violation.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fault_injection.faults import scratch_directory, silent
from fundamentallm.compute.distributed import Ranks, join_ranks, leave_ranks
from fundamentallm.config import TrainingConfig
from fundamentallm.data.loaders import Batching, TokenWindowLoader
from fundamentallm.errors import NumericalError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_model
from fundamentallm.training.handlers import Checkpointing, NaNRollback, WeightEMA
from fundamentallm.training.trainer import Trainer

VOCABULARY, LENGTH, STEPS, LAST_FAULT = 11, 8, 60, 24
SECONDS = 600  # until two ranks count as hanging
ACTS_WITHIN = 5.0  # seconds
# What the verdict must be; of a fault of the weights on one rank the others see but the sum.
VERDICTS = {
    "loss": {"transient"},
    "gradient": {"transient"},
    "sequence": {"data"},
    "weights": {"divergence", "state"},
    "moments": {"state", "divergence"},
    "rate": {"state"},
    "endless": {"divergence", "unexplained", "data", "data_with_weights"},
}


class Fault:
    """One fault, on one rank.

    Args:
        kind: of VERDICTS.
        step: where it strikes first.
        afflicted: whether it is this rank that meets it.
    """

    def __init__(self, kind: str, step: int, afflicted: bool) -> None:
        self.kind = kind
        self.step = step
        self.afflicted = afflicted
        self.struck: float | None = None
        self.bad: Tensor | None = None

    def attach(self, trainer: Trainer) -> None:
        """Put the fault in; both ranks note when it strikes."""
        self.trainer = trainer
        trainer.model.register_forward_hook(self._spoil)
        trainer.add_event_handler(TrainingEvents.FLLM_MICRO_BATCH_COMPLETED, self._after_backward)
        trainer.add_event_handler(TrainingEvents.FLLM_OPTIMIZER_STEPPED, self._after_update)

    def _first(self) -> bool:
        return self.struck is None and self.trainer.state.iteration == self.step

    def _strike(self) -> bool:
        self.struck = self.struck or time.monotonic()
        return self.afflicted

    def _spoil(self, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        if not module.training:
            return logits
        if self.kind == "loss" and self._first():
            return logits * math.nan if self._strike() else logits
        if self.kind == "endless" and self.trainer.state.iteration >= self.step:
            return logits * math.nan if self._strike() else logits
        if self.kind == "sequence" and (self.bad is not None or self._first()):
            if self.bad is None:
                self.bad = inputs[0][:1].clone()
                self._strike()
            if self.afflicted:
                rows = (inputs[0] == self.bad).all(dim=1)
                return logits + torch.where(rows, math.nan, 0.0)[:, None, None]
        return logits

    def _after_backward(self) -> None:
        if self.kind == "gradient" and self._first() and self._strike():
            gradient = next(iter(self.trainer.model.parameters())).grad
            assert gradient is not None
            gradient.view(-1)[0] = math.inf
        if self.kind == "rate" and self._first() and self._strike():
            self.trainer.optimizer.param_groups[0]["lr"] = math.nan

    def _after_update(self) -> None:
        if self.kind == "weights" and self._first() and self._strike():
            with torch.no_grad():
                next(iter(self.trainer.model.parameters())).mul_(1e38)
        if self.kind == "moments" and self._first() and self._strike():
            state = next(iter(self.trainer.optimizer.state.values()))
            state["exp_avg_sq"].view(-1)[0] = math.inf


def cases(count: int, seed: int) -> Iterator[tuple[str, int, int]]:
    """Yield kind, step and rank of each fault."""
    chance = random.Random(seed)
    for number in range(count):
        yield (
            list(VERDICTS)[number % len(VERDICTS)],
            chance.randrange(2, LAST_FAULT),
            chance.randrange(2),
        )


def carry_out(
    ranks: Ranks, directory: Path, kind: str, step: int, afflicted: int
) -> dict[str, Any]:
    """Train one case on this rank and tell what it saw."""
    torch.manual_seed(0)
    # One epoch of all steps: no sequence comes twice.
    tokens = torch.randint(VOCABULARY, (8 * STEPS * LENGTH + 1,))
    batching = Batching(LENGTH, 2, 2, rank=ranks.rank, world_size=ranks.world_size)
    trainer = Trainer(
        tiny_model(VOCABULARY, LENGTH, dropout=0.1),
        TokenWindowLoader(tokens, batching),
        device="cpu",
        config=TrainingConfig(total_steps=STEPS, checkpoint_steps=4, warmup_steps=0),
        handlers=[WeightEMA(0.9), Checkpointing(directory), NaNRollback(run_dir=directory)],
    )
    fault = Fault(kind, step, ranks.rank == afflicted)
    fault.attach(trainer)
    incidents: list[tuple[int, str]] = []
    refused: list[tuple[int, str]] = []
    acted: list[float] = []

    @trainer.on(TrainingEvents.FLLM_INCIDENT_DETECTED)
    def note_incident() -> None:
        incidents.append((trainer.state.incident.step, trainer.state.incident.verdict))

    @trainer.on(TrainingEvents.FLLM_STEP_REJECTED)
    def note_refusal() -> None:
        refused.append((trainer.state.iteration, trainer.state.output.rejection))

    @trainer.on(TrainingEvents.FLLM_OPTIMIZER_STEPPED)
    def note_update() -> None:
        if incidents and not acted:
            acted.append(time.monotonic())

    code = 0
    try:
        trainer.run()
    except NumericalError as error:
        code = error.exit_code
    end = time.monotonic()
    weights = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
    return {
        "exit code": code,
        "incidents": incidents,
        "refused": refused,
        "ledger": trainer.interventions.state_dict(),
        "rollbacks": trainer.state.rollbacks,
        "weights": weights.tolist(),
        "seconds": (acted[0] if acted and not code else end) - (fault.struck or end),
        "struck": fault.struck is not None,
    }


def run_as_a_rank(place: Path, count: int, seed: int) -> None:
    """Carry out all cases and write down what this rank saw."""
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    with silent():
        seen = [
            carry_out(ranks, place / str(number), *case)
            for number, case in enumerate(cases(count, seed))
        ]
    (place / f"rank-{ranks.rank}.json").write_text(json.dumps(seen))
    leave_ranks()


def run_both(place: Path, count: int, seed: int) -> list[list[dict[str, Any]]]:
    """Start both ranks and return what each saw.

    Raises:
        subprocess.TimeoutExpired: they hang.
        subprocess.CalledProcessError: one failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "fault_injection.ranks", "--place", str(place)]
    subprocess.run(
        [*command, "--cases", str(count), "--seed", str(seed)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=SECONDS,
    )
    return [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(2)]


def violations(kind: str, first: dict[str, Any], second: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a case."""
    for name in first:
        if name != "seconds" and first[name] != second[name]:
            detail = "" if name == "weights" else f": {first[name]} and {second[name]}"
            yield f"the ranks have unequal {name}{detail}"
    if not first["struck"] or not first["incidents"]:
        yield "the fault was not noticed"
        return
    if {verdict for _, verdict in first["incidents"]} - VERDICTS[kind] and kind != "endless":
        yield f"wrong verdict: {first['incidents']}"
    if first["exit code"] != (20 if kind == "endless" else 0):
        yield f"exit code {first['exit code']}"
    if not all(map(math.isfinite, first["weights"])):
        yield "weights are not finite"
    if (seconds := max(first["seconds"], second["seconds"])) > ACTS_WITHIN:
        yield f"acted after {seconds:.1f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials and print its counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)  # a rank's own call
    options = parser.parse_args(arguments)
    if options.place is not None:
        run_as_a_rank(options.place, options.cases, options.seed)
        return 0
    started = time.monotonic()
    with scratch_directory() as place:
        first, second = run_both(place, options.cases, options.seed)
    counts: Counter[str] = Counter()
    slowest: dict[str, float] = {}
    failures = []
    for case, one, other in zip(cases(options.cases, options.seed), first, second, strict=True):
        kind = case[0]
        counts[kind] += 1
        slowest[kind] = max(slowest.get(kind, 0.0), one["seconds"], other["seconds"])
        failures += [f"{case}: {what}" for what in violations(kind, one, other)]
    report = {
        "seed": options.seed,
        "cases": dict(counts),
        "slowest seconds from the fault to the next update or the end": {
            kind: round(seconds, 3) for kind, seconds in slowest.items()
        },
        "violations": failures,
        "seconds": round(time.monotonic() - started, 1),
        "sound": not failures,
    }
    print(json.dumps(report, indent=2))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
