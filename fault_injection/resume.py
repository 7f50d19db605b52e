"""A resumed run equals the run that nobody stopped: stop everywhere, and forget everything once.

    python -m fault_injection.resume [--precisions fp16 fp32] [--chains 4] [--share 1] [--seed 0]

The run has 60 steps in 3 epochs, accumulation with a short last window, dropout, a loss scale,
every stateful handler, a group value that changes on the way, and one window that breaks it.
It is stopped at each step, in chains and at other instants; each time everything is built anew
under other global seeds. Compared are the whole state, leaf by leaf, and the lines of metrics and
samples, all but time and speed. Then each item of the state is forgotten at one stop, which the
comparison must notice. Prints one JSON object; exits with 1 if anything differs or goes unnoticed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from torch import Tensor

from fault_injection.faults import Crash, FaultyFilesystem, silent
from fundamentallm.compute.precision import Precision
from fundamentallm.config import TrainingConfig
from fundamentallm.data.loaders import Batching, TokenWindowLoader, ValidationLoader
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.errors import FundamentaLLMError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_model, tiny_tokens
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.tree import flatten
from fundamentallm.training.handlers import (
    AdaptiveClip,
    Checkpointing,
    EarlyStopping,
    Evaluation,
    LossEMA,
    MetricsLog,
    NaNRollback,
    Perplexity,
    Samples,
    Spikes,
    Throughput,
    WeightEMA,
)
from fundamentallm.training.losses import compute_loss
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.schedulers import CosineAnnealingScheduler
from fundamentallm.training.trainer import Trainer

STEPS = 60
STEPS_PER_EPOCH = 20
EVAL_STEPS = 6
FAULTY_STEP = 27
SLOWER_DECAY_STEP = 10
TOLD_NOT_TO_COMPARE = ("elapsed_seconds", "train/tokens_per_second", "train/samples_per_second")
TIME_LEAF = "trainer.elapsed_before"
PRECISIONS = ("fp16", "fp32")
RUN_ID = "0" * 32

State = dict[str, Any]


@dataclass(frozen=True)
class Stop:
    """Where a run is stopped.

    Args:
        step: the step.
        instant: "step" while it is computed, "validation" while it is validated, "evaluation"
            between its validation and its sample, "save" when its checkpoint is committed (the run
            then takes one step more), "crash" in its accumulation, without any save, "start" when
            a process begins at that step.
    """

    step: int
    instant: str = "step"

    def attach(self, trainer: Trainer) -> None:
        """Listen for the instant, before any handler that is attached later."""
        events = {
            "step": Events.ITERATION_STARTED,
            "start": TrainingEvents.FLLM_RUN_STARTED,
            "validation": TrainingEvents.FLLM_EVALUATION_STARTED,
            "evaluation": TrainingEvents.FLLM_EVALUATION_COMPLETED,
            "save": TrainingEvents.FLLM_CHECKPOINT_SAVED,
            "crash": TrainingEvents.FLLM_MICRO_BATCH_COMPLETED,
        }
        trainer.add_event_handler(events[self.instant], self.act)

    def act(self, trainer: Trainer) -> None:
        """Stop the run if this is the step."""
        if trainer.state.iteration == self.step:
            if self.instant == "crash":
                raise Crash
            trainer.interrupt_run(15)


class SlowerDecay:
    """Changes a group value on the way: only the optimizer's state remembers it."""

    def attach(self, trainer: Trainer) -> None:
        """Listen at the start of every step."""
        trainer.add_event_handler(Events.ITERATION_STARTED, self.act)

    def act(self, trainer: Trainer) -> None:
        """Halve the weight decay, once in a run."""
        if trainer.state.iteration == SLOWER_DECAY_STEP:
            for group in trainer.optimizer.param_groups:
                group["weight_decay"] = 0.05


class BreakingLoss:
    """Cross-entropy that is NaN at one step, whatever the window: a divergence."""

    is_nll = True

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def __call__(self, logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        """Return the summed loss."""
        assert self.trainer is not None
        loss = compute_loss(logits, targets, reduction)
        return loss * float("nan") if self.trainer.state.iteration == FAULTY_STEP else loss


def closeness_to_step_24(trainer: Trainer) -> float | None:
    """Score checkpoints so that the best is an early one: a forgotten best score shows."""
    if trainer.state.evaluated_step != trainer.state.iteration:
        return None
    return -abs(trainer.state.iteration - 24.0)


def build(directory: Path, precision: str, seed: int, stop: Stop | None = None) -> Trainer:
    """Return a trainer made from nothing, with the global generators seeded by `seed`.

    Args:
        directory: holds the logs and the checkpoints.
        precision: "fp32", or "fp16" with its loss scale, which the CPU computes as well.
        seed: of initial weights and dropout; a resumed run must not depend on it.
        stop: where the run will be stopped.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    tokenizer = CharacterTokenizer("abcdefghijk")
    model = tiny_model(tokenizer.vocab_size, dropout=0.1)
    tokens = tiny_tokens(1970, tokenizer.vocab_size)
    config = TrainingConfig(
        learning_rate=1e-2,
        total_steps=STEPS,
        accumulation_steps=3,
        eval_steps=EVAL_STEPS,
        log_steps=1,
        warmup_steps=5,
        keep_last=2,
    )
    optimizer = OptimizerBuilder.build(
        "adamw", model, config.learning_rate, defaults={"weight_decay": 0.1}
    )
    loss_fn = BreakingLoss()
    checkpointing = Checkpointing(
        directory / "checkpoints", n_saved=2, score_function=closeness_to_step_24
    )
    # Nothing is asked of the disk here; unsynced, the closure takes a third of the time.
    checkpointing.store.filesystem = FaultyFilesystem(None, Crash)
    handlers: list[Any] = [
        *([stop] if stop is not None else []),
        WeightEMA(0.9),
        LossEMA(),
        Perplexity(),
        Throughput(),
        Evaluation(),
        EarlyStopping(patience=STEPS, min_delta=10.0),
        NaNRollback(),
        Spikes(window=16, needed=12),
        AdaptiveClip(threshold=0.2, warmup=8),
        SlowerDecay(),
        MetricsLog(directory),
        Samples(tokenizer, directory, prompt="a", num_tokens=6, every=2),
        checkpointing,
    ]
    trainer = Trainer(
        model,
        # The last window of an epoch has one micro-batch, the others three.
        TokenWindowLoader(tokens[:1870], Batching(8, batch_size=4, accumulation_steps=3, seed=5)),
        ValidationLoader(tokens[1870:], Batching(8, batch_size=4)),
        optimizer=optimizer,
        scheduler=CosineAnnealingScheduler(optimizer, STEPS, warmup_steps=5, min_lr=1e-3),
        loss_fn=loss_fn,
        device="cpu",
        config=config,
        handlers=handlers,
    )
    loss_fn.trainer = trainer
    if precision == "fp16":
        # The program refuses fp16 on a CPU, where it is slow; here it is there for its scaler.
        half = Precision("fp16", trainer.device)
        half.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=3)
        trainer.precision = trainer.step.precision = half
    return trainer


# ---------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Outcome:
    """A finished run: a digest of each leaf of its state, and its lines by file."""

    leaves: Mapping[str, str]
    lines: Mapping[str, Sequence[str]]

    @property
    def hash(self) -> str:
        """SHA-256 over everything compared."""
        return digest(json.dumps([sorted(self.leaves.items()), dict(self.lines)]))

    def differences(self, other: Outcome) -> list[str]:
        """Return the leaves, and the files with their first line, that are not the same."""
        found = [
            name
            for name in sorted(self.leaves.keys() | other.leaves.keys())
            if self.leaves.get(name) != other.leaves.get(name)
        ]
        for name, own in self.lines.items():
            theirs = other.lines[name]
            if own != theirs:
                pairs = enumerate(zip(own, theirs, strict=False), 1)
                line = next((n for n, (a, b) in pairs if a != b), min(len(own), len(theirs)) + 1)
                found.append(f"{name}:{line}")
        return found


def outcome(trainer: Trainer, directory: Path) -> Outcome:
    """Return what is left of a run, but for time and speed."""
    skeleton, tensors = flatten(snapshot.capture(trainer))
    leaves = {
        name: digest(str(tensor.dtype), str(tuple(tensor.shape)), tensor.numpy().tobytes())
        for name, tensor in tensors.items()
    }
    leaves |= {name: digest(json.dumps(value)) for name, value in plain_leaves(skeleton)}
    leaves.pop(TIME_LEAF)
    files = {name: directory / name for name in ("metrics.jsonl", "samples.jsonl")}
    return Outcome(leaves, {name: lines_without_time(path) for name, path in files.items()})


def lines_without_time(path: Path) -> list[str]:
    """Return a log's lines without their fields of time and speed."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        lines.append(json.dumps({k: v for k, v in record.items() if k not in TOLD_NOT_TO_COMPARE}))
    return lines


def plain_leaves(skeleton: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return the dotted path and value of every leaf of a skeleton, places of tensors included."""
    if isinstance(skeleton, dict) and skeleton and "$tensor" not in skeleton:
        items = [(str(key), value) for key, value in skeleton.items()]
    elif isinstance(skeleton, list) and skeleton:
        items = [(str(index), value) for index, value in enumerate(skeleton)]
    else:
        return [(f"{path}=" if isinstance(skeleton, dict) else path, skeleton)]
    found = []
    for key, value in items:
        found += plain_leaves(value, f"{path}.{key}" if path else key)
    return found


def digest(*parts: str | bytes) -> str:
    """Return the SHA-256 of the parts."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part.encode() if isinstance(part, str) else part)
    return hasher.hexdigest()


# ---------------------------------------------------------------------- runs


def advance(directory: Path, precision: str, stop: Stop | None = None) -> Trainer:
    """Begin the run in a directory, or go on from its newest checkpoint, to the stop or the end.

    Raises:
        AssertionError: the stop never came.
    """
    saved = sorted((directory / "checkpoints").glob("step-*"))
    seed = 1000 + len(saved) + int(saved[-1].name[5:]) if saved else 1
    trainer = build(directory, precision, seed, stop)
    if saved:
        trainer.resume(saved[-1])
    else:
        trainer.run_id = RUN_ID
    stopped = False
    try:
        trainer.train()
    except Crash:
        stopped = True
    if (stopped or trainer.interrupted_by is not None) != (stop is not None):
        raise AssertionError(f"stopped at step {trainer.state.iteration}, expected {stop}")
    return trainer


def run(precision: str, stops: Sequence[Stop] = ()) -> Outcome:
    """Run to the end through stops, each followed by a resume of everything built anew."""
    with tempfile.TemporaryDirectory(prefix="resume-") as name:
        directory = Path(name)
        for stop in stops:
            advance(directory, precision, stop)
        return outcome(advance(directory, precision), directory)


# ---------------------------------------------------------------------- forgetting


def reset(*path: str) -> Callable[[State, State], None]:
    """Return a tamperer that puts a value back to what a trainer built anew has."""

    def act(state: State, fresh: State) -> None:
        for key in path[:-1]:
            state, fresh = state[key], fresh[key]
        if same(state[path[-1]], fresh[path[-1]]):
            raise AssertionError(f"{'.'.join(path)} has its first value here: nothing to forget")
        state[path[-1]] = fresh[path[-1]]

    return act


def reset_optimizer(key: str) -> Callable[[State, State], None]:
    """Return a tamperer that zeroes one entry of every parameter's state."""

    def act(state: State, fresh: State) -> None:
        for entry in state["optimizer"]["state"].values():
            entry[key] = torch.zeros_like(entry[key])

    return act


def reset_groups(key: str) -> Callable[[State, State], None]:
    """Return a tamperer that puts one value of the parameter groups back."""

    def act(state: State, fresh: State) -> None:
        groups, anew = state["optimizer"]["param_groups"], fresh["optimizer"]["param_groups"]
        for group, first in zip(groups, anew, strict=True):
            if same(group[key], first[key]):
                raise AssertionError(f"group value {key} was not changed by the run")
            group[key] = first[key]

    return act


def same(a: Any, b: Any) -> bool:
    """Tell whether two parts of states are equal."""
    return json.dumps(flatten({"": a})[0]) == json.dumps(flatten({"": b})[0]) and all(
        torch.equal(x, y)
        for x, y in zip(flatten({"": a})[1].values(), flatten({"": b})[1].values(), strict=False)
    )


@dataclass(frozen=True)
class Item:
    """A part of the state, and how it is forgotten.

    Args:
        tamper: forgets it.
        stop: a stop at which it matters.
        unnoticed_because: why forgetting it changes nothing; empty where it must be noticed.
        precisions: those that have the item.
    """

    tamper: Callable[[State, State], None]
    stop: Stop = Stop(58)
    unnoticed_because: str = ""
    precisions: tuple[str, ...] = PRECISIONS


COUNTER_NAMES = (
    "tokens_seen",
    "sequences_seen",
    "micro_batches",
    "optimizer_steps",
    "skipped_steps",
    "evaluations",
    "checkpoints",
    "incidents",
    "rollbacks",
    "epoch_nll",
    "epoch_tokens",
)
HANDLER_ITEMS = {
    "weight_ema": ("averages", "num_updates"),
    "loss_ema": ("total", "count"),
    "perplexity": ("nll", "num_tokens"),
    "early_stopping": ("best", "waited"),
    "nan_rollback": ("total", "region_end", "in_region", "good_steps"),
    "spikes": ("losses", "norms", "newest", "accepted", "lowest"),
    "adaptive_clip": ("first_norms", "mean", "variance", "num_clipped"),
    "checkpointing": ("best_score", "best_step"),
}
ITEMS: dict[str, Item] = {
    "model": Item(reset("model")),
    "optimizer exp_avg": Item(reset_optimizer("exp_avg")),
    "optimizer exp_avg_sq": Item(reset_optimizer("exp_avg_sq")),
    "optimizer step": Item(reset_optimizer("step")),
    "optimizer group weight_decay": Item(reset_groups("weight_decay")),
    "optimizer group lr": Item(
        reset_groups("lr"),
        unnoticed_because="the schedule writes it before each step from the step alone",
    ),
    "scaler scale": Item(reset("precision", "scale"), precisions=("fp16",)),
    "scaler growth tracker": Item(
        reset("precision", "_growth_tracker"), Stop(57), precisions=("fp16",)
    ),
    "random torch": Item(reset("random", "rank 0", "torch")),
    "random python": Item(reset("random", "rank 0", "python")),
    "random numpy": Item(reset("random", "rank 0", "numpy")),
    "position": Item(reset("trainer", "iteration")),
    "ledger": Item(reset("trainer", "ledger")),
    "run id": Item(reset("trainer", "run_id")),
    **{f"counter {name}": Item(reset("trainer", name)) for name in COUNTER_NAMES},
    "counter evaluated_step": Item(
        reset("trainer", "evaluated_step"),
        Stop(36, "evaluation"),
        unnoticed_because="each state of this run is saved before its evaluation, which runs again",
    ),
    **{
        f"{handler} {key}": Item(reset("handlers", handler, key))
        for handler, keys in HANDLER_ITEMS.items()
        for key in keys
    },
}


class Forgetting:
    """Forgets one item at a time, at stops that are reached once.

    Args:
        precision: as in `build`.
        reference: the run that forgot nothing.
        directory: holds the stopped runs.
    """

    def __init__(self, precision: str, reference: Outcome, directory: Path) -> None:
        self.precision = precision
        self.reference = reference
        self.directory = directory

    def forget(self, name: str) -> list[str]:
        """Forget an item at its stop, resume and finish.

        Returns:
            The differences, or the error that refused the state; empty if nothing was noticed.
        """
        item = ITEMS[name]
        stopped = self.directory / f"{self.precision}-{item.stop.instant}-{item.stop.step}"
        if not stopped.exists():
            advance(stopped, self.precision, item.stop)
        with tempfile.TemporaryDirectory(prefix="resume-") as scratch:
            directory = Path(scratch) / "run"
            shutil.copytree(stopped, directory)
            self._tamper(directory, item)
            try:
                result = outcome(advance(directory, self.precision), directory)
            except (FundamentaLLMError, LookupError, ValueError) as error:
                return [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
        return self.reference.differences(result)

    def _tamper(self, directory: Path, item: Item) -> None:
        """Write the newest checkpoint once more, with a changed state."""
        anew = build(directory, self.precision, 2)
        anew.attach_defaults()
        checkpointing = anew.restore_point
        assert isinstance(checkpointing, Checkpointing)
        store = checkpointing.store
        name = store.step_names()[0]
        manifest, state = store.manifest(store.directory / name), store.read(store.directory / name)
        item.tamper(state, snapshot.capture(anew))
        store.write(name, state, manifest.metadata, step=manifest.step)


# ---------------------------------------------------------------------- the trials


def chain(generator: random.Random, length: int) -> list[Stop]:
    """Return stops at random steps."""
    return [Stop(step) for step in sorted(generator.sample(range(1, STEPS), length))]


def plans(precision: str, chains: int, seed: int) -> dict[str, list[Stop]]:
    """Return the stops of every trial by its name."""
    generator = random.Random(f"{seed} {precision}")
    evaluated = [s for s in range(1, STEPS + 1) if s % EVAL_STEPS == 0 or s % STEPS_PER_EPOCH == 0]
    return {
        **{f"step {k}": [Stop(k)] for k in range(1, STEPS + 1)},
        **{f"evaluation {k}": [Stop(k, "evaluation")] for k in evaluated},
        **{f"save {k}": [Stop(k, "save")] for k in evaluated[:-1]},
        **{f"crash {k}": [Stop(k, "crash")] for k in range(2, STEPS + 1, 4)},
        **{f"chain {n}": chain(generator, 25) for n in range(chains)},
        **{f"start {k}": [Stop(k, "evaluation"), Stop(k, "start")] for k in evaluated},
        **{f"validation {k}": [Stop(k), Stop(k, "validation")] for k in evaluated},
        "five in an epoch": [Stop(k) for k in (22, 25, 28, 33, 38)],
        "five in a row": [Stop(k) for k in range(41, 46)],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials and print its counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--share", type=float, default=1.0, help="of the trials")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report: dict[str, Any] = {"seed": options.seed}
    sound = True
    started = time.monotonic()
    for precision in options.precisions:
        with silent():
            report[precision] = closure(precision, options.chains, options.seed, options.share)
        sound = sound and report[precision].pop("sound")
    report["seconds"] = round(time.monotonic() - started, 1)
    report["sound"] = sound
    print(json.dumps(report, indent=2))
    return 0 if sound else 1


def closure(precision: str, chains: int, seed: int, share: float = 1.0) -> dict[str, Any]:
    """Stop everywhere and forget everything in one precision; return the counts.

    Of the trials a share is drawn at random, if below 1.
    """
    reference = run(precision)
    counts: Counter[str] = Counter()
    unequal = {}
    chosen = random.Random(seed)
    trials = {k: v for k, v in plans(precision, chains, seed).items() if chosen.random() < share}
    for name, stops in trials.items():
        counts[name.split()[0]] += 1
        if differences := reference.differences(run(precision, stops)):
            unequal[name] = differences[:5]
    items = {name: item for name, item in ITEMS.items() if precision in item.precisions}
    with tempfile.TemporaryDirectory(prefix="resume-") as directory:
        forgetting = Forgetting(precision, reference, Path(directory))
        unnoticed = {name: item for name, item in items.items() if not forgetting.forget(name)}
    return {
        "state hash": reference.hash,
        "leaves compared": len(reference.leaves),
        "lines compared": sum(map(len, reference.lines.values())),
        "trials": dict(counts),
        "resumes": sum(map(len, trials.values())),
        "unequal": unequal,
        "items forgotten": len(items),
        "noticed": len(items) - len(unnoticed),
        "unnoticed": {name: item.unnoticed_because for name, item in unnoticed.items()},
        "sound": not unequal
        and unnoticed.keys() == {name for name, item in items.items() if item.unnoticed_because},
    }


if __name__ == "__main__":
    sys.exit(main())
