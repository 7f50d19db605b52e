"""Validation loss of nanoGPT's CPU recipe over seeds, and what a stop and resume does to it.

    python benchmarks/nanogpt_cpu.py [--data PATH] [--seeds 1337 1338 1339] [--out DIR]

Trains configs/nanogpt_cpu.yaml once a seed; then, for the first seed, stops at step 700, resumes,
and compares with the uninterrupted run. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "nanogpt_cpu.yaml"
# What differs between two runs of the same thing: time and speed.
UNREPEATABLE = {"elapsed_seconds", "train/tokens_per_second", "train/samples_per_second"}
STOP = """
from ignite.engine import Events
from fundamentallm.training.handlers import HANDLERS

@HANDLERS.register("stop_at_700")
class StopAt700:
    def attach(self, trainer):
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=700), self.stop)

    def stop(self, trainer):
        trainer.interrupt_run(15)
"""


def train(run_dir: Path, seed: int, data: str, *extra: str) -> float:
    """Run the recipe and return the seconds that it took."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "fundamentallm.engine", "run", str(CONFIG), f"seed={seed}"]
    command += [f"data.source={data}", "--run-dir", str(run_dir), *extra]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, cwd=run_dir.parent).returncode
    if code not in (0, 128 + 15):
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return time.perf_counter() - started


def metrics(run_dir: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without what cannot repeat."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in UNREPEATABLE}
        for line in lines
    ]


def final_loss(run_dir: Path) -> float:
    """Return the last validation loss."""
    return [line["val/loss"] for line in metrics(run_dir) if "val/loss" in line][-1]


def main() -> None:
    """Parse the arguments, train, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="tinyshakespeare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--out", type=Path, default=Path("runs/nanogpt_cpu_benchmark"))
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = options.data
    if Path(data).exists():
        data = str(Path(data).resolve())

    losses, seconds = {}, {}
    for seed in options.seeds:
        seconds[seed] = round(train(out / f"seed-{seed}", seed, data), 1)
        losses[seed] = final_loss(out / f"seed-{seed}")

    first = options.seeds[0]
    stopped = out / "stopped"
    (out / "stop_at_700.py").write_text(STOP)
    train(stopped, first, data, "--plugins", "stop_at_700", "handlers.stop_at_700=true")
    stopped_at = json.loads((stopped / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    train(stopped, first, data, "--plugins", "stop_at_700", "handlers.stop_at_700=true")
    print(
        json.dumps(
            {
                "val_loss": losses,
                "mean": statistics.mean(losses.values()),
                "spread": max(losses.values()) - min(losses.values()),
                "seconds": seconds,
                "stopped_at": stopped_at,
                "resumed_val_loss": final_loss(stopped),
                "resumed_metrics_equal": metrics(stopped) == metrics(out / f"seed-{first}"),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
