"""A signal at any instant: saved at the exact step, the right exit code, and on bit for bit.

    python -m campaigns.signals [--trials 200] [--seed 0]

SIGTERM, SIGINT, SIGHUP or SIGUSR1 comes in a step, while waiting for data, in an evaluation, in a
sample or in a save. The run must end with 128 + n, with a checkpoint of the step where it stood,
and go on to what a run gives that nobody stopped. A second signal must end it within a second.
Prints one JSON object; exits with 1 if any trial failed.
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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from campaigns.victim import RESULT, STEPS, Child, Plan, undisturbed
from fundamentallm.training.store import CheckpointStore

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
MOMENTS = ("step", "evaluating", "sampling", "saving", "ready")


def stop_once(run_dir: Path, chance: random.Random, moment: str) -> list[str]:
    """Send one signal at a moment of the run; return what was wrong."""
    number = chance.choice(SIGNALS)
    child = Child(run_dir, Plan(slow=chance.choice((0.0, 0.002))))
    wanted = 1 if moment == "ready" else chance.randint(1, 4)
    for line in child.listen():
        wanted -= line.startswith(moment)
        if wanted == 0:
            time.sleep(chance.random() * 0.01)
            os.kill(child.pid, number)
            break
    code = child.wait()
    steps = [int(line.split()[1]) for line in child.told if line.startswith("step")]
    if code == 0:
        return [] if steps[-1:] == [STEPS] or not steps else ["ended early with code 0"]
    faults = [] if code == 128 + number else [f"exit code {code}, not {128 + number}"]
    # Nothing was begun and left: the last step that was begun is the one that is saved.
    saved = [int(line.split()[1]) for line in child.told if line.startswith("saved")]
    newest = CheckpointStore(run_dir / "checkpoints").newest()
    at = newest.step if newest is not None else None
    if steps and at != steps[-1]:
        faults.append(f"step {steps[-1]} was taken, and step {at} is saved")
    if saved and at != saved[-1]:
        faults.append(f"step {saved[-1]} was reported as saved, and step {at} is newest")
    return faults


def second_signal_ends_it(run_dir: Path) -> list[str]:
    """Send two signals while nothing moves; return what was wrong."""
    child = Child(run_dir, Plan(slow=5.0))
    for line in child.listen():
        if line == "ready":
            break
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.1)
    started = time.perf_counter()
    os.kill(child.pid, signal.SIGTERM)
    code = child.wait()
    seconds = time.perf_counter() - started
    if code != 128 + signal.SIGTERM or seconds > 1.0:
        return [f"a second signal: exit code {code} after {seconds:.2f} s"]
    return []


def campaign(trials: int, seed: int = 0) -> dict[str, Any]:
    """Send so many signals and return the counts."""
    chance = random.Random(seed)
    moments: Counter[str] = Counter()
    faults: list[str] = []
    started = time.perf_counter()
    runs = 0
    with tempfile.TemporaryDirectory(prefix="signals-") as top:
        expected = undisturbed(Path(top) / "undisturbed")
        while moments.total() < trials:
            run_dir = Path(top) / str(runs)
            run_dir.mkdir()
            for _ in range(4):
                moment = MOMENTS[moments.total() % len(MOMENTS)]
                found = stop_once(run_dir, chance, moment)
                moments[moment] += 1
                faults += [f"{moment}: {fault}" for fault in found]
                if (run_dir / RESULT).exists():
                    break
            if not (run_dir / RESULT).exists():
                Child(run_dir, Plan()).wait()
            if json.loads((run_dir / RESULT).read_text()) != expected:
                faults.append(f"run {runs} differs from the undisturbed one")
            runs += 1
        (Path(top) / "twice").mkdir()
        faults += second_signal_ends_it(Path(top) / "twice")
    return {
        "campaign": "signals",
        "trials": moments.total(),
        "moments": dict(moments),
        "runs": runs,
        "faults": faults,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; return the exit code."""
    parser = argparse.ArgumentParser(description="A signal at any instant.")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = campaign(options.trials, options.seed)
    print(json.dumps(report, indent=2))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
