"""What training costs on this machine, by the size of the model, the context and the steps.

    python benchmarks/costs.py [--layers 4 6] [--widths 128 256 384] [--contexts 64 256]

Trains each shape for some seconds as `run` would, in a process of its own: bfloat16, native code,
4,096 tokens a step. Prints one JSON object, a row for each shape: parameters, the median step,
tokens a second, MFU against the best matrix product seen, peak memory, the hours of so many steps,
compilation left out, and what a token costs in validation over what it costs in the training's
forward pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from by_hand import Shape
from speed import FAST, Stopwatch, assembled, flops_a_token, peak_megabytes, train

from fundamentallm.compute.peak import measured_peak
from fundamentallm.training.trainer import Trainer

TOKENS = 4096  # a step
STEPS = (1_000, 10_000, 100_000)
HEAD_WIDTH = 64
EVALUATED = 20  # batches


def measure(shape: Shape, seconds: float) -> dict[str, float]:
    """Train one shape in this process."""
    torch.manual_seed(0)
    watch = Stopwatch(seconds)
    with assembled(shape, FAST) as trainer:
        train(trainer, watch)
        peak = peak_megabytes()
        return {
            "seconds": statistics.median(watch.wall),
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "peak_mb": peak,
            "validation": validation_over_forward(trainer, shape),
        }


def validation_over_forward(trainer: Trainer, shape: Shape) -> float:
    """Return the processor time of a token in validation over that in a training's forward pass."""
    ratios = []
    trainer.validate()  # its kernels are compiled here
    tokens = len(trainer.val_loader) * shape.batch * shape.context
    for _ in range(5):
        began = time.process_time()
        trainer.validate()
        evaluated = (time.process_time() - began) / tokens
        ratios.append(evaluated / _forward_seconds(trainer, shape))
    return statistics.median(ratios)


def _forward_seconds(trainer: Trainer, shape: Shape) -> float:
    trainer.model.train()
    batch = trainer.train_loader.window_at(0, 0).micro_batches[0]
    with trainer.precision.weights(trainer.model), trainer.precision.autocast():
        for count in range(EVALUATED + 1):
            if count == 1:
                began = time.process_time()
            trainer.loss_fn(trainer.model(batch["input_ids"]), batch["target_ids"])
    return (time.process_time() - began) / (EVALUATED * shape.batch * shape.context)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 384])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        shape = Shape(**json.loads(options.alone))
        print(json.dumps(measure(shape, options.seconds)))
        return
    peak = measured_peak(torch.device("cpu"), torch.bfloat16)
    rows: list[dict[str, Any]] = []
    for layers, width, context in itertools.product(
        options.layers, options.widths, options.contexts
    ):
        shape = Shape(layers, max(1, width // HEAD_WIDTH), width, context, TOKENS // context)
        arguments = ["--alone", json.dumps(vars(shape)), "--seconds", str(options.seconds)]
        done = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise SystemExit(f"{shape} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        rate = TOKENS / found["seconds"]
        rows.append(
            {
                "layers": layers,
                "width": width,
                "context": context,
                "parameters": found["parameters"],
                "ms a step": round(found["seconds"] * 1e3, 1),
                "tokens a second": round(rate),
                "MFU": round(flops_a_token(shape, found["parameters"]) * rate / peak, 3),
                "peak MB": round(found["peak_mb"]),
                "validation over training's forward": round(found["validation"], 2),
                **{f"hours of {n:,} steps": round(n * found["seconds"] / 3600, 2) for n in STEPS},
            }
        )
        print(f"{len(rows)}: {shape}: {rate:,.0f} tokens/s", file=sys.stderr)
    report = {"threads": torch.get_num_threads(), "peak TFLOP/s": round(peak / 1e12, 3)}
    print(json.dumps({**report, "shapes": rows}, indent=2))


if __name__ == "__main__":
    main()
