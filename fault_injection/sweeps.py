"""A sweep that is killed again and again gives the same trials and the same results.

    python -m fault_injection.sweeps [--kills 50] [--seed 0] [--method random]

The sweep's process is killed at random moments with the process of its run, which dies at once or,
half of the time, is left to notice it; then the same command is given again. Compared are the
record of all trials, the metrics but for time and speed, and every tensor of every checkpoint.
Prints one JSON object; exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fault_injection.resume import lines_without_time
from fundamentallm.engine.sweeping.record import read_record

TEXT = "".join(f"{number} times {number} is {number * number}.\n" for number in range(400))
BASE = """
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2, dropout: 0.1}
training: {eval_steps: 50, log_steps: 10, checkpoint_steps: 25, precision: fp32}
handlers: {tensorboard: false, progress: false}
"""
KEYS = {
    "grid": "keys: {training.learning_rate: [1e-3, 1e-2], training.warmup_steps: [10, 40]}\n",
    "random": "keys: {training.learning_rate: {low: 1e-4, high: 1e-1, log: true}}\ntrials: 4\n",
}
KEYS["optuna"] = KEYS["random"]
STEPS = 200
# Nothing of a run draws from these two, and no seed sets them: each start has its own.
UNSEEDED = (".numpy.key", ".python.key")
MOST_SECONDS = 14.0  # from a start to its kill; half of that is the import of torch, twice


def write_inputs(place: Path, method: str, steps: int) -> None:
    """Write the text, the configuration and the sweep."""
    (place / "text.txt").write_text(TEXT)
    (place / "base.yaml").write_text(BASE)
    head = f"name: killed\nconfig: base.yaml\nmethod: {method}\nsteps: {steps}\nseeds: 2\n"
    (place / "sweep.yaml").write_text(head + KEYS[method] + "prune: {trials: 2}\n")


def start(place: Path) -> subprocess.Popen[bytes]:
    """Give the command."""
    with (place / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "fundamentallm", "sweep", "sweep.yaml"],
            cwd=place,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    with contextlib.suppress(OSError):
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return []


def kill(process: subprocess.Popen[bytes], with_children: bool) -> None:
    """Kill a sweep, then the process of its run; it must not see that one die."""
    started = children(process.pid)
    process.kill()
    process.wait()
    for pid in started if with_children else ():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def outcome(sweep: Path) -> dict[str, Any]:
    """Return everything that a sweep left, but for time and speed."""
    record = read_record(sweep)
    found: dict[str, Any] = {"trials": record.model_dump(mode="json")["trials"] if record else None}
    for path in sorted(sweep.glob("[0-9]*")):
        if path.is_file():
            found[path.name] = path.read_text(encoding="utf-8")
            continue
        found[f"{path.name}/metrics.jsonl"] = lines_without_time(path / "metrics.jsonl")
        for file in sorted(path.glob("checkpoints/step-*/*.safetensors")):
            for tensor, values in load_file(file).items():
                if not tensor.endswith(UNSEEDED):
                    digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
                    found[f"{file.relative_to(sweep)}: {tensor}"] = digest
    return found


def campaign(kills: int, seed: int, method: str, steps: int = STEPS) -> dict[str, Any]:
    """Compare one sweep that runs to its end with one that is killed so many times.

    A sweep that ends before all kills is begun again in a fresh directory.
    """
    chance = random.Random(seed)
    report: dict[str, Any] = {"kills": 0, "sweeps": 0, "errors": [], "different": []}
    with tempfile.TemporaryDirectory(prefix="sweeps-") as name:
        whole = Path(name) / "whole"
        whole.mkdir()
        write_inputs(whole, method, steps)
        if start(whole).wait() != 0:
            report["errors"].append((whole / "output.txt").read_text()[-500:])
            return report
        expected = outcome(whole / "sweeps" / "killed")
        while report["kills"] < kills:
            place = Path(name) / f"killed-{report['sweeps']}"
            place.mkdir()
            write_inputs(place, method, steps)
            code = _until_done(place, kills, chance, report)
            report["sweeps"] += 1
            if code != 0:
                report["errors"].append((place / "output.txt").read_text()[-500:])
                continue
            found = outcome(place / "sweeps" / "killed")
            report["different"] += [
                key
                for key in sorted(expected.keys() | found.keys())
                if expected.get(key) != found.get(key)
            ]
    return report


def _until_done(place: Path, kills: int, chance: random.Random, report: dict[str, Any]) -> int:
    """Kill and start again until the sweep ends by itself; return its exit code."""
    while True:
        process = start(place)
        if report["kills"] >= kills:
            return process.wait()
        try:
            return process.wait(timeout=chance.uniform(0, MOST_SECONDS))
        except subprocess.TimeoutExpired:
            kill(process, chance.random() < 0.5)
            report["kills"] += 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=sorted(KEYS), default="random")
    options = parser.parse_args(argv)
    began = time.monotonic()
    report = campaign(options.kills, options.seed, options.method)
    report["seconds"] = round(time.monotonic() - began)
    print(json.dumps(report, indent=1))
    return 1 if report["errors"] or report["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
