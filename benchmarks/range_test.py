"""The suggestion of `tune --learning-rate` against a grid of rates, for three sizes of model.

    python benchmarks/range_test.py TEXT [--sizes 50k 200k 800k] [--steps 200] [--test-steps 200]

Each run of the grid takes `--steps` steps of 512 tokens with AdamW, warmup and cosine, and is
measured on the validation split. Prints a row for each size: the rates of the grid with their
losses, the best one, the suggestion, and their ratio, which is to lie between 1/3 and 3. Rules that
lost are in the row too: a tenth of the rate with the lowest smoothed loss, and the rate where it
falls most steeply. With 200 steps the three sizes take about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from fundamentallm.config import RunConfig, load_config
from fundamentallm.engine.tuning.curve import Curve
from fundamentallm.engine.tuning.range_test import STEPS, bare_trainer, geometric, range_test
from fundamentallm.engine.wiring.assemble import check_names, open_machine
from fundamentallm.training.handlers import Schedule

SIZES = {  # d_model, num_layers, num_heads
    "50k": (48, 2, 2),
    "200k": (80, 3, 4),
    "800k": (128, 4, 4),
}
GRID = geometric(3e-4, 1.2e-1, 8)
CONFIG = """\
name: range_test
seed: 1
data:
  source: {text}
  tokenizer: character
  sequence_length: 64
  batch_size: 8
  split: [0.9, 0.01, 0.09]
model: {{d_model: {width}, num_layers: {layers}, num_heads: {heads}}}
training:
  learning_rate: {rate}
  scheduler: cosine
  warmup_steps: {warmup}
  total_steps: {steps}
"""


def config_of(size: str, text: Path, rate: float, steps: int) -> RunConfig:
    """Return the configuration of a run of the grid."""
    width, layers, heads = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(
            CONFIG.format(
                text=text.resolve(),
                width=width,
                layers=layers,
                heads=heads,
                rate=rate,
                steps=steps,
                warmup=steps // 10,
            )
        )
        config = load_config(path)
    check_names(config)
    return config


def val_loss(config: RunConfig) -> tuple[float, int]:
    """Train without anything written; return the validation loss and the number of parameters."""
    trainer = bare_trainer(config, open_machine(config), [])
    Schedule(trainer.scheduler).attach(trainer)
    trainer.run()
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return trainer.validate()["val/loss"], parameters


def lost_rules(curve: Curve) -> dict[str, float]:
    """Return what other rules suggest."""
    smooth, reach = curve.smoothed(), len(curve.losses) // 20
    lowest = smooth.index(min(smooth))
    steepest = min(
        range(reach, max(lowest, reach + 1)), key=lambda n: smooth[n + reach] - smooth[n - reach]
    )
    return {"lowest / 10": curve.rates[lowest] / 10, "steepest": curve.rates[steepest]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--test-steps", type=int, default=STEPS)
    options = parser.parse_args()
    for size in options.sizes:
        config = config_of(size, options.text, 1e-3, options.steps)
        began = time.perf_counter()
        curve = range_test(config, open_machine(config), options.test_steps)
        seconds = time.perf_counter() - began
        losses = {}
        for rate in GRID:
            config = config_of(size, options.text, rate, options.steps)
            losses[rate], parameters = val_loss(config)
        best = min(losses, key=losses.__getitem__)
        suggestion = curve.suggestion()
        assert suggestion is not None
        print(f"{parameters:,} parameters; the test took {seconds:.0f} s")
        print("  " + "  ".join(f"{rate:.1e}: {loss:.3f}" for rate, loss in losses.items()))
        print(f"  best {best:.1e}, suggestion {suggestion:.1e}: {suggestion / best:.2f} times")
        for name, rate in lost_rules(curve).items():
            print(f"  {name} {rate:.1e}: {rate / best:.2f} times")


if __name__ == "__main__":
    main()
