"""The `check` command: what a configuration would do, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fundamentallm.config import load_config
from fundamentallm.config.evaluation import ALWAYS_MEASURED
from fundamentallm.engine.console import console_output, program, say
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.engine.tuning.fit import estimate_run, gib, memory_limit
from fundamentallm.engine.tuning.measuring import measure
from fundamentallm.engine.wiring.assemble import Run, assemble, check_names, open_machine
from fundamentallm.engine.wiring.run_directory import nowhere
from fundamentallm.training.handlers.progress import format_seconds

_SECONDS = 1.0  # of steps to measure


def check(config_path: Path, overrides: Sequence[str] = (), plugins: Sequence[str] = ()) -> int:
    """Validate a configuration and print its costs and its timeline; return the exit code.

    Raises:
        FundamentaLLMError: what `run` would raise.
    """
    config = load_config(config_path, overrides)
    with console_output():
        load_plugins([*config.plugins, *plugins], config.locate("plugins"))
        check_names(config)
        run = assemble(config, nowhere(config), open_machine(config))
    for note in run.notes:
        say(note)
    _print_costs(run, measure_step(run))
    say()
    say("Events and their handlers, in firing order:")
    for event, handlers in run.trainer.timeline():
        say(f"  {event:<28}{', '.join(handlers)}")
    say()
    say(f"{config_path} is valid. Next:")
    say(f"  {program()} run {config_path}")
    return 0


def _print_costs(run: Run, seconds: float) -> None:
    trainer = run.trainer
    cost = estimate_run(run.config)
    tokens_per_step = trainer.train_loader.tokens_per_step
    computed = trainer.train_loader.computed_per_step
    limit = memory_limit(trainer.device)
    say(f"device           {trainer.device}, {run.config.training.precision}")
    say(
        f"parameters       {cost.parameters:,}"
        f" ({cost.non_embedding_parameters:,} without embeddings)"
    )
    padded = f" that count, {computed:,} computed" if computed != tokens_per_step else ""
    say(f"tokens per step  {tokens_per_step:,}{padded}")
    say(f"steps per epoch  {trainer.steps_per_epoch:,}")
    if trainer.total_steps is not None:
        total = trainer.total_steps * tokens_per_step
        say(f"steps            {trainer.total_steps:,} ({total:,} tokens)")
        say(f"FLOPs            {cost.flops_per_token * computed * trainer.total_steps:.3g}")
    if trainer.val_loader is not None and len(trainer.val_loader):
        say(f"validation       {', '.join((*ALWAYS_MEASURED, *run.config.evaluation.metrics))}")
    say(f"memory           about {gib(cost.total_bytes)}" + (f" of {gib(limit)}" if limit else ""))
    speed = f"{seconds * 1e3:.0f} ms a step, {computed / seconds:,.0f} tokens/s"
    longest = trainer.budget.limits.max_seconds
    if trainer.total_steps is None and longest is not None:
        steps = int(longest / seconds)
        say(f"steps            at most about {steps:,} ({steps * tokens_per_step:,} tokens)")
    if trainer.total_steps is not None:
        expected = trainer.total_steps * seconds
        if longest is None or expected < longest:
            say(f"time             about {format_seconds(expected)} ({speed})")
            return
    if longest is not None:
        say(f"time             {format_seconds(longest)} ({speed})")


def measure_step(run: Run) -> float:
    """Return the seconds of one optimizer step with random weights.

    They are the median over the steps of a second, three at least: of three short steps alone, two
    may have waited for another process.

    Args:
        run: the run whose step is measured.
    """
    trainer = run.trainer
    plain = replace(trainer.plan, compile=False)
    windows = [trainer.train_loader.window_at(0, 0)]
    measured = measure(run.config, trainer.plan, windows, seconds=_SECONDS)
    if not measured.fault:
        return measured.step_seconds
    # Where torch's compiler fails, a run goes on without it.
    return measure(run.config, plain, windows, seconds=_SECONDS).step_seconds
