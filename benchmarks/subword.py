"""Bits per byte of a model of subwords beside the same model of characters.

    OMP_NUM_THREADS=2 python benchmarks/subword.py [--steps 700] [override ...]

Both learn the same text with the same layers, at equal compute: the steps of the second are those
that cost as many FLOPs as the steps of the first (its head is larger). Both are measured on the
last 9 % of the text, which neither has learned from, in whole windows of their context. Overrides
(`model.dropout=0.1`) hold for both. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fundamentallm.config import load_config
from fundamentallm.data.sources import read_source
from fundamentallm.models.estimate import estimate

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "python_docs_bpe.yaml"


def engine(*words: str) -> str:
    command = [sys.executable, "-m", "fundamentallm.engine", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def flops_per_token(config: Path, vocab_size: int) -> float:
    run = load_config(config)
    sizes = {"vocab_size": vocab_size, "sequence_length": run.data.sequence_length}
    return estimate(
        run.model.model_copy(update=sizes), batch_size=run.data.batch_size
    ).flops_per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    text = read_source("python-docs").text
    costs = {
        "character": flops_per_token(CONFIG, len(set(text))),
        "bpe": flops_per_token(CONFIG, 2048),
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        held_out = Path(folder) / "held-out.txt"
        held_out.write_text(text[-len(text) * 9 // 100 :], encoding="utf-8")
        for name, cost in costs.items():
            steps = round(options.steps * costs["character"] / cost)
            run = str(Path(folder) / name)
            overrides = [f"training.total_steps={steps}", *options.overrides]
            if name == "character":
                overrides.insert(0, "data.tokenizer=character")
            engine("run", str(CONFIG), *overrides, "handlers.samples=false", "--run-dir", run)
            found = json.loads(engine("evaluate", run, "--data", str(held_out), "--json"))
            results[name] = {
                "steps": steps,
                "flops": cost * steps * 2048,
                "bits_per_byte": found["bits_per_byte"],
                "loss": found["loss"],
                "bytes_per_token": found["num_bytes"] / found["num_tokens"],
                "best_step": found["step"],
            }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
