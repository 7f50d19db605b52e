"""Draw a run: its losses, and what it wrote while it learned.

    pip install -c constraints.txt -e '.[notebooks]'
    python examples/plot_run.py runs/quickstart --out quickstart.png

What to learn: a run is plain files. `metrics.jsonl` has one JSON object a line, with `train/` or
`val/` metrics at their step; `samples.jsonl` has a text for each evaluation.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file; none where the file is missing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values (nats per token for losses) of one metric."""
    points = [(record["step"], float(record[key])) for record in records if key in record]
    return [step for step, _ in points], [value for _, value in points]


def draw(run: Path, num_samples: int = 5) -> Figure:
    """Return a figure of the losses on the left and a few samples on the right.

    Args:
        run: the run's directory.
        num_samples: samples to show, spread evenly over the run, first and last among them.
    """
    records = read_lines(run / "metrics.jsonl")
    samples = read_lines(run / "samples.jsonl")
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    losses, texts = figure.subplots(1, 2, width_ratios=(1.1, 1))
    losses.plot(
        *curve(records, "train/loss"), color="0.75", linewidth=1, label="training, one step"
    )
    losses.plot(*curve(records, "train/loss_ema"), color="tab:blue", label="training, mean")
    losses.plot(
        *curve(records, "val/loss"), "o-", color="tab:red", markersize=4, label="validation"
    )
    losses.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=run.name)
    losses.spines[["top", "right"]].set_visible(False)
    losses.legend(frameon=False)

    texts.axis("off")
    texts.set_title("what it writes")
    last = len(samples) - 1
    chosen = sorted({round(last * k / max(num_samples - 1, 1)) for k in range(num_samples)})
    rows = [samples[index] for index in chosen] if samples else []
    for row, sample in enumerate(rows):
        words = textwrap.shorten(sample["text"].replace("\n", " "), 190, placeholder=" ...")
        top = 1.0 - row / len(rows)
        texts.text(0, top, f"step {sample['step']}", va="top", weight="bold", size=9)
        # A dollar sign would begin a formula.
        body = textwrap.fill(words.replace("$", r"\$"), 62)
        texts.text(0, top - 0.06, body, va="top", size=8, family="monospace")
    return figure


def main() -> None:
    """Draw the run that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's directory, such as runs/quickstart")
    parser.add_argument("--out", type=Path, required=True, help="a .png, .svg or .pdf file")
    arguments = parser.parse_args()
    draw(arguments.run).savefig(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
