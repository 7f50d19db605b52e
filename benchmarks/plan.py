"""`plan` against runs that it did not measure: losses, intervals, times, and its choice.

    python benchmarks/plan.py --out FOLDER [--data PATH] [--config CONFIG] [--runs N] [--table]

It plans for 3 and 6 minutes as `plan` does, then trains 12 held-out runs: three of 3 minutes, and
a grid of nine of 6 minutes (three sizes that are none of the planner's, each at half, once and
twice the planner's learning rate for it). A run has the number of steps that the planner says fit
into the time, so its loss can be repeated on a busy machine; the seconds of its process stand
beside the predicted ones. The planner's choice for 6 minutes is trained with two seeds.

FOLDER keeps the plans and each run that is done: the same command goes on, `--runs N` trains N more
at most, and `--table` only prints. The runs take 75 minutes on a machine without other work.

Prints a table and writes FOLDER/plan.json. It must show: at least 8 of the 12 losses inside their
80 % interval, a median half-width of at most 3 %, and a choice within 1 % of the best of the grid,
or within the spread of its two seeds if that is larger.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fundamentallm.config import load_config
from fundamentallm.engine.planning.choice import affordable_tokens
from fundamentallm.engine.planning.measuring import Ground, Knowledge, Measuring
from fundamentallm.engine.planning.plan import (
    cadence_of,
    candidates_of,
    choose,
    ground_of,
    measuring_time,
)
from fundamentallm.engine.planning.scaling_law import Point
from fundamentallm.engine.planning.shapes import Shape, shape_of

MINUTES = (3, 6)
RATES = (0.5, 1.0, 2.0)  # over those of the planner
# (d_model, num_layers) of one head for each 64 features; the planner has only 1 layer for 32.
GRID = ((128, 6), (192, 4), (256, 6))
SHORT = ((128, 6, 1.0), (192, 4, 0.7), (256, 4, 1.4))  # of 3 minutes, with their rates


@dataclass(frozen=True)
class HeldOut:
    """A run to train, and what the planner says of it; losses in nats per token.

    Attributes:
        name: of the run.
        minutes: of the budget.
        model: fields of its model.
        steps: of the run.
        learning_rate: of the run.
        seed: of the run.
        seconds, loss, low, high: predicted.
    """

    name: str
    minutes: int
    model: dict[str, int]
    steps: int
    learning_rate: float
    seed: int
    seconds: float
    loss: float
    low: float
    high: float


def planned(config: Path, data: str, minutes: int) -> list[HeldOut]:
    """Plan for a time, and return the runs to train for it, the planner's choice last."""
    seconds = 60.0 * minutes
    written = load_config(config, [f"data.source={data}", "handlers.samples=false"])
    ground = ground_of(written, seconds, time_of_start())
    knowledge = Measuring(ground, written, measuring_time(seconds)).run(seconds)
    grid = [(width, layers, rate) for width, layers in GRID for rate in RATES]
    seed, found = written.seed, []
    for width, layers, rate in grid if minutes == max(MINUTES) else SHORT:
        model = {"d_model": width, "num_layers": layers, "num_heads": width // 64}
        shape = shape_of(ground.config, model)
        found.append(held_out(ground, knowledge, shape, rate, minutes, seed))
    best = choose(ground, knowledge, candidates_of(ground, knowledge, seconds), seconds).candidate
    if minutes == max(MINUTES):
        steps, rate = best.tokens // ground.step_tokens, best.rate * ground.rate(best.shape)
        for number in (seed, seed + 1):
            model = {
                name: getattr(best.shape.applied_to(ground.config).model, name)
                for name in ("d_model", "num_layers", "num_heads")
            }
            found.append(
                HeldOut(
                    f"choice-seed-{number}",
                    minutes,
                    model,
                    steps,
                    float(f"{rate:.2g}"),
                    number,
                    best.seconds,
                    **asdict(best.prediction),
                )
            )
    return found


def time_of_start() -> float:
    """Return the seconds that a command takes before it reads its text."""
    began = time.perf_counter()
    code = "import fundamentallm.engine.run"
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def held_out(
    ground: Ground, knowledge: Knowledge, shape: Shape, factor: float, minutes: int, seed: int
) -> HeldOut:
    """Return a run that uses a time, and its predicted loss."""
    seconds, costs = 60.0 * minutes, knowledge.costs
    tokens = affordable_tokens(shape, costs, cadence_of(ground), seconds, ground.step_tokens)
    steps = int(tokens / ground.step_tokens)
    tokens = steps * ground.step_tokens
    rate = factor * knowledge.law.best_rate(tokens)
    learning_rate = float(f"{rate * ground.rate(shape):.2g}")
    point = Point(shape.parameters, tokens, learning_rate / ground.rate(shape))
    prediction = knowledge.law.predict(point)
    model = {name: int(value) for name, value in shape.values.items()}
    name = f"{minutes}min-{model['d_model']}x{model['num_layers']}-{learning_rate:g}"
    return HeldOut(name, minutes, model, steps, learning_rate, seed, seconds, **asdict(prediction))


def train(run: HeldOut, config: Path, data: str, folder: Path) -> dict[str, Any]:
    """Train a run with its number of steps; return its loss and the seconds of its process."""
    place = folder / "runs" / run.name
    shutil.rmtree(place, ignore_errors=True)
    words = ["model.size=null", *(f"model.{name}={value}" for name, value in run.model.items())]
    words += [f"training.total_steps={run.steps}", "training.max_seconds=null"]
    words += [f"training.learning_rate={run.learning_rate}", f"seed={run.seed}"]
    words += [f"data.source={data}", "handlers.samples=false", "--run-dir", str(place)]
    command = [sys.executable, "-m", "fundamentallm.engine", "run", str(config), *words]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    shutil.rmtree(place)
    return {"loss": losses[-1], "seconds": seconds}


def summary(runs: list[HeldOut], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Print a row for each run that is done; return the figures."""
    print(
        f"{'run':<24}{'steps':>7}{'loss':>9}{'predicted':>11}{'80 % interval':>19}"
        f"{'half':>7}{'inside':>8}{'seconds':>9}{'predicted':>11}"
    )
    rows = []
    for run in runs:
        if run.name not in results:
            continue
        got = results[run.name]
        half = (run.high - run.low) / 2 / run.loss
        inside = run.low <= got["loss"] <= run.high
        rows.append({**asdict(run), "measured": got, "half_width": half, "inside": inside})
        interval = f"{run.low:.4f} to {run.high:.4f}"
        print(
            f"{run.name:<24}{run.steps:>7,}{got['loss']:>9.4f}{run.loss:>11.4f}{interval:>19}"
            f"{half:>7.1%}{'yes' if inside else 'NO':>8}{got['seconds']:>9.0f}{run.seconds:>11.0f}"
        )
    held = [row for row in rows if not row["name"].startswith("choice")]
    figures: dict[str, Any] = {"rows": rows, "held_out": len(held)}
    if held:
        figures["inside"] = sum(row["inside"] for row in held)
        figures["median_half_width"] = statistics.median(row["half_width"] for row in held)
        print(
            f"{figures['inside']} of {len(held)} inside (8 of 12 at least); median half-width"
            f" {figures['median_half_width']:.2%} (3 % at most)"
        )
    choices = [row["measured"]["loss"] for row in rows if row["name"].startswith("choice")]
    grid = [row["measured"]["loss"] for row in held if row["minutes"] == max(MINUTES)]
    if len(choices) == 2 and len(grid) == len(GRID) * len(RATES):
        spread = abs(choices[0] - choices[1])
        behind = choices[0] - min(grid)
        allowed = max(0.01 * min(grid), spread)
        figures |= {"choice": choices, "best_of_grid": min(grid), "allowed": allowed}
        print(
            f"choice {choices[0]:.4f} and {choices[1]:.4f}, best of the grid {min(grid):.4f}:"
            f" {behind:+.4f} (at most {allowed:.4f})"
        )
    return figures


def main() -> None:
    """Plan, train what is missing, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/shakespeare_cpu.yaml"))
    parser.add_argument("--data", default="tinyshakespeare")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=10**6)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    runs: list[HeldOut] = []
    for minutes in MINUTES:
        path = options.out / f"plan-{minutes}.json"
        if not path.exists() and not options.table:
            found = planned(options.config, options.data, minutes)
            path.write_text(json.dumps([asdict(run) for run in found], indent=1))
        if path.exists():
            runs += [HeldOut(**plain) for plain in json.loads(path.read_text())]
    kept = options.out / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    missing = [run for run in runs if run.name not in results]
    for run in missing[: 0 if options.table else options.runs]:
        results[run.name] = train(run, options.config, options.data, options.out)
        kept.write_text(json.dumps(results, indent=1))
        print(f"{run.name}: {results[run.name]}", file=sys.stderr)
    figures = summary(runs, results)
    (options.out / "plan.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
