"""Each shipped configuration for CPUs against eager float32 of the same model, by time of a step.

    python benchmarks/configs.py [NAME ...] [--isa avx2] [--data PATH] [--rounds 5] [--seconds 2]

A configuration is resolved as `run` resolves it, its `auto` included, and its step is timed in turn
with that of the same configuration in float32 (the optimizer's iterations too), not compiled. A
ratio is one of a round. Prints one JSON object, and ends with 1 if a median ratio is below 1, less
the 3 % that `auto` takes for noise. `--isa` as for `speed.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from machine import ISAS, limit_this_process, machine_report

from fundamentallm.config import RunConfig, load_config
from fundamentallm.engine.tuning.auto import name_of
from fundamentallm.engine.tuning.measuring import measure
from fundamentallm.engine.tuning.search import LEAST_GAIN
from fundamentallm.engine.wiring.assemble import Run, assemble, open_machine
from fundamentallm.engine.wiring.run_directory import nowhere

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EAGER = ("training.precision=fp32", "training.compile=false")


def assembled(config: RunConfig) -> Run:
    """Assemble a run that writes nothing."""
    return assemble(config, nowhere(config), open_machine(config))


def compare(path: Path, data: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Time both steps in turn."""
    written = load_config(path, data)
    optimizer = written.training.optimizer
    plain = [*data, *EAGER]
    if "dtype" in optimizer.options:
        options = {**optimizer.options, "name": optimizer.name, "dtype": "float32"}
        plain.append(f"training.optimizer={json.dumps(options)}")
    runs = [assembled(written), assembled(load_config(path, plain))]
    taken: list[list[float]] = [[], []]
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            run = runs[side]
            window = run.trainer.train_loader.window_at(0, 0)
            measured = measure(run.config, run.trainer.plan, [window], seconds)
            taken[side].append(measured.step_seconds)
    ratios = [eager / own for own, eager in zip(*taken, strict=True)]
    training = runs[0].config.training
    return {
        "resolved": name_of(runs[0].trainer.plan),
        "optimizer": training.optimizer.to_plain(),
        "ms a step": round(1e3 * statistics.median(taken[0]), 2),
        "eager float32": round(1e3 * statistics.median(taken[1]), 2),
        "times as fast": round(statistics.median(ratios), 2),
        "notes": [note for note in runs[0].notes if "auto" in note or "bf16" in note],
    }


def main() -> int:
    """Parse the arguments, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--isa", choices=ISAS)
    parser.add_argument(
        "--data", default="tinyshakespeare", help="where a file names tinyshakespeare"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    limit_this_process(options.isa)
    table = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        config = load_config(path)
        if config.training.device != "cpu" or (options.names and path.stem not in options.names):
            continue
        ours = config.data.source == "tinyshakespeare"
        data = [f"data.source={options.data}"] if ours else []
        table[path.stem] = compare(path, data, options.rounds, options.seconds)
        print(f"{path.stem}: {table[path.stem]}", file=sys.stderr)
    report = {
        "machine": machine_report(options.isa),
        "threads": torch.get_num_threads(),
        "configurations": table,
    }
    print(json.dumps(report, indent=2))
    slowest = min(found["times as fast"] for found in table.values())
    return int(slowest < 1 - LEAST_GAIN)


if __name__ == "__main__":
    sys.exit(main())
