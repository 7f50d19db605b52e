"""The `check` command: what a configuration would do, before any training."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fundamentallm.config import load_config
from fundamentallm.engine.assemble import Run, assemble, check_names
from fundamentallm.engine.console import say, speaking
from fundamentallm.engine.fit import estimate_run, gib, memory_limit
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.engine.run_directory import nowhere
from fundamentallm.training.distributed import Ranks
from fundamentallm.training.handlers.progress import format_seconds
from fundamentallm.training.step import TrainStep

MEASURED_STEPS = 3


def check(config_path: Path, overrides: Sequence[str] = (), plugins: Sequence[str] = ()) -> int:
    """Validate a configuration and print its costs and its timeline; return the exit code.

    Raises:
        FundamentaLLMError: what `run` would raise.
    """
    config = load_config(config_path, overrides)
    with speaking():
        load_plugins([*config.plugins, *plugins], config.locate("plugins"))
        check_names(config)
        run = assemble(config, nowhere(config), Ranks(), measuring=False)
    for note in run.notes:
        say(note)
    _print_costs(run)
    say()
    say("Events and their handlers, in firing order:")
    for event, handlers in run.trainer.timeline():
        say(f"  {event:<28}{', '.join(handlers)}")
    say()
    say(f"{config_path} is fine. Next:")
    say(f"  python -m fundamentallm.engine run {config_path}")
    return 0


def _print_costs(run: Run) -> None:
    trainer = run.trainer
    cost = estimate_run(run.config)
    tokens_per_step = trainer.train_loader.tokens_per_step
    seconds = measure_step(run)
    limit = memory_limit(trainer.device)
    say(f"device           {trainer.device}, {run.config.training.precision}")
    say(
        f"parameters       {cost.parameters:,}"
        f" ({cost.non_embedding_parameters:,} without embeddings)"
    )
    say(f"tokens per step  {tokens_per_step:,}")
    say(f"steps per epoch  {trainer.steps_per_epoch:,}")
    if trainer.total_steps is not None:
        total = trainer.total_steps * tokens_per_step
        say(f"steps            {trainer.total_steps:,} ({total:,} tokens)")
        say(f"FLOPs            {cost.flops_per_token * total:.3g}")
    say(f"memory           about {gib(cost.total_bytes)}" + (f" of {gib(limit)}" if limit else ""))
    speed = f"{seconds * 1e3:.0f} ms a step, {tokens_per_step / seconds:,.0f} tokens/s"
    if trainer.total_steps is not None:
        say(f"time             about {format_seconds(trainer.total_steps * seconds)} ({speed})")
    elif trainer.limits.max_seconds is not None:
        say(f"time             {format_seconds(trainer.limits.max_seconds)} ({speed})")


def measure_step(run: Run) -> float:
    """Return the seconds of one optimizer step, the fastest of a few on a copy of the model."""
    trainer = run.trainer
    model = copy.deepcopy(trainer.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    step = TrainStep(
        model,
        model,
        optimizer,
        trainer.loss_fn,
        trainer.precision,
        trainer.ranks,
        trainer.config.max_grad_norm,
        lambda event: None,
    )
    window = trainer.train_loader.window_at(0, 0)
    fastest = float("inf")
    for _ in range(MEASURED_STEPS):
        started = time.perf_counter()
        step(window, window.num_tokens, run.config.data.batch_size)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
