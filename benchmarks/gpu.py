"""Is this package exact on a GPU, and how fast? One command for any machine with CUDA.

    python benchmarks/gpu.py [--phases exact settings speed tests] [--skip PHASE ...]
                             [--device cuda:0] [--steps 50] [--seconds 900] [--rows 128]
                             [--config FILE] [--set KEY=VALUE ...] [--tests PATH ...] [--out FILE]
    python benchmarks/gpu.py --smoke

- exact: loss, gradients and steps of small models against float64 on the CPU (TF32 off), a resumed
  run bit for bit, and the loss curve of the half type (`gpu_exact.py` has the bounds).
- settings: the fastest micro-batch, precision, compilation and attention for GPT-2 124M, found as
  `tune` does, each measured in a process of its own; `--seconds` ends the search. The micro-batch
  comes first and float32 last, so that a search that is ended early has what counts most.
- speed: the run with those settings (without `settings`: with those of the file), with its default
  handlers: tokens a second, the model FLOPs utilization (`compute/peak.py` has the peaks of GPUs),
  peak memory, the share of a step that is waited for data, the time of a save, how long one in the
  background holds the step up, and the steps beside it.
- tests: the tests marked `cuda`, with the result of each.

`--rows` are the sequences of a step. The text is of random letters: nothing is read or downloaded.
A line on standard error tells the end of each phase. Prints one JSON object, with GPU, driver and
versions; what a phase fails with is in it. `--out` has it after each phase, for a GPU that may be
taken away. Exit code 1 if something does not hold, 2 without a GPU.
`--smoke` runs all phases with a tiny model on the CPU: it shows that the command works, and no
figure of it means anything.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_exact import exact
from ignite.engine import Events
from machine import machine_report

from fundamentallm.compute.peak import device_peak
from fundamentallm.compute.plan import Plan
from fundamentallm.compute.precision import has_bf16, resolve_device
from fundamentallm.config import load_config
from fundamentallm.engine.console import console_output, logging_to
from fundamentallm.engine.tuning.measuring import Measurement, peak_bytes, wait_for
from fundamentallm.engine.tuning.search import search
from fundamentallm.engine.tuning.tune import Table, prepared, space_around
from fundamentallm.engine.wiring import assemble, run_directory
from fundamentallm.errors import FundamentaLLMError, MachineError
from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers import Checkpointing
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
WARMUP = 10  # steps
SAVES = 3  # of each kind
BESIDE = 2  # steps, at least, beside each save in the background
SMOKE = [
    "data.sequence_length=32",
    "model={vocab_size: 300, d_model: 32, num_layers: 2, num_heads: 2, tie_embeddings: true}",
    "training.compile=false",
]


@dataclass(frozen=True)
class Task:
    """What is asked for.

    Attributes:
        device: to measure.
        config: the file of GPT-2.
        overrides: of its values.
        rows: sequences of a step.
        steps: of the speed, and of the loss curves four times as many.
        seconds: of the search for settings.
        keep: what the search leaves as it is, as for `tune --keep`.
        tests: files or folders of tests.
    """

    device: torch.device
    config: Path = ROOT / "configs" / "gpt2_124m.yaml"
    overrides: Sequence[str] = ()
    rows: int = 128
    steps: int = 50
    seconds: float = 900.0
    keep: Sequence[str] = ("threads",)
    tests: Sequence[str] = ("tests",)
    compiled: bool = True
    settings: list[str] = field(default_factory=list)  # the phase `settings` fills it in

    def written(self, folder: Path) -> list[str]:
        """Return the overrides of a run of this task, with a text of its own.

        Args:
            folder: for the text.
        """
        text = folder / "text.txt"
        context = 1024
        letters = np.random.default_rng(0).integers(
            97, 123, 8 * self.rows * context, dtype=np.uint8
        )
        text.write_bytes(letters.tobytes())
        batch_size = math.gcd(self.rows, 32)
        return [
            f"data.source={text}",
            "data.tokenizer=byte",
            f"data.batch_size={batch_size}",
            f"training.accumulation_steps={self.rows // batch_size}",
            f"training.total_steps={10**6}",
            f"training.eval_steps={10**6}",
            f"training.device={self.device}",
            "handlers.samples=false",
            *([] if has_bf16(self.device) else ["training.precision=fp16"]),
            *self.overrides,
            *self.settings,
        ]


# ------------------------------------------------------------------ settings


def settings(task: Task) -> dict[str, Any]:
    """Find the fastest settings; note them in the task for the phases that follow."""
    with tempfile.TemporaryDirectory() as scratch, console_output():
        config, start, rows = prepared(load_config(task.config, task.written(Path(scratch))))
        threads = torch.get_num_threads()
        space = space_around(config, start, threads, task.keep)
        deadline = time.monotonic() + task.seconds
        table = Table(config, rows, (), start.device, threads, deadline)
        measured = table.measured

        def seconds_of(plan: Plan) -> float | None:
            return measured[plan].step_seconds if plan in measured else table.seconds_of(plan)

        own = {name: getattr(start, name) for name in space.kinds[0]}
        half_first = sorted(space.kinds, key=lambda kind: kind["precision"] == "fp32")
        with contextlib.redirect_stdout(sys.stderr):
            table.head()
            best = search(start, replace(space, kinds=[own]), seconds_of)
            best = search(best, replace(space, kinds=half_first), seconds_of)
    tokens = task.rows * config.data.sequence_length

    def described(plan: Plan, found: Measurement) -> dict[str, Any]:
        return {
            "precision": plan.precision,
            "bf16_weights": plan.bf16_weights,
            "compile": plan.compile,
            "attention": plan.attention,
            "micro-batch": plan.batch_size,
            "tokens a second": None if found.fault else round(tokens / found.step_seconds),
            "peak GiB": None if found.peak_bytes is None else round(found.peak_bytes / 2**30, 2),
            "compiling, s": round(found.compile_seconds, 1),
            **({"fault": found.fault} if found.fault else {}),
        }

    if best not in measured or measured[best].fault:
        raise MachineError(
            "no setting could be measured",
            got=measured[start].fault if start in measured else "no time",
            fix="give more --seconds, or fewer --rows",
        )
    task.settings[:] = [
        f"{section}.{name}={json.dumps(value)}"
        for section, fields in best.values(task.rows).items()
        for name, value in fields.items()
    ]
    ranking = sorted(measured.items(), key=lambda item: item[1].step_seconds)
    return {
        "tokens a step": tokens,
        "best": described(best, measured[best]),
        "times as fast as the file's": round(
            measured[start].step_seconds / measured[best].step_seconds, 2
        )
        if not measured[start].fault
        else None,
        "measured": [described(*item) for item in ranking],
        "search was complete": time.monotonic() < deadline,
    }


# ------------------------------------------------------------------ speed


class Course:
    """Measures a run: steps after the warmup, then saves, then saves in the background.

    Args:
        trainer: of the run; it is ended.
        steps: to measure.
        folder: for the checkpoints.
    """

    def __init__(self, trainer: Trainer, steps: int, folder: Path) -> None:
        self.trainer, self.steps = trainer, steps
        self.durable = Checkpointing(folder / "durable", n_saved=2)
        self.held = Checkpointing(folder / "held", n_saved=2, asynchronous=True)
        self.seconds = self.waited = 0.0
        self.saves: list[float] = []
        self.holds: list[float] = []
        self.wholes: list[float] = []
        self.beside: list[float] = []
        self.peak: int | None = None
        self.reserved: int | None = None
        self._asked = self._began = self._last = self._saving_since = 0.0
        self._beside = 0
        trainer.add_event_handler(Events.GET_BATCH_STARTED, self.ask)
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, self.get)
        trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, self.step)

    def ask(self) -> None:
        self._asked = time.perf_counter()

    def get(self) -> None:
        if WARMUP <= self.trainer.state.iteration < WARMUP + self.steps:
            self.waited += time.perf_counter() - self._asked

    def step(self, trainer: TrainingLoop) -> None:
        """Note a step, and save when the steps are measured."""
        number = trainer.state.iteration
        if number < WARMUP:
            return
        if number in (WARMUP, WARMUP + self.steps):
            wait_for(trainer.device)
        now = time.perf_counter()
        if number == WARMUP:
            self._began = now
        elif number == WARMUP + self.steps:
            self.seconds = now - self._began
            self.peak = peak_bytes(trainer.device)
            if trainer.device.type == "cuda":
                self.reserved = torch.cuda.max_memory_reserved(trainer.device)
        elif number > WARMUP + self.steps:
            self._save(trainer, now)

    def _save(self, trainer: TrainingLoop, now: float) -> None:
        if len(self.saves) < SAVES:
            self.saves.append(self._timed(self.durable, trainer))
            return
        background = self.held._background
        if background is None:
            if len(self.holds) == SAVES:
                self.trainer.finish("measured")
                return
            wait_for(trainer.device)
            self._saving_since = time.perf_counter()
            self.holds.append(self._timed(self.held, trainer))
            self._beside, self._last = 0, time.perf_counter()
            return
        self._beside += 1
        if self._beside > 1:  # the first begins with the end of the copy
            self.beside.append(now - self._last)
        self._last = now
        if self._beside > BESIDE and not background.is_alive:
            self.held._finish_background(trainer)
            self.wholes.append(now - self._saving_since)

    def _timed(self, saving: Checkpointing, trainer: TrainingLoop) -> float:
        wait_for(trainer.device)
        began = time.perf_counter()
        saving(trainer)
        return time.perf_counter() - began


@contextlib.contextmanager
def assembled(task: Task, folder: Path) -> Iterator[Trainer]:
    """Assemble a run of the task as `run` does."""
    config = load_config(task.config, task.written(folder))
    directory = run_directory.choose(config, "never", folder / "run")
    run = assemble.assemble(config, directory, assemble.open_machine(config))
    directory.path.mkdir(exist_ok=True)
    with logging_to(directory.path / "log.txt"):
        yield run.trainer


def speed(task: Task) -> dict[str, Any]:
    """Measure the run with the settings of the task."""
    if task.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(task.device)
    with tempfile.TemporaryDirectory() as scratch, assembled(task, Path(scratch)) as trainer:
        course = Course(trainer, task.steps, Path(scratch))
        trainer.run()
        tokens = trainer.tokens_computed * task.steps / course.seconds
        flops = trainer.model.flops_per_token
        peak = device_peak(trainer.device, trainer.precision.dtype)
        step = course.seconds / task.steps
        middle = statistics.median
        return {
            "settings": trainer.plan.values(task.rows),
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "tokens a step": trainer.tokens_computed,
            "steps": task.steps,
            "ms a step": round(1e3 * step, 2),
            "tokens a second": round(tokens),
            "FLOPs a token": flops,
            "peak, TFLOP/s": round(peak / 1e12, 3),
            "MFU": round(tokens * flops / peak, 4),
            "peak GiB": _gib(course.peak),
            "reserved GiB": _gib(course.reserved),
            "input: share of a step that waits for data": round(course.waited / course.seconds, 5),
            "save, s": round(middle(course.saves), 3),
            "save in the background: holds the step up, s": round(middle(course.holds), 3),
            "save in the background: all, s": round(middle(course.wholes), 3),
            "save in the background: step beside it, times": round(middle(course.beside) / step, 3),
        }


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 2)


# ------------------------------------------------------------------ tests


def cuda_tests(task: Task) -> dict[str, Any]:
    """Run the tests that are marked `cuda`; list them by their result."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
        command += ["-m", "cuda", f"--junitxml={file}", *task.tests]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
        if not file.exists():
            said = (done.stdout + done.stderr)[-2000:]
            raise RuntimeError(f"pytest ended with {done.returncode}: {said}")
        cases = list(ET.parse(file).getroot().iter("testcase"))
    found: dict[str, list[str]] = {"passed": [], "skipped": [], "failed": []}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        faults = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped")
        if faults:
            found["failed"].append(f"{name}: {faults[0].get('message', '')[:300]}")
        elif skipped is not None:
            found["skipped"].append(f"{name}: {skipped.get('message')}")
        else:
            found["passed"].append(name)
    return {**{f"number {name}": len(each) for name, each in found.items()}, **found}


# ------------------------------------------------------------------ the command


def exactness(task: Task) -> dict[str, Any]:
    """Check the device against the CPU."""
    rows = exact(task.device, 4 * task.steps, task.compiled)
    failed = [row for row in rows if not row["holds"]]
    return {"checks": len(rows), "do not hold": failed, "rows": rows}


PHASES = {"exact": exactness, "settings": settings, "speed": speed, "tests": cuda_tests}


def holds(name: str, result: dict[str, Any]) -> bool:
    """Whether a phase ended well and found nothing wrong."""
    if "error" in result:
        return False
    return not {"exact": result.get("do not hold"), "tests": result.get("failed")}.get(name)


def run_phases(
    task: Task, names: Sequence[str], report: dict[str, Any], out: Path | None = None
) -> None:
    """Run phases in order and add what they tell; one that fails leaves the others.

    Args:
        task: what to do.
        names: of the phases.
        report: to add to; `holds` is whether everything did so far.
        out: where it is written after each phase.
    """
    report["holds"] = True
    for name in names:
        began = time.monotonic()
        try:
            result = PHASES[name](task)
        except Exception as error:  # a lent GPU is soon gone: what the other phases say counts
            result = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        gc.collect()
        if task.device.type == "cuda":
            torch.cuda.empty_cache()
        result = {"seconds": round(time.monotonic() - began, 1), **result}
        report[name] = result
        report["holds"] &= holds(name, result)
        print(f"{name}: {said(name, result)}", file=sys.stderr, flush=True)
        if out is not None:
            out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def said(name: str, result: dict[str, Any]) -> str:
    """Return the line that tells the end of a phase."""
    took = f"{result['seconds']:.0f} s"
    if "error" in result:
        return f"failed after {took}: {result['error']}"
    if name == "exact":
        return f"{result['checks'] - len(result['do not hold'])} of {result['checks']} hold, {took}"
    if name == "settings":
        return f"{json.dumps(result['best'])}, {took}"
    if name == "speed":
        rate, mfu, save = (result[key] for key in ("tokens a second", "MFU", "save, s"))
        return f"{rate:,} tokens/s, MFU {mfu:.1%}, a save {save:.2f} s, {took}"
    return ", ".join(f"{result[f'number {key}']} {key}" for key in ("passed", "skipped", "failed"))


def gpu_report(device: torch.device) -> dict[str, Any]:
    """Return on which GPU the figures were measured, and with which software."""
    if device.type != "cuda":
        return {"name": None}
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "memory GiB": round(facts.total_memory / 2**30, 1),
        "compute capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "GPUs here": torch.cuda.device_count(),
        "driver": driver_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
    }


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None if nothing tells it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.split("\n")[0].strip() or None
    return None


def smoke(task: Task) -> Task:
    """Return a task that is done in seconds on a CPU."""
    return replace(
        task,
        device=torch.device("cpu"),
        overrides=[*SMOKE, *task.overrides],
        rows=8,
        steps=5,
        seconds=1.0,
        keep=("precision", "compile", "attention", "threads"),
        tests=("tests/unit/test_timing.py",),
        compiled=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--skip", nargs="+", choices=PHASES, default=[])
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--steps", type=int, default=Task.steps)
    parser.add_argument("--seconds", type=float, default=Task.seconds)
    parser.add_argument("--rows", type=int, default=Task.rows)
    parser.add_argument("--config", type=Path, default=Task.config)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--tests", nargs="+", default=list(Task.tests))
    parser.add_argument("--out", type=Path, help="a file for the report, written after each phase")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, with a tiny model")
    options = parser.parse_args(arguments)
    if min(options.steps, options.rows) < 1:
        parser.error("--steps and --rows are at least 1")
    try:
        device = torch.device("cpu") if options.smoke else resolve_device(options.device)
        if device.type != "cuda" and not options.smoke:
            raise MachineError("this measures a CUDA GPU", got=str(device), fix="see --smoke")
    except FundamentaLLMError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    # cuBLAS adds in a fixed order only with this from its first product on.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    task = Task(
        device,
        options.config,
        options.overrides,
        options.rows,
        options.steps,
        options.seconds,
        tests=options.tests,
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    task = smoke(task) if options.smoke else task
    names = [name for name in PHASES if name in options.phases and name not in options.skip]
    report = {"GPU": gpu_report(device), "machine": machine_report(None), "smoke": options.smoke}
    run_phases(task, names, report, options.out)
    print(json.dumps(report, indent=2))
    return 0 if report["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
