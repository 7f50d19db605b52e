"""Tokens a second of a training loop: ours, a plain one written by hand, and three other trainers.

    python benchmarks/speed.py [--shape small] [--rounds 3] [--seconds 20] [--contestants NAME ...]
                               [--isa avx2]

- hand: a GPT-2-like model and its loop, eager float32, as a script would have it (`by_hand.py`).
- ignite, lightning, hf: the same model and the same step in plain Ignite, Lightning and the Hugging
  Face Trainer (`pip install --group peers`); what they add to `hand` is what they cost.
- engine: the same model and step in this package's trainer, with its default handlers.
- ours: this package's model of the same shape and size, trained as it is meant to be on a CPU:
  bfloat16, native code, by `run`'s own assembly.
- ours32: the same in float32.

`--isa` limits torch and the native code to an older instruction set: the report says "emulated",
since the clock, the caches and the memory stay those of this processor.

Each contestant is a process of its own, a round has all of them in turn, and a ratio is one of a
round. A step is timed when the first ten are over, so compilation counts for nothing here. Prints
one JSON object: the median step, tokens a second, the model FLOPs a second (6 N + 12 L D T a token,
Chowdhery et al. 2022, appendix B) as a share of the best matrix product that this machine was seen
to do in that type, and the peak of resident memory; and on what it ran: processor, cores,
instruction set, measured peaks, memory bandwidth. Other work on the machine stretches the wall's
time. So it tells processor time as well, and ratios of the fastest tenth of the steps: a virtual
machine counts the processor time that its host gave to others as its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from by_hand import GPT, Batches, Shape, make_optimizer, step_by_hand
from ignite.engine import Engine, Events
from machine import ISAS, fastest_tenth, limit_this_process, machine_report
from torch import Tensor, nn

from fundamentallm.compute.peak import measured_peak
from fundamentallm.compute.processor import cpu_rates, why_not_bf16
from fundamentallm.config import load_config
from fundamentallm.engine.console import logging_to
from fundamentallm.engine.wiring import assemble, run_directory
from fundamentallm.models.families import MODELS
from fundamentallm.training.trainer import Trainer

SHAPES = {
    "small": Shape(layers=4, heads=4, width=128, context=64, batch=12),  # nanoGPT's CPU recipe
    "large": Shape(layers=6, heads=6, width=384, context=256, batch=16),  # its GPU recipe
}
CONTESTANTS = ("hand", "ignite", "lightning", "hf", "engine", "ours", "ours32")
FAST = [
    "model.normalization=rmsnorm",
    "model.positions=rotary",
    "model.feedforward=relu_squared",
    "model.qk_norm=true",
    "model.bias=false",
    "training.compile=native",
    "training.attention=auto",
]
WARMUP = 10  # steps
CLIP = 1.0


class Stopwatch:
    """Times steps until there was enough time for them.

    Args:
        seconds: to go on after the warmup.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._taken = 0
        self._last = (0.0, 0.0)
        self._end = float("inf")

    def lap(self) -> bool:
        """Note that a step is over; return whether there shall be no further one."""
        now = (time.perf_counter(), time.process_time())
        self._taken += 1
        if self._taken == WARMUP:
            self._end = now[0] + self.seconds
        elif self._taken > WARMUP:
            self.wall.append(now[0] - self._last[0])
            self.cpu.append(now[1] - self._last[1])
        self._last = now
        return now[0] > self._end and len(self.wall) >= 3


def hand(shape: Shape, watch: Stopwatch) -> nn.Module:
    """Train by a loop written by hand."""
    model = GPT(shape)
    optimizer = make_optimizer(model)
    for batch in Batches(shape):
        step_by_hand(model, optimizer, batch, CLIP)
        if watch.lap():
            break
    return model


def ignite(shape: Shape, watch: Stopwatch) -> nn.Module:
    """Train in a plain Ignite engine."""
    model = GPT(shape)
    optimizer = make_optimizer(model)
    engine = Engine(lambda _, batch: step_by_hand(model, optimizer, batch, CLIP))

    @engine.on(Events.ITERATION_COMPLETED)
    def lap() -> None:
        if watch.lap():
            engine.terminate()

    engine.run(Batches(shape), max_epochs=1, epoch_length=10**6)
    return model


def lightning(shape: Shape, watch: Stopwatch) -> nn.Module:
    """Train in a Lightning trainer, without its logs, bars and checkpoints."""
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT(shape)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return self.model.loss(*batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self.model)

        def on_train_batch_end(self, *_: Any) -> None:
            if watch.lap():
                self.trainer.should_stop = True

    module = Module()
    trainer = pl.Trainer(
        max_steps=10**6,
        accelerator="cpu",
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Batches(shape), batch_size=None))
    return module.model


def hf(shape: Shape, watch: Stopwatch) -> nn.Module:
    """Train in the Hugging Face Trainer, without its logs, bars and checkpoints."""
    import transformers

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT(shape)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": self.model.loss(input_ids, labels)}

    class Lap(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = watch.lap()

    model = Wrapped()
    data = Batches(shape)
    rows = [
        {"input_ids": inputs[row], "labels": targets[row]}
        for inputs, targets in (data.at(number) for number in range(64))
        for row in range(shape.batch)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch,
            max_steps=10**6,
            per_device_train_batch_size=shape.batch,
            max_grad_norm=CLIP,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        transformers.Trainer(
            model,
            arguments,
            train_dataset=rows,
            callbacks=[Lap()],
            optimizers=(make_optimizer(model.model), None),
        ).train()
    return model.model


@MODELS.register("by_hand")
class ByHand(GPT):
    """The model that is written by hand, as a family of this package."""

    def __init__(self, layers: int, heads: int, width: int, context: int) -> None:
        super().__init__(Shape(layers, heads, width, context, batch=1))


def engine(shape: Shape, watch: Stopwatch) -> nn.Module:
    """Train the same model in this package's trainer, with the handlers that a run has."""
    sizes = {"layers": shape.layers, "heads": shape.heads, "width": shape.width}
    model = {"family": "by_hand", **sizes, "context": shape.context}
    with assembled(shape, [f"model={json.dumps(model)}", "training.precision=fp32"]) as trainer:
        train(trainer, watch)
        return trainer.model


def ours(shape: Shape, watch: Stopwatch, precision: str = "bf16") -> nn.Module:
    """Train this package's model of the shape as fast as it goes."""
    sizes = [f"model.d_model={shape.width}", f"model.num_layers={shape.layers}"]
    sizes += [f"model.num_heads={shape.heads}", f"training.precision={precision}"]
    with assembled(shape, [*sizes, *FAST]) as trainer:
        train(trainer, watch)
        return trainer.model


def ours32(shape: Shape, watch: Stopwatch) -> nn.Module:
    """Train it in float32."""
    return ours(shape, watch, "fp32")


@contextlib.contextmanager
def assembled(shape: Shape, overrides: list[str]) -> Iterator[Trainer]:
    """Assemble a run of a shape as `run` does."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as held:
        text = Path(scratch) / "text.txt"
        text.write_text(Batches(shape).text(), encoding="utf-8")
        config = load_config(
            Path(__file__).resolve().parent.parent / "configs" / "nanogpt_cpu.yaml",
            [
                f"data.source={text}",
                f"data.sequence_length={shape.context}",
                f"data.batch_size={shape.batch}",
                f"training.total_steps={10**6}",
                f"training.eval_steps={10**6}",
                "training.eval_epochs=false",
                "handlers.samples=false",
                *overrides,
            ],
        )
        directory = run_directory.choose(config, "never", Path(scratch) / "run")
        trainer = assemble.assemble(config, directory, assemble.open_machine(config)).trainer
        directory.path.mkdir(exist_ok=True)
        held.enter_context(logging_to(directory.path / "log.txt"))
        yield trainer


def train(trainer: Trainer, watch: Stopwatch) -> None:
    """Train until the watch says that it is enough."""

    def lap() -> None:
        if watch.lap():
            trainer.finish("measured")

    trainer.add_event_handler(Events.ITERATION_COMPLETED, lap)
    trainer.run()


def measure(name: str, shape: Shape, seconds: float) -> dict[str, Any]:
    """Run one contestant in this process."""
    torch.manual_seed(0)
    watch = Stopwatch(seconds)
    model = globals()[name](shape, watch)
    return {
        "ms": statistics.median(watch.wall) * 1e3,
        "cpu_ms": statistics.median(watch.cpu) * 1e3,
        "fast_ms": fastest_tenth(watch.wall) * 1e3,
        "steps": len(watch.wall),
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_mb": peak_megabytes(),
    }


def peak_megabytes() -> float:
    """Return the peak of this process's resident memory; getrusage would tell its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def flops_a_token(shape: Shape, parameters: int) -> int:
    """Return the FLOPs of forward and backward pass, without what is computed again."""
    embedding = shape.context * shape.width  # the positions' table takes no product
    return 6 * (parameters - embedding) + 12 * shape.layers * shape.width * shape.context


def turns(names: list[str], rounds: int, arguments: list[str]) -> Iterator[dict[str, Any]]:
    """Yield each round's figures by contestant."""
    for number in range(rounds):
        found = {}
        for name in names if number % 2 == 0 else reversed(names):
            done = subprocess.run(
                [sys.executable, __file__, "--alone", name, *arguments],
                capture_output=True,
                text=True,
                timeout=1200,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
            if done.returncode:
                raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"round {number + 1}: {name} {found[name]['ms']:.1f} ms", file=sys.stderr)
        yield found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--isa", choices=ISAS, help="limit the processor to this instruction set")
    parser.add_argument("--alone", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    limit_this_process(options.isa)
    if options.alone:
        print(json.dumps(measure(options.alone, shape, options.seconds)))
        return 0
    cpu = torch.device("cpu")
    peaks = {"float32": measured_peak(cpu, torch.float32)}
    # Large products of an emulated type would take minutes.
    slow = why_not_bf16(cpu)
    peaks["bfloat16"] = cpu_rates().bfloat16 if slow else measured_peak(cpu, torch.bfloat16)
    arguments = ["--shape", options.shape, "--seconds", str(options.seconds)]
    arguments += ["--isa", options.isa] if options.isa else []
    rounds = list(turns(list(options.contestants), options.rounds, arguments))
    tokens = shape.batch * shape.context

    def middle(pick: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(pick, rounds))

    table = {}
    for name in options.contestants:
        ms = middle(lambda found, name=name: found[name]["ms"])
        parameters = rounds[0][name]["parameters"]
        peak = peaks["bfloat16" if name == "ours" else "float32"]
        table[name] = {
            "parameters": parameters,
            "ms a step": round(ms, 2),
            "tokens a second": round(tokens / ms * 1e3),
            "MFU": round(flops_a_token(shape, parameters) * tokens / ms * 1e3 / peak, 3),
            "peak MB": round(middle(lambda found, name=name: found[name]["peak_mb"])),
        }
        if "hand" in options.contestants:
            for key, label in (
                ("ms", "times as fast as hand"),
                ("cpu_ms", "the same by CPU time"),
                ("fast_ms", "the same by the fastest tenth of the steps"),
            ):
                ratio = middle(
                    lambda found, name=name, key=key: found["hand"][key] / found[name][key]
                )
                table[name][label] = round(ratio, 3)
            more = middle(lambda found, name=name: found[name]["cpu_ms"] - found["hand"]["cpu_ms"])
            table[name]["microseconds of CPU time more than hand"] = round(more * 1e3)
    report = {
        "shape": vars(shape),
        "machine": machine_report(options.isa),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "matrix products, TFLOP/s": {name: round(peak / 1e12, 3) for name, peak in peaks.items()},
        "contestants": table,
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
