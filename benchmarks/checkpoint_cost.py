"""What a checkpoint costs: a durable save, and how long an asynchronous one holds the training.

    python benchmarks/checkpoint_cost.py [--sizes 1 25 150] [--repeats 15] [--out DIR]

For training states of about so many megabytes (weights, two moments, random numbers), in turn:

    plain         the same bytes written to one file, with fsync
    durable       Checkpointing's save: capture, finite scan, files with hashes and fsync, read
                  back, manifest, rename, pointer, retention
    copy          every tensor of the state cloned
    asynchronous  how long Checkpointing(asynchronous=True) holds the training

In turn, so that whatever else the machine does falls on all four alike. Prints one JSON object;
exits with 1 where the median of `durable` is above 3 times `plain` plus 30 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fundamentallm.config import TrainingConfig
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.tree import flatten
from fundamentallm.training.decision import GO_ON
from fundamentallm.training.handlers import Checkpointing
from fundamentallm.training.trainer import Trainer

SIZES = {1: (64, 2), 25: (192, 5), 150: (512, 4)}  # megabytes -> d_model, layers
FACTOR, MARGIN = 3.0, 0.030


def make_trainer(megabytes: int) -> Trainer:
    d_model, num_layers = SIZES[megabytes]
    torch.manual_seed(0)
    model = tiny_model(d_model=d_model, num_layers=num_layers, num_heads=4)
    train, val = tiny_loaders()
    trainer = Trainer(
        model, train, val, device="cpu", config=TrainingConfig(total_steps=1), handlers=()
    )
    trainer._checkpoint_dir = None
    trainer.train()
    trainer._decision = GO_ON  # in the middle of a run, as far as a save can tell
    return trainer


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def write_plainly(path: Path, chunks: list[memoryview]) -> None:
    with path.open("wb", buffering=0) as file:
        for chunk in chunks:
            while chunk.nbytes:
                chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())


def summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return {"median": round(1e3 * statistics.median(ordered), 2), "p95": round(1e3 * p95, 2)}


def measure(megabytes: int, repeats: int, directory: Path) -> dict[str, Any]:
    trainer = make_trainer(megabytes)
    durable = Checkpointing(directory / "durable", n_saved=2)
    held = Checkpointing(directory / "held", n_saved=2, asynchronous=True)
    tensors = list(flatten(snapshot.capture(trainer))[1].values())
    chunks = [t.contiguous().reshape(-1).view(torch.uint8).numpy().data for t in tensors]
    seconds: dict[str, list[float]] = {
        name: [] for name in ("plain", "durable", "copy", "asynchronous")
    }
    for repeat in range(-2, repeats):  # two rounds to warm up
        trainer.state.iteration += 1
        plain = directory / f"plain-{trainer.state.iteration}"
        times = {
            "plain": timed(partial(write_plainly, plain, chunks)),
            "durable": timed(lambda: durable(trainer)),
            "copy": timed(lambda: [tensor.clone() for tensor in tensors]),
            "asynchronous": timed(lambda: held(trainer)),
        }
        held._finish_background(trainer)
        plain.unlink()
        if repeat >= 0:
            for name, value in times.items():
                seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [d / p for d, p in zip(seconds["durable"], seconds["plain"], strict=True)]
    return {
        "bytes": sum(chunk.nbytes for chunk in chunks),
        "tensors": len(tensors),
        "milliseconds": {name: summary(values) for name, values in seconds.items()},
        "durable / plain": round(statistics.median(ratios), 2),
        "asynchronous / copy": round(medians["asynchronous"] / medians["copy"], 2),
        "limit_ms": round(1e3 * (FACTOR * medians["plain"] + MARGIN), 2),
        "within": medians["durable"] <= FACTOR * medians["plain"] + MARGIN,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What a checkpoint costs.")
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="where to write; a temporary directory if not set")
    options = parser.parse_args()
    torch.set_num_threads(1)
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-cost-", dir=options.out))
    try:
        sizes = {
            f"{size} MB": measure(size, options.repeats, directory / str(size))
            for size in options.sizes
            if not (directory / str(size)).mkdir()
        }
    finally:
        shutil.rmtree(directory)
    machine = {"torch": torch.__version__, "cpu": platform.machine(), "cores": os.cpu_count()}
    report = {"repeats": options.repeats, "machine": machine, "sizes": sizes}
    print(json.dumps(report, indent=2))
    return 0 if all(size["within"] for size in sizes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
