"""Does a run whose text and learning rate are spoilt end where a clean one ends?

    python benchmarks/healing.py [--data SOURCE] [--seeds 1 2 3] [--out DIR]

For each seed trains configs/healing.yaml twice: as it is, with a learning rate that diverges, on a
text with a region of 8,000 random characters in it; and clean, with a thousandth of that rate, on
the text itself, with `spikes` only reporting. Both are measured on the same validation split.
Prints one JSON object; exits with 1 if a healed run's loss is more than 2 % above its clean one's,
or if nothing had to be healed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from fundamentallm.data.sources import read_source
from fundamentallm.engine.run import run

CONFIG = Path(__file__).parents[1] / "configs" / "healing.yaml"
REGION_BEGINS, REGION_LENGTH = 400_000, 8_000
RARE = "$&3X"
FACTOR = 0.001
LIMIT = 0.02


def poisoned(text: str, seed: int) -> str:
    """Return a text with a region of rare characters, at random, in its training split."""
    chance = random.Random(seed)
    region = "".join(chance.choice(RARE) for _ in range(REGION_LENGTH))
    return text[:REGION_BEGINS] + region + text[REGION_BEGINS + REGION_LENGTH :]


def train(text: Path, seed: int, directory: Path, *overrides: str) -> dict[str, Any]:
    """Train one run; return its final loss and its incidents."""
    code = run(
        CONFIG,
        [f"data.source={text}", f"seed={seed}", "handlers.progress=false", *overrides],
        "never",
        directory,
    )
    assert code == 0
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [record["val/loss"] for record in map(json.loads, lines) if "val/loss" in record]
    names = [path.name for path in sorted((directory / "incidents").glob("*"))]
    return {"val/loss": losses[-1], "incidents": names}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="tinyshakespeare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, help="keep the runs here")
    options = parser.parse_args()
    source = read_source(options.data).text
    with tempfile.TemporaryDirectory(prefix="healing-") as scratch:
        out = options.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        report = []
        for seed in options.seeds:
            texts = {"clean": source, "spoilt": poisoned(source, seed)}
            for name, text in texts.items():
                (out / f"{name}-{seed}.txt").write_text(text, encoding="utf-8")
            clean = train(
                out / f"clean-{seed}.txt",
                seed,
                out / f"run-clean-{seed}",
                f"training.learning_rate={1.0 * FACTOR}",
                "handlers.spikes.policy=report",
            )
            healed = train(out / f"spoilt-{seed}.txt", seed, out / f"run-spoilt-{seed}")
            verdicts = [name.partition("-")[2].partition("-")[0] for name in healed["incidents"]]
            report.append(
                {
                    "seed": seed,
                    "clean": clean["val/loss"],
                    "healed": healed["val/loss"],
                    "healed / clean": healed["val/loss"] / clean["val/loss"],
                    "incidents": {name: verdicts.count(name) for name in sorted(set(verdicts))},
                }
            )
    ratios = [entry["healed / clean"] for entry in report]
    sound = max(ratios) <= 1 + LIMIT and all("divergence" in e["incidents"] for e in report)
    summary = {"runs": report, "mean ratio": statistics.mean(ratios), "sound": sound}
    print(json.dumps(summary, indent=2))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
