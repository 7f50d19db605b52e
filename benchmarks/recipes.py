"""Validation loss of a recipe over seeds, the seconds it took, and the steps' share of them.

    python benchmarks/recipes.py CONFIG [--data PATH] [--seeds 1337 1338 1339] [--isa avx2]
                                 [KEY=VALUE ...]

    configs/shakespeare_cpu.yaml                           two minutes, compilation included
    configs/shakespeare_cpu.yaml training.max_seconds=600  ten
    configs/shakespeare_small.yaml                         2,000 steps of 768 tokens
    configs/shakespeare_small.yaml training.total_steps=195 training.warmup_steps=8
        training.optimizer.adamw_lr=1e-2 model.num_heads=2 training.compile=native
        --against-hand --window 5                          to 1.898, soonest

Each seed is a process of its own, timed from its start to its end, with nothing compiled before.
The seconds of the steps are those that training itself took: no start, no compilation, no
evaluation. With `--against-hand` the eager float32 loop of nanoGPT's CPU recipe (`speed.py`'s
`hand`) is timed as well, and the seconds are given as a share of its 2,000 steps, which nanoGPT
reports 1.88 after; and a second share, of the fastest tenth on both sides: what disturbs a busy
machine is in neither of its seconds. For it, time few steps at once: `--window 5`. `--isa` as for
`speed.py`.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

HAND_STEPS = 2000


def train(
    config: Path, data: str, seed: int, overrides: list[str], isa: str | None, window: int
) -> dict[str, Any]:
    """Train in a process of its own, with nothing compiled before."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        program = ["-m", "fundamentallm.engine"] if isa is None else [machine.__file__, isa]
        command = [sys.executable, *program, "run", str(config)]
        command += [f"seed={seed}", f"data.source={data}", "handlers.samples=false"]
        command += [f"training.log_steps={window}", f"handlers.throughput={{window: {window}}}"]
        command += [*overrides, "--run-dir", str(run)]
        started = time.perf_counter()
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "inductor"),
                "XDG_CACHE_HOME": str(Path(scratch) / "cache"),
            },
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train/tokens_per_second"] for line in lines if "train/loss" in line]
    # The first line is of the first step alone, which compiles.
    taken = [1 / rate for rate in rates[2:]]  # seconds a token
    if not taken:
        raise SystemExit(f"{lines[-1]['step']} steps are too few for --window {window}")
    return {
        "val/loss": [line["val/loss"] for line in lines if "val/loss" in line][-1],
        "seconds": round(seconds, 1),
        "steps": lines[-1]["step"],
        "tokens a second": round(1 / statistics.mean(taken)),
        "seconds of steps": round(lines[-1]["tokens"] * statistics.mean(taken), 2),
        "seconds of steps, undisturbed": round(
            lines[-1]["tokens"] * machine.fastest_tenth(taken), 2
        ),
    }


def hand_milliseconds(isa: str | None) -> tuple[float, float]:
    """Return the median step of the loop by hand, and that of its fastest tenth."""
    command = [sys.executable, str(Path(__file__).with_name("speed.py")), "--alone", "hand"]
    command += ["--isa", isa] if isa else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return float(found["ms"]), float(found["fast_ms"])


def main() -> None:
    """Parse the arguments, train, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--data", default="tinyshakespeare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--against-hand", action="store_true")
    parser.add_argument("--window", type=int, default=50, help="steps that are timed at once")
    parser.add_argument("--isa", choices=machine.ISAS)
    options = parser.parse_intermixed_args()
    machine.limit_this_process(options.isa)

    rounds: dict[int, dict[str, Any]] = {}
    shares, undisturbed = [], []
    for seed in options.seeds:
        rounds[seed] = train(
            options.config, options.data, seed, options.overrides, options.isa, options.window
        )
        print(f"seed {seed}: {rounds[seed]}", file=sys.stderr)
        if options.against_hand:
            hand, fast = hand_milliseconds(options.isa)
            found = rounds[seed]
            shares.append(found["seconds of steps"] / (hand * HAND_STEPS / 1e3))
            undisturbed.append(found["seconds of steps, undisturbed"] / (fast * HAND_STEPS / 1e3))
            found["hand, ms a step"] = round(hand, 2)
            found["hand, ms a step, undisturbed"] = round(fast, 2)
    losses = [found["val/loss"] for found in rounds.values()]
    report = {
        "machine": machine.machine_report(options.isa),
        "config": str(options.config),
        "overrides": options.overrides,
        "seeds": rounds,
        "mean val/loss": round(statistics.mean(losses), 4),
        "spread": round(max(losses) - min(losses), 4),
        "most seconds": max(found["seconds"] for found in rounds.values()),
    }
    if shares:
        report["share of the loop's 2,000 steps"] = round(statistics.median(shares), 4)
        report["the same, undisturbed"] = round(statistics.median(undisturbed), 4)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
