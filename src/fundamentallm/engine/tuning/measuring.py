"""How long a step takes with a setting: the measurement for `tune`, `auto` and `check`.

`measure` times the step of a configuration in this process. `measure_in_process` does it in another
process with its own thread count, compiler caches and memory peak. If that process crashes,
the crash is the result. It runs this module with a folder as its argument.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fundamentallm.compute.compilation import CompiledBlocks
from fundamentallm.compute.memory import says_out_of_memory
from fundamentallm.compute.plan import Machine, ModelFacts, Plan
from fundamentallm.compute.rng import capture_rng, restore_rng
from fundamentallm.config import RunConfig
from fundamentallm.config.global_batch import with_global_batch
from fundamentallm.data.batch import Batch, Window, count_valid
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.engine.tuning.fit import refuse_what_cannot_fit
from fundamentallm.engine.wiring.abilities import check_abilities
from fundamentallm.errors import ConfigError, FundamentaLLMError
from fundamentallm.files.run_layout import CONFIG
from fundamentallm.models.build import build_model
from fundamentallm.training.losses import LOSSES
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.step import TrainStep

ROWS, REQUEST, RESULT = "rows.safetensors", "request.json", "result.json"
LEAST_STEPS, MOST_STEPS = 3, 1_000


@dataclass(frozen=True, slots=True)
class Measurement:
    """The cost of a setting.

    Attributes:
        step_seconds: of one optimizer step, the median of a few; infinite with a fault.
        compile_seconds: what the first call took longer than the next; 0 if nothing was compiled.
        peak_bytes: the peak memory: of the GPU where there is one, else of the whole
            process; None if unknown.
        fault: why there is no figure; empty if there is one.
    """

    step_seconds: float
    compile_seconds: float = 0.0
    peak_bytes: int | None = None
    fault: str = ""


def failed(fault: str) -> Measurement:
    """Return the measurement of a setting that failed."""
    return Measurement(math.inf, fault=fault)


def measure(
    config: RunConfig,
    plan: Plan,
    windows: Sequence[Window],
    seconds: float,
    slowest: float = math.inf,
    brief: bool = False,
) -> Measurement:
    """Time the step of a configuration in this process, with a new model.

    Weights stay as they are (the learning rate is 0), and so do the random generators.

    Args:
        config: with everything resolved.
        plan: how the step is computed; its ranks, batch size and threads are ignored.
        windows: step batches, used in turn. Two calls before them warm up and compile on the first
            micro-batch.
        seconds: time for the steps, of which there are at least three.
        brief: for step batches of one micro-batch: at least one step, all calls count, and
            the fastest is the result: a median of so few would be noise.
        slowest: if the first micro-batch, not compiled, takes more seconds than this, it ends the
            measurement, and its time is the result.

    Raises:
        FundamentaLLMError: the step cannot be built.
    """
    plan = replace(plan, machine=Machine(plan.device))  # without other ranks
    rng = capture_rng()
    torch.manual_seed(config.seed)
    try:
        return _measure(config, plan, windows, seconds, slowest, brief)
    finally:
        restore_rng(rng)
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    config: RunConfig,
    plan: Plan,
    windows: Sequence[Window],
    seconds: float,
    slowest: float,
    brief: bool,
) -> Measurement:
    training, device = config.training, plan.device
    if device.type == "cuda":  # the peak is of this measurement, not of those before
        torch.cuda.reset_peak_memory_stats(device)
    model = plan.place(build_model(config.model)).train()
    optimizer = OptimizerBuilder.from_config(training, model)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(lr) if isinstance(lr := group["lr"], Tensor) else 0.0
    loss_fn = LOSSES.build(training.loss.name, training.loss.options)
    check_abilities(config, model, loss_fn)
    started = time.perf_counter()
    step = TrainStep(
        plan.prepare(model),
        model,
        optimizer,
        loss_fn,
        plan.build_precision(),
        plan.ranks,
        training.max_grad_norm,
        lambda event: None,
        training.max_grad_value,
    )
    building = time.perf_counter() - started  # native code is compiled here, torch's at a call

    def timed(window: Window) -> float:
        wait_for(device)
        started = time.perf_counter()
        step(window, window.num_tokens, _number_of_rows(window))
        wait_for(device)
        return time.perf_counter() - started

    beginning = _first_of(windows[0])
    first = timed(beginning)
    if first > slowest and not plan.compile:
        return Measurement(first)
    again = timed(beginning)
    taken = [again] if brief else []
    least = 2 if brief else LEAST_STEPS
    while len(taken) < MOST_STEPS and (len(taken) < least or sum(taken) < seconds):
        taken.append(timed(windows[len(taken) % len(windows)]))
    runner = getattr(model, "run_block", None)
    if isinstance(runner, CompiledBlocks) and runner.compiled is None:
        return failed("torch.compile failed")
    compiling = building + max(0.0, first - again) if plan.compile else 0.0
    figure = min(taken) if brief else statistics.median(taken)
    return Measurement(figure, compiling, peak_bytes(device))


def measure_in_process(
    config: RunConfig,
    plan: Plan,
    rows: Batch,
    plugins: Sequence[str],
    seconds: float,
    patience: float,
) -> Measurement:
    """Time the step of a configuration in a separate process.

    Args:
        config: with everything resolved.
        plan: how the step is computed.
        rows: the data of one step or more, `input_ids`, `target_ids` (rows, T) and so on; it is
            cut into step batches of `batch_size` times `accumulation_steps`.
        plugins: modules to import there besides the configuration's.
        seconds: time for the steps.
        patience: seconds after which the process is killed.

    Returns:
        A measurement, or the fault: not enough memory, a crash, an error, a timeout.
    """
    with tempfile.TemporaryDirectory(prefix="fundamentallm-tune-") as name:
        folder = Path(name)
        plan.applied_to(config).to_yaml(folder / CONFIG)
        save_file({key: value.contiguous() for key, value in rows.items()}, folder / ROWS)
        request = {"plugins": list(plugins), "seconds": seconds}
        (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }
        return _watch(folder, environment, patience)


def _watch(folder: Path, environment: dict[str, str], patience: float) -> Measurement:
    command = [sys.executable, "-m", "fundamentallm.engine.tuning.measuring", str(folder)]
    with (folder / "output.txt").open("w+b") as output:
        process = subprocess.Popen(  # noqa: S603 - our own module, by the interpreter that runs us
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that the compiler's workers end with it
        )
        try:
            code = process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            return failed(f"no result after {patience:.0f} s")
        finally:
            _end(process)
        result = folder / RESULT
        if code == 0 and result.exists():
            return Measurement(**json.loads(result.read_text(encoding="utf-8")))
        output.seek(0)
        said = output.read().decode("utf-8", "replace").strip().splitlines()
    return failed(reason_of_end(code, said[-1] if said else ""))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def reason_of_end(code: int, last_line: str) -> str:
    """Return why a process ended, from its exit code and the last line that it wrote."""
    if code == -signal.SIGTERM or code == -getattr(signal, "SIGKILL", 9):
        return "killed by the system, probably out of memory"
    if code < 0:
        return f"crashed with signal {-code}"
    if says_out_of_memory(last_line):
        return "out of memory"
    return (last_line or f"ended with code {code}")[:100]


def _answer(folder: Path) -> None:
    """Measure for `measure_in_process`, in the process that it started."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(OSError):  # if memory runs out, kill this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    request: dict[str, Any] = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    config = with_global_batch(RunConfig.from_yaml(folder / CONFIG), world_size=1)
    training = config.training
    machine = Machine.open(training.device, training.threads, deterministic=training.deterministic)
    load_plugins([*config.plugins, *request["plugins"]], "plugins")
    try:
        refuse_what_cannot_fit(config, machine.device)
        windows = windows_of(
            load_file(folder / ROWS), config.data.batch_size, config.training.accumulation_steps
        )
        plan = Plan.resolve(config.training, ModelFacts.of(config.model), machine)
        result = measure(config, plan, windows, request["seconds"])
    except ConfigError as error:
        result = failed(f"{error.what}: {error.got}" if error.got else error.what)
    except FundamentaLLMError as error:
        result = failed(error.what)
    # Infinity is not valid JSON, but both sides are this module.
    (folder / RESULT).write_text(json.dumps(asdict(result)), encoding="utf-8")


def _end_with(parent: int) -> None:
    """End this process, and the compiler's, when the parent process has ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    if hasattr(os, "killpg"):
        os.killpg(os.getpgid(0), signal.SIGKILL)
    os._exit(1)


def windows_of(rows: Batch, batch_size: int, accumulation_steps: int) -> list[Window]:
    """Cut rows into step batches of micro-batches, as the loader of one rank does.

    Args:
        rows: `input_ids`, `target_ids` and so on, each (rows, T); too few for a step batch are
            repeated.
        batch_size: rows of a micro-batch.
        accumulation_steps: micro-batches of a step batch.
    """
    size = batch_size * accumulation_steps
    number = len(rows["input_ids"])
    picked = torch.arange(max(size, number - number % size)) % number
    windows = []
    for start in range(0, len(picked), size):
        batches = [
            {key: value[part] for key, value in rows.items()}
            for part in torch.split(picked[start : start + size], batch_size)
        ]
        windows.append(Window(batches, sum(count_valid(b["target_ids"]) for b in batches)))
    return windows


def rows_of(window: Window) -> Batch:
    """Return the rows of a step batch's micro-batches as one batch."""
    batches = window.micro_batches
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def _first_of(window: Window) -> Window:
    batch = window.micro_batches[0]
    return Window([batch], count_valid(batch["target_ids"]))


def _number_of_rows(window: Window) -> int:
    return sum(len(batch["input_ids"]) for batch in window.micro_batches)


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak memory: of a GPU since its statistics began, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        # Not getrusage: its maximum is inherited from the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) << 10 if found else None


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
