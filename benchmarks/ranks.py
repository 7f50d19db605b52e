"""The losses of one YAML on one process and on two, for the same windows.

    python benchmarks/ranks.py [--data PATH] [--steps 300] [--out DIR]

Trains configs/nanogpt_cpu.yaml on one process with two micro-batches a step, and under torchrun on
two processes with one each: the same windows. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "nanogpt_cpu.yaml"


def train(launcher: list[str], run_dir: Path, data: str, steps: int, accumulation: int) -> None:
    command = [*launcher, "-m", "fundamentallm.engine", "run", str(CONFIG)]
    command += [f"data.source={data}", "data.batch_size=6", f"training.total_steps={steps}"]
    command += [f"training.accumulation_steps={accumulation}", "training.log_steps=1"]
    command += ["--run-dir", str(run_dir)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=run_dir.parent)


def losses(run_dir: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {key: [line[key] for line in lines if key in line] for key in ("train/loss", "val/loss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="tinyshakespeare")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/ranks_benchmark"))
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = str(Path(options.data).resolve()) if Path(options.data).exists() else options.data

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    train([sys.executable], out / "one", data, options.steps, accumulation=2)
    train(torchrun, out / "two", data, options.steps, accumulation=1)
    one, two = losses(out / "one"), losses(out / "two")
    worst = {
        key: max(abs(a - b) / a for a, b in zip(one[key], two[key], strict=True)) for key in one
    }
    result = {
        "steps": options.steps,
        "last_val_loss": {"one process": one["val/loss"][-1], "two": two["val/loss"][-1]},
        "largest_relative_difference": worst,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
