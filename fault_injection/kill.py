"""kill -9 at any instant: nothing committed is lost, and the run goes on bit for bit.

    python -m fault_injection.kill [--trials 500] [--seed 0] [--cold 20]

A run is killed again and again until it ends by itself: inside a save, at a chosen operation on
the disk or a random moment after the save has begun; in the tidying up of a resume; and at random
moments elsewhere. After every kill the two newest committed checkpoints, the best one and whatever
`best` names are whole, nothing else has a checkpoint's name, and the next process goes on from
the newest without any repair. At its end the whole state, every metric line and every sample are
those of a run that nobody killed. A third of the runs saves in a thread. Prints one JSON object;
exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fault_injection.faults import scratch_directory
from fault_injection.worker import (
    N_SAVED,
    RESULT,
    Child,
    ColdChild,
    Plan,
    result_of,
    score_of,
    steps_told,
    undisturbed,
)
from fundamentallm.training.checkpoint.store import CheckpointStore, step_name, step_of

# What a kill aims at, and how often.
AIMS = {"operation of a save": 45, "moment in a save": 25, "resume": 10, "moment": 20}
OPERATIONS_OF_SAVES = 130  # of about three
OPERATIONS_OF_A_RESUME = 14
MOST_SECONDS_AFTER_A_WORD = 0.012
KILLS_OF_A_RUN = 9


@dataclass
class Counts:
    """What a series of trials has seen.

    Attributes:
        trials: processes that were killed.
        in_save: those of them that were killed between a save's first and last operation.
        runs: runs that were killed until they ended by themselves.
        lost: kills after which a committed checkpoint was missing or damaged, or disowned.
        manual: processes that ended with an error, or did not begin where they should.
        unequal: runs that did not end as the undisturbed one.
        faults: what exactly was found, the first few.
        aims: trials by what they aimed at.
    """

    trials: int = 0
    in_save: int = 0
    runs: int = 0
    lost: int = 0
    manual: int = 0
    unequal: int = 0
    faults: list[str] = field(default_factory=list)
    aims: Counter[str] = field(default_factory=Counter)

    def note(self, what: str) -> None:
        """Keep a description."""
        if len(self.faults) < 10:
            self.faults.append(what)


class Observer:
    """Knows from outside what one run has committed.

    Args:
        run_dir: of the run.
        scores: score by step, from the undisturbed run.
    """

    def __init__(self, run_dir: Path, scores: Mapping[int, float]) -> None:
        self.store = CheckpointStore(run_dir / "checkpoints")
        self.scores = scores
        self.committed: set[int] = set()

    def best(self) -> int | None:
        """Return the committed step with the best score, the first of equal ones."""
        scored = [step for step in sorted(self.committed) if step in self.scores]
        return max(scored, key=self.scores.__getitem__, default=None)

    def after(self, told: list[str]) -> list[str]:
        """Return what is wrong on the disk after a process that told this."""
        self.committed |= set(steps_told(told, "saved"))
        manifests, damaged = self.store.scan()
        whole = {manifest.step for manifest in manifests}
        # Reported or not: what was once seen whole is committed.
        self.committed |= whole
        kept = set(sorted(self.committed)[-N_SAVED:])
        if (best := self.best()) is not None:
            kept.add(best)
        faults = [f"step {step} is lost" for step in sorted(kept - whole)]
        faults += [f"under a checkpoint's name: {str(error).splitlines()[0]}" for error in damaged]
        pointed = self.store.pointed("best")
        if pointed is not None and step_of(pointed) not in whole:
            faults.append(f"best names {pointed}, which is not whole")
        # The pointer follows the commit, so a kill in between leaves it one save behind.
        newest = max(self.committed, default=None)
        if best is not None and best != newest and pointed != step_name(best):
            faults.append(f"best names {pointed}, and the best is step {best}")
        return faults

    def begun(self, told: list[str], newest: int | None) -> list[str]:
        """Return what is wrong with where a process began, given the newest step before it."""
        ready = steps_told(told, "ready")
        return [] if not ready or ready[0] == (newest or 0) else [f"began at {ready}, not {newest}"]


def kill_once(
    run_dir: Path, plan: Plan, chance: random.Random, aim: str, kind: type[Child] = Child
) -> tuple[int, list[str]]:
    """Start the run and kill it; return its exit code, negative if killed, and its words."""
    operations = {"operation of a save": "save", "resume": "resume"}
    if aim in operations:
        most = OPERATIONS_OF_SAVES if aim != "resume" else OPERATIONS_OF_A_RESUME
        plan = replace(plan, kill_in=operations[aim], kill_at=chance.randrange(most))
    child = kind(run_dir, plan)
    if aim not in operations:
        word = "writing" if aim == "moment in a save" else "step"
        wanted = chance.randint(1, 4 if word == "writing" else 12)
        for line in child.listen():
            wanted -= line.split()[0] == word
            if wanted == 0:
                # Most saves are short: the delays crowd at their beginning.
                time.sleep(chance.random() ** 2 * MOST_SECONDS_AFTER_A_WORD)
                child.kill(signal.SIGKILL)
                break
    return child.wait(), child.told


def in_save(told: Sequence[str]) -> bool:
    """Whether what was told ends inside a save."""
    writing = [line for line in told if line.startswith(("writing", "written"))]
    return bool(writing) and writing[-1].startswith("writing")


def aims(chance: random.Random) -> Iterator[str]:
    """Yield what to aim at, for ever."""
    while True:
        yield chance.choices(list(AIMS), list(AIMS.values()))[0]


def kill_a_run(
    run_dir: Path,
    plan: Plan,
    chance: random.Random,
    expected: Mapping[str, Any],
    counts: Counts,
    kills: int = KILLS_OF_A_RUN,
    kind: type[Child] = Child,
) -> None:
    """Kill a run so many times, let it end, and count."""
    run_dir.mkdir()
    scores = {
        line["step"]: score_of(line["val/loss"]) for line in expected["lines"] if "val/loss" in line
    }
    observer = Observer(run_dir, scores)
    code = -signal.SIGKILL
    for left, aim in zip(range(kills, -1, -1), aims(chance), strict=False):
        newest = max(observer.committed, default=None)
        if left:
            code, told = kill_once(run_dir, plan, chance, aim, kind)
        else:  # the last one is let live
            child = kind(run_dir, plan)
            code, told = child.wait(), child.told
        if faults := observer.begun(told, newest):
            counts.manual += 1
            counts.note(f"{run_dir.name}: {faults}")
        if faults := observer.after(told):
            counts.lost += 1
            counts.note(f"{run_dir.name}, {aim}: {faults}")
        if code != -signal.SIGKILL:
            break
        counts.trials += 1
        counts.in_save += in_save(told)
        counts.aims[aim] += 1
    counts.runs += 1
    if code != 0 or not (run_dir / RESULT).exists():
        counts.manual += 1
        counts.note(f"{run_dir.name}: exit code {code}: {told[-3:]}")
    elif result_of(run_dir) != expected:
        counts.unequal += 1
        counts.note(f"{run_dir.name}: {difference(result_of(run_dir), expected)}")


def difference(got: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return in words where two outcomes differ."""
    unequal = [name for name in expected if got[name] != expected[name]]
    for ours, theirs in zip(got["lines"], expected["lines"], strict=False):
        if ours != theirs:
            return f"{', '.join(unequal)} differ, first {ours}, not {theirs}"
    return f"{', '.join(unequal)} differ; {len(got['lines'])} of {len(expected['lines'])} lines"


def run_trials(
    trials: int, seed: int = 0, plan: Plan | None = None, cold: int = 0
) -> dict[str, Any]:
    """Kill so many times, and of those `cold` times a started process; return the counts."""
    plan = plan or Plan()
    chance = random.Random(seed)
    counts = Counts()
    started = time.perf_counter()
    with scratch_directory() as top:
        expected = undisturbed(top / "undisturbed")
        while counts.trials < trials - cold:
            asynchronous = plan.asynchronous or counts.runs % 3 == 2
            how = replace(plan, asynchronous=asynchronous)
            kills = min(KILLS_OF_A_RUN, trials - cold - counts.trials)
            kill_a_run(top / str(counts.runs), how, chance, expected, counts, kills)
    with tempfile.TemporaryDirectory(prefix="kill-") as top_on_disk:
        forked = counts.trials
        while counts.trials < forked + cold:
            run_dir = Path(top_on_disk) / str(counts.runs)
            kills = min(KILLS_OF_A_RUN, forked + cold - counts.trials)
            kill_a_run(run_dir, plan, chance, expected, counts, kills, ColdChild)
    return {
        "series": "kill",
        "seed": seed,
        "trials": counts.trials,
        "of started processes": counts.trials - forked,
        "inside a save": counts.in_save,
        "aimed at": dict(counts.aims),
        "runs": counts.runs,
        "lost": counts.lost,
        "manual": counts.manual,
        "unequal": counts.unequal,
        "faults": counts.faults,
        "seconds": round(time.perf_counter() - started, 1),
    }


def is_sound(report: Mapping[str, Any]) -> bool:
    """Whether nothing was lost, and enough kills fell inside a save."""
    return (
        report["lost"] == report["manual"] == report["unequal"] == 0
        and report["inside a save"] >= 0.4 * report["trials"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials; return the exit code."""
    parser = argparse.ArgumentParser(description="kill -9 at any instant.")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cold", type=int, default=20, help="trials of started, not forked, processes"
    )
    options = parser.parse_args(arguments)
    report = run_trials(options.trials, options.seed, cold=options.cold)
    print(json.dumps(report, indent=2))
    return 0 if is_sound(report) else 1


if __name__ == "__main__":
    sys.exit(main())
