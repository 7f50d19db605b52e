"""Tokens a second that loaders hand out, without any model behind them.

    python benchmarks/loader.py [--sequence-length 256] [--batch-size 16] [--rounds 7]

- array: this package's loader over ids in memory.
- file: the same over a token file on disk, whose every read is watched for changes.
- documents: the same over ids in memory, each document packed apart.
- script: random places in a memory map and a stack of slices, as training scripts have it.
- dataloader: torch's DataLoader with shuffling over this package's map-style dataset.

Contestants take their rounds in turn, in processor time. Prints one JSON object with medians: the
microseconds of a window, tokens a second, and the time over that of `script`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fundamentallm.data.dataset import LanguageModelDataset
from fundamentallm.data.loaders import Batching, TokenWindowLoader
from fundamentallm.data.token_file import FileTokens

TOKENS = 10_000_000
WINDOWS = 200  # of a round


def endlessly(loader: Any) -> Iterator[Any]:
    """Yield one epoch after another."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


def script(path: Path, length: int, batch: int) -> Iterator[Any]:
    """Yield batches of a memory map that is opened anew for each, or it would grow with use."""
    while True:
        ids = np.memmap(path, dtype=np.uint16, mode="r")
        places = torch.randint(len(ids) - length, (batch,)).tolist()
        yield (
            torch.stack([torch.from_numpy(ids[i : i + length].astype(np.int64)) for i in places]),
            torch.stack(
                [torch.from_numpy(ids[i + 1 : i + 1 + length].astype(np.int64)) for i in places]
            ),
        )


def contestants(path: Path, length: int, batch: int) -> dict[str, Callable[[], Iterator[Any]]]:
    """Return what begins each of them."""
    ids = np.fromfile(path, np.uint16)
    on_disk = FileTokens(path, 0, len(ids), ids.dtype)
    dataset = LanguageModelDataset(torch.from_numpy(ids.astype(np.int64)), length)
    return {
        "script": lambda: script(path, length, batch),
        "dataloader": lambda: endlessly(
            torch.utils.data.DataLoader(dataset, batch_size=batch, shuffle=True)
        ),
        "array": lambda: endlessly(TokenWindowLoader(ids, Batching(length, batch))),
        "file": lambda: endlessly(TokenWindowLoader(on_disk, Batching(length, batch))),
        "documents": lambda: endlessly(TokenWindowLoader(ids, Batching(length, batch), end_id=0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "ids"
        np.random.default_rng(0).integers(0, 1000, TOKENS).astype(np.uint16).tofile(path)
        begin = contestants(path, options.sequence_length, options.batch_size)
        running = {name: start() for name, start in begin.items()}
        for windows in running.values():
            next(windows)  # an epoch's order is drawn here, or not at all
        for _ in range(options.rounds):
            for name, windows in running.items():
                began = time.process_time()
                for _ in range(WINDOWS):
                    next(windows)
                seconds.setdefault(name, []).append((time.process_time() - began) / WINDOWS)
    tokens = options.sequence_length * options.batch_size
    table = {
        name: {
            "microseconds a window": round(statistics.median(times) * 1e6, 1),
            "million tokens a second": round(tokens / statistics.median(times) / 1e6, 1),
            "time over script's": round(
                statistics.median(a / b for a, b in zip(times, seconds["script"], strict=True)), 3
            ),
        }
        for name, times in seconds.items()
    }
    print(json.dumps({**vars(options), "contestants": table}, indent=2))


if __name__ == "__main__":
    main()
