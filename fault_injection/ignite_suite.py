"""Ignite's own tests of handlers and engine, with a Trainer in the place of each `Engine(f)`.

    python -m fault_injection.ignite_suite [--part handlers] [--only PATTERN] [--out FILE]

Downloads the source distribution of the installed pytorch-ignite with pip into the cache, and runs
its tests twice, each time in a process of its own: on Ignite's engine, and on a Trainer whose step
calls `f`. Nothing else is patched. Tests that build a group of ranks are left out. Prints how many
of the tests that pass on Ignite's engine pass on a Trainer, and the reason of every other one: what
a training loop promises in place of what the test asks for. The exit code is 1 if a failure has no
reason in the table below.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RESULTS, ENGINE = "IGNITE_SUITE_RESULTS", "IGNITE_SUITE_ENGINE"
PARTS = ("handlers", "engine")
LONGEST = 60  # seconds of one test

# (pattern of a test's name, pattern of its error, the reason); the first that fits is printed.
REASONS = (
    (
        "",
        "epochs have another number of steps",
        "a Trainer knows the steps of its epochs when it is made, and refuses a state of others; in"
        " this test it hears of its data in run()",
    ),
    (
        "test_lr_finder.*reset",
        "iteration",
        "the state of a Trainer counts the seconds of its run and says how it ended; model,"
        " optimizer and position are restored (tests/unit/test_foreign.py)",
    ),
    (
        "test_early_stopping|test_terminate_on_nan|test_time_limit",
        "should_terminate|assert False|assert not",
        "asks for Ignite's flag should_terminate: here terminate() is a wish that the present step"
        " carries out (the handler itself is heard: tests/unit/test_ignite_table.py)",
    ),
    (
        "batch_size_scheduler",
        "BatchSizeScheduler cannot",
        "refused: a batch belongs to its step",
    ),
    (
        "",
        "does not follow torch's",
        "refused: Ignite's LRScheduler gives other rates than this scheduler of torch",
    ),
    (
        "",
        "needs data with a length",
        "a step has a place in an epoch: data without a length are refused",
    ),
    (
        "",
        "compares predictions with targets",
        "refused: a training step keeps no logits, trainer.evaluator has them",
    ),
    (
        "",
        "is attached already, and a checkpoint",
        "a checkpoint holds each handler's state under its name: two mocks, which have every"
        " method, cannot be told apart",
    ),
    (
        "test_terminate_epoch_events_sequence|test_terminate\\[",
        "assert False ==",
        "asks for Ignite's flags: terminate() and terminate_epoch() are wishes here, which the"
        " present step carries out (tests/unit/test_epochs.py compares the events)",
    ),
    (
        "test_terminate_at_start_of_epoch|test_terminate_events_sequence|test_engine_run_interrupt",
        "",
        "the step that begins is completed, evaluated and saved wherever terminate() or interrupt()"
        " is called; what follows it is fired, and a next run counts the epochs that are whole",
    ),
    (
        "test_terminate_stops_run_mid_epoch|test_engine_interrupt_restart",
        "",
        "at STARTED of a next run the state counts the epochs that are whole, and the run goes on"
        " from its step",
    ),
    (
        "test_engine_state_dict",
        "",
        "the state of a Trainer is its own: position, counters, interventions, the run and its end;"
        " keys of the user stand under 'user' (tests/unit/test_foreign.py)",
    ),
    (
        "test_reset_should_terminate|test_switch_termination_mode|test_engine_run_resume"
        "|epoch_length_mismatch",
        "",
        "a next run goes on to the limit that it is given: the state holds both limits, and is"
        " loaded with load_state_dict, not by assignment",
    ),
    (
        "test_engine_no_data|data_none|test_state_attributes",
        "",
        "a Trainer has a loader with a position, which the adapter makes of any data",
    ),
    (
        "test_run_asserts",
        "",
        "data without a batch are a DataError",
    ),
    (
        "test_run_handles_process_function_exception|test_custom_exception_handler|on_exception",
        "",
        "an error is heard by handlers of EXCEPTION_RAISED and raised, not swallowed",
    ),
    (
        "test__setup_engine|engine_ref_not_resolved|should_interrupt_error|test_memory_leak",
        "",
        "tests a part inside Ignite's engine: how it begins, holds references to itself, or yields",
    ),
)


def reason_for(test: str, error: str) -> str:
    """Return why a test cannot pass on a trainer; empty if nobody knows."""
    for name, message, reason in REASONS:
        if re.search(name, test) and re.search(message, error):
            return reason
    return ""


def download(cache: Path) -> Path:
    """Return the folder of the unpacked source distribution, without the package itself."""
    version = importlib.metadata.version("pytorch-ignite")
    folder = cache / f"pytorch_ignite-{version}"
    if not folder.exists():
        asked = f"pytorch-ignite=={version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
        subprocess.run([*command, ":all:", "--dest", str(cache), asked], check=True)
        with tarfile.open(next(cache.glob("pytorch_ignite-*.tar.gz"))) as archive:
            parts = [it for it in archive.getmembers() if "/tests/" in f"/{it.name}/"]
            archive.extractall(cache, members=parts, filter="data")
    return folder


def run_tests(folder: Path, part: str, engine: str, only: str) -> dict[str, tuple[str, str]]:
    """Run the tests of a part; return outcome and error by test."""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.json"
        environment = {**os.environ, RESULTS: str(results), ENGINE: engine}
        root = Path(__file__).parents[1]
        places = [str(root), str(root / "src"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "fault_injection.ignite_suite"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist", "--continue-on-collection-errors"]
        command += ["-m", "not distributed and not multinode_distributed and not tpu"]
        command += ["--rootdir", str(folder), f"tests/ignite/{part}"]
        command += ["-k", only] if only else []
        subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        loaded: dict[str, tuple[str, str]] = json.loads(results.read_text())
    return loaded


# ------------------------------------------------------------------ inside the process of the tests

_results: dict[str, tuple[str, str]] = {}


def pytest_configure() -> None:
    """Put a Trainer in the place of Ignite's engine before a test imports it."""
    if os.environ.get(ENGINE) != "trainer":
        return
    import ignite.contrib.engines.common
    import ignite.handlers
    import ignite.metrics

    trainer = _trainer_class()
    ignite.engine.Engine = ignite.engine.engine.Engine = trainer


def pytest_runtest_setup() -> None:
    """End a test that does not end."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"no end within {LONGEST} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LONGEST)


def pytest_runtest_teardown() -> None:
    """It has ended."""
    signal.alarm(0)


def pytest_runtest_logreport(report: Any) -> None:
    """Note the outcome of a test."""
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        error = crash.message if crash is not None else str(report.longrepr or "")
        _results[report.nodeid] = report.outcome, error[:600]


def pytest_sessionfinish() -> None:
    """Write the outcomes down."""
    if place := os.environ.get(RESULTS):
        Path(place).write_text(json.dumps(_results))


class _Batches:
    """Any data as a loader with a position: what lies before it is drawn and dropped."""

    def __init__(self, data: Iterable[Any] | None, length: int) -> None:
        self.data, self.length, self.step = data, length, 0

    def __len__(self) -> int:
        return self.length

    def set_position(self, epoch: int, step: int) -> None:
        self.step = step

    def __iter__(self) -> Iterator[Any]:
        batches = iter([None] * self.length if self.data is None else self.data)
        for _ in range(self.step):
            next(batches, None)
        self.step = 0
        yield from batches


def _trainer_class() -> type:
    from ignite.engine import Engine

    from fundamentallm.testing import UniformModel
    from fundamentallm.training.trainer import Trainer

    class EngineAsTrainer(Trainer):
        """A Trainer whose step calls a function of Ignite's kind."""

        def __init__(self, process_function: Any) -> None:
            Engine(process_function)  # its checks of the function
            super().__init__(UniformModel(2), _Batches(None, 1), device="cpu")
            self._function = process_function

        def _train_step(self, batch: Any) -> Any:
            return self._function(self, batch)

        def run(
            self,
            data: Any = None,
            max_epochs: int | None = None,
            max_iters: int | None = None,
            epoch_length: int | None = None,
        ) -> Any:
            """Run as a Trainer does; begin at 0 where Ignite's engine would: after a whole run."""
            known = self.state.epoch_length if self.state.iteration else None
            with contextlib.suppress(TypeError):
                known = known or len(data)
            length = epoch_length or known
            if length is None:
                raise ValueError("a Trainer needs data with a length, or epoch_length")
            done, goes_on = self.state.iteration, False
            if max_epochs is None and max_iters is None:
                goes_on = 0 < done < (self.total_steps or 0)  # after terminate(), to the old limit
                max_epochs = None if goes_on else 1
            if not goes_on and done >= (max_iters or (max_epochs or 1) * length):
                self.state.iteration = self.state.epoch = 0
            return super().run(_Batches(data, length), max_epochs, max_iters, length)

    return EngineAsTrainer


# ------------------------------------------------------------------ the command


def main() -> int:
    """Run both, print the table, return 1 if a failure has no reason."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "ignite_suite")
    parser.add_argument("--part", choices=PARTS, help="both if not given")
    parser.add_argument("--only", default="", help="a pattern of pytest's -k")
    parser.add_argument("--out", type=Path, help="write outcomes and errors here as JSON")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    folder = download(arguments.cache)
    unexplained, kept = 0, {}
    for part in [arguments.part] if arguments.part else PARTS:
        plain = run_tests(folder, part, "ignite", arguments.only)
        ours = run_tests(folder, part, "trainer", arguments.only)
        expected = [test for test, (outcome, _) in plain.items() if outcome == "passed"]
        failed = {test: ours.get(test, ("", "not run")) for test in expected}
        failed = {test: got for test, got in failed.items() if got[0] != "passed"}
        share = 1 - len(failed) / max(1, len(expected))
        print(
            f"{part}: {len(expected) - len(failed)} of {len(expected)} pass ({share:.1%});", end=""
        )
        others = Counter(outcome for outcome, _ in plain.values() if outcome != "passed")
        print(f" on Ignite's own engine {dict(others)} besides")
        for test, (_, error) in failed.items():
            reason = reason_for(test, error)
            unexplained += not reason
            name = test.rpartition("/")[2]
            print(f"  {name}\n      {reason or 'UNKNOWN: ' + error.splitlines()[0][:150]}")
        kept[part] = failed
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(kept, indent=1))
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
