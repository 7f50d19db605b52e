"""A signal at any instant: saved at the exact step, the right exit code, and on bit for bit.

    python -m fault_injection.signals [--trials 200] [--seed 0]

SIGTERM, SIGINT, SIGHUP or SIGUSR1 comes in a step, in a wait for data, in an evaluation, in a
sample, in a save or right after the start; where it was received is what the run itself tells. The
run must end with 128 + n at the step it was in, with a checkpoint of just that step, and go on to
what a run gives that nobody stopped. Besides, a second signal must end it within a second wherever
it stands. A third of the runs saves in a thread. Prints one JSON object; exits with 1 if any trial
failed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fault_injection.faults import scratch_directory
from fault_injection.kill import difference
from fault_injection.worker import RESULT, STEPS, Child, Plan, result_of, steps_told, undisturbed
from fundamentallm.training.checkpoint.store import CheckpointStore

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Where to send one, and how many times the run comes there while it takes ten steps.
MOMENTS = {"step": 10, "waiting": 10, "evaluating": 2, "generating": 2, "saving": 2, "ready": 1}
STOPS_OF_A_RUN = 5
LONGER = 0.008  # seconds that a moment is made to last, each time it is entered
MOST_SECONDS_AFTER_A_WORD = 0.008
STUCK = 5.0  # seconds without an end in sight, for a second signal
MOST_SECONDS_OF_A_SECOND = 1.0


@dataclass
class Counts:
    """What a series of trials has seen.

    Attributes:
        received: trials, by the moment at which the run received the signal.
        numbers: trials, by the signal's name.
        late: signals that came when the last step was done, and stopped nothing; no trials.
        seconds: how long second signals took.
        runs: runs that were stopped until they ended by themselves.
        faults: what was wrong.
    """

    received: Counter[str] = field(default_factory=Counter)
    numbers: Counter[str] = field(default_factory=Counter)
    late: int = 0
    seconds: list[float] = field(default_factory=list)
    runs: int = 0
    faults: list[str] = field(default_factory=list)


def send_at(child: Child, moment: str, times: int, delay: float, number: int) -> None:
    """Send a signal so long after the run has come to a moment for so many times."""
    for line in child.listen():
        times -= line.split()[0] == moment
        if times == 0:
            time.sleep(delay)
            child.kill(number)
            return


def stop_once(
    run_dir: Path, plan: Plan, chance: random.Random, moment: str, counts: Counts
) -> None:
    """Send one signal at a moment of the run, and look at what it left."""
    number = chance.choice(SIGNALS)
    slow = chance.random() < 0.6
    child = Child(run_dir, replace(plan, slow_in=moment, slow=LONGER if slow else 0.0))
    times = chance.randint(1, MOMENTS[moment])
    # Most moments are short: the delays crowd at their beginning.
    send_at(child, moment, times, chance.random() ** 2 * MOST_SECONDS_AFTER_A_WORD, number)
    code = child.wait()
    begun = steps_told(child.told, "step")
    at = (steps_told(child.told, "ready") + begun)[-1]
    received = [line.split() for line in child.told if line.startswith("signal")]
    if not received or (code == 0 and at == STEPS):
        counts.late += 1
        # Behind the run's end a signal is nobody's but the system's.
        if code not in (0, -number):
            counts.faults.append(f"{moment}: not received, exit code {code}: {child.told[-2:]}")
        return
    _, _, word, step = received[0]
    counts.received[word] += 1
    counts.numbers[number.name] += 1
    faults = [] if code == 128 + number else [f"exit code {code}, not {128 + number}"]
    if at > int(step) + 1:
        faults.append(f"received in step {step}, and went on to {at}")
    newest = CheckpointStore(run_dir / "checkpoints").newest()
    saved = newest.step if newest is not None else None
    if saved != at:
        faults.append(f"stopped at step {at}, and step {saved} is the newest checkpoint")
    counts.faults += [f"{number.name} at {word} {step}: {fault}" for fault in faults]


def stop_twice(
    run_dir: Path, plan: Plan, chance: random.Random, moment: str, counts: Counts
) -> None:
    """Send two signals while nothing moves; the second must end it at once, and lose nothing."""
    first, second = chance.sample(SIGNALS, 2)
    before = CheckpointStore(run_dir / "checkpoints").newest()
    child = Child(run_dir, replace(plan, slow_in=moment, slow=STUCK))
    send_at(child, moment, 1, 0.01 + chance.random() * 0.03, first)
    for line in child.listen():
        if line.startswith("signal"):
            break
    time.sleep(chance.random() * 0.05)
    started = time.perf_counter()
    child.kill(second)
    code = child.wait()
    seconds = time.perf_counter() - started
    counts.seconds.append(seconds)
    if code != 128 + second or seconds > MOST_SECONDS_OF_A_SECOND:
        counts.faults.append(f"second signal at {moment}: exit code {code} after {seconds:.2f} s")
    after, damaged = CheckpointStore(run_dir / "checkpoints").scan()
    if damaged or (before is not None and (not after or after[0].step < before.step)):
        counts.faults.append(f"second signal at {moment}: checkpoints {after}, damaged {damaged}")


def stop_a_run(
    run_dir: Path,
    plan: Plan,
    chance: random.Random,
    expected: Mapping[str, Any],
    counts: Counts,
    stops: int,
) -> None:
    """Stop a run so many times, once of them with two signals, let it end, and compare."""
    run_dir.mkdir()
    twice = chance.randrange(stops)
    for stop in range(stops):
        if stop == twice:
            # A start is over before a second signal comes: it would be one in a step.
            stuck = ("step", "waiting", "evaluating", "generating", "saving")[counts.runs % 5]
            if not (stuck == "saving" and plan.asynchronous):  # a thread holds nothing up
                stop_twice(run_dir, plan, chance, stuck, counts)
        # The moment that was hit least so far.
        moment = min(MOMENTS, key=lambda word: (counts.received[word], chance.random()))
        stop_once(run_dir, plan, chance, moment, counts)
        if (run_dir / RESULT).exists():
            break
    code = Child(run_dir, plan).wait()
    counts.runs += 1
    if code != 0 or not (run_dir / RESULT).exists():
        counts.faults.append(f"run {run_dir.name} ended with {code}")
    elif result_of(run_dir) != expected:
        counts.faults.append(f"run {run_dir.name}: {difference(result_of(run_dir), expected)}")


def run_trials(trials: int, seed: int = 0, plan: Plan | None = None) -> dict[str, Any]:
    """Send so many signals and return the counts."""
    plan = plan or Plan()
    chance = random.Random(seed)
    counts = Counts()
    started = time.perf_counter()
    with scratch_directory() as top:
        expected = undisturbed(top / "undisturbed")
        while (left := trials - counts.received.total()) > 0:
            how = replace(plan, asynchronous=plan.asynchronous or counts.runs % 3 == 2)
            stops = min(STOPS_OF_A_RUN, left)
            stop_a_run(top / str(counts.runs), how, chance, expected, counts, stops)
    return {
        "series": "signals",
        "seed": seed,
        "trials": counts.received.total(),
        "received": dict(counts.received),
        "signals": dict(counts.numbers),
        "came too late": counts.late,
        "second signals": len(counts.seconds),
        "slowest second signal": round(max(counts.seconds, default=0.0), 3),
        "runs": counts.runs,
        "faults": counts.faults,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials; return the exit code."""
    parser = argparse.ArgumentParser(description="A signal at any instant.")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = run_trials(options.trials, options.seed)
    print(json.dumps(report, indent=2))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
