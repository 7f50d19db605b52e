"""kill -9 at any instant: nothing committed is lost, and the run goes on bit for bit.

    python -m campaigns.kill [--trials 500] [--seed 0]

A run is killed again and again until it ends by itself, half of the times inside a save: at a
chosen operation on the disk, or a random moment after the save has begun. After every kill each
checkpoint that was reported as saved must still be whole unless a later save retired it, and the
run must go on without any repair. At its end weights, metrics and samples must be those of a run
that nobody killed. Prints one JSON object; exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from campaigns.victim import RESULT, Child, Plan, undisturbed
from fundamentallm.errors import CheckpointError
from fundamentallm.training.store import CheckpointStore, step_name

OPERATIONS_OF_A_PROCESS = 120  # disk operations of the few saves between two kills
KILLS_OF_A_RUN = 6


def kill_once(run_dir: Path, plan: Plan, chance: random.Random) -> tuple[bool, bool, list[str]]:
    """Start the run and kill it; return whether it was killed, whether in a save, and its words."""
    in_save = chance.random() < 0.6
    if in_save and chance.random() < 0.7:
        child = Child(run_dir, replace(plan, kill_at=chance.randrange(OPERATIONS_OF_A_PROCESS)))
        code = child.wait()
        return code == -signal.SIGKILL, code == -signal.SIGKILL, child.told
    child = Child(run_dir, plan)
    word = "saving" if in_save else "step"
    wanted = chance.randint(1, 5)
    for line in child.listen():
        wanted -= line.startswith(word)
        if wanted == 0:
            time.sleep(chance.random() * 0.008)
            os.kill(child.pid, signal.SIGKILL)
            break
    code = child.wait()
    killed = code == -signal.SIGKILL
    saving = [line for line in child.told if line.startswith(("saving", "saved"))]
    return killed, killed and bool(saving) and saving[-1].startswith("saving"), child.told


def lost_checkpoints(run_dir: Path, told: Sequence[str], saved: list[int]) -> list[int]:
    """Return the steps whose committed checkpoint is gone or damaged, after these words.

    The two newest that were reported are never retired by what can have happened since; the best
    is held by its pointer.
    """
    saved += [int(line.split()[1]) for line in told if line.startswith("saved")]
    store = CheckpointStore(run_dir / "checkpoints")
    lost = []
    # One more save may have been committed, and have retired the older of the two.
    for step in saved[-1:]:
        try:
            store.verify(store.directory / step_name(step))
        except CheckpointError:
            lost.append(step)
    if saved and store.resolve("best") is None:
        lost.append(-1)
    return lost


def campaign(trials: int, seed: int = 0, plan: Plan | None = None) -> dict[str, Any]:
    """Kill so many times and return the counts."""
    plan = plan or Plan()
    chance = random.Random(seed)
    counts = {"trials": 0, "inside a save": 0, "runs": 0, "lost": 0, "stuck": 0, "unequal": 0}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kill-") as top:
        expected = undisturbed(Path(top) / "undisturbed")
        while counts["trials"] < trials:
            run_dir = Path(top) / str(counts["runs"])
            run_dir.mkdir()
            how = replace(plan, asynchronous=plan.asynchronous or counts["runs"] % 3 == 2)
            saved: list[int] = []
            for _ in range(KILLS_OF_A_RUN):
                killed, in_save, told = kill_once(run_dir, how, chance)
                if not killed:
                    break
                counts["trials"] += 1
                counts["inside a save"] += in_save
                counts["lost"] += bool(lost_checkpoints(run_dir, told, saved))
            child = Child(run_dir, how)
            if child.wait() != 0:
                counts["stuck"] += 1
            elif json.loads((run_dir / RESULT).read_text()) != expected:
                counts["unequal"] += 1
            counts["runs"] += 1
    return {"campaign": "kill", **counts, "seconds": round(time.perf_counter() - started, 1)}


def is_sound(report: dict[str, Any]) -> bool:
    """Whether nothing was lost."""
    return report["lost"] == report["stuck"] == report["unequal"] == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; return the exit code."""
    parser = argparse.ArgumentParser(description="kill -9 at any instant.")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = campaign(options.trials, options.seed)
    print(json.dumps(report, indent=2))
    return 0 if is_sound(report) else 1


if __name__ == "__main__":
    sys.exit(main())
