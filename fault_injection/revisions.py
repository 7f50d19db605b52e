"""Two revisions compute the same numbers: the same runs under both, compared to the last bit.

    python -m fault_injection.revisions --base REVISION [--head REVISION] [--case ...] [--quick]

Takes the base revision out of git into a temporary directory and runs each case under it and under
the head (default: the working tree as it is), at the same time, each in processes of its own with
one thread. Configurations and text are the same for both: the base's files, the built-in corpus,
and text made here from a seed. Nothing of either revision is imported: only the command line and
the files of a run are used, so the layout of the source may differ.

Compared are the exit codes, every line of metrics.jsonl and samples.jsonl without fields of time or
speed, what each incident decided, and the tensors of the last checkpoint (weights, moments,
averages, torch's random numbers) by name, type, shape and bytes. Prints one line a case and its
first differences; exits with 1 after a difference, or if a case left nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TAKEN_OUT = ("src", "configs", "examples/data")  # of a revision
SECONDS = 900  # until a command counts as hanging
SHOWN = 5  # differences of a case
# Generators that no configuration seeds: their state differs between two runs of one revision.
UNSEEDED = (".numpy.key", ".python.key")
DECIDED = ("step", "verdict", "bad_sequences", "window", "ledger")  # of an incident's report

ENGINE = ("-m", "fundamentallm.engine")
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL = ("training.log_steps=1", "handlers.progress=false", "handlers.tensorboard=false")


@dataclass(frozen=True)
class Case:
    """One run, the same under both revisions.

    Args:
        steps: how many it has.
        quick_steps: how many with `--quick`.
        words: what `run` is given; {base} stands for the base revision's files, {steps} and
            {half} for the number of steps and half of it.
        launcher: what starts the engine, behind the interpreter.
        before: commands that prepare the data.
    """

    steps: int
    quick_steps: int
    words: tuple[str, ...]
    launcher: tuple[str, ...] = ENGINE
    before: tuple[tuple[str, ...], ...] = ()

    def commands(self, base: Path, quick: bool) -> list[list[str]]:
        """Return the commands, each without the interpreter."""
        steps = self.quick_steps if quick else self.steps
        words = [word.format(base=base, steps=steps, half=steps // 2) for word in self.words]
        training = [f"training.total_steps={steps}", *SMALL, "--run-dir", "run"]
        preparing = [[*ENGINE, "prepare", *command] for command in self.before]
        return [*preparing, [*self.launcher, "run", *words, *training]]


PREPARED = ("--tokenizer", "byte", "--out")
CASES = {
    "nanogpt_cpu": Case(
        300,
        40,
        (
            "{base}/configs/nanogpt_cpu.yaml",
            "data.source=python-docs",
            "training.eval_steps={half}",
            "training.warmup_steps=20",
        ),
    ),
    "healing": Case(
        400,
        60,
        (
            "{base}/configs/healing.yaml",
            "data.source={base}/examples/data/tiny.txt",
            "training.eval_steps={half}",
        ),
    ),
    "mixture": Case(
        150,
        30,
        (
            "case.yaml",
            "data.sources=[{{path: documents, weight: 3}}, {{path: text, weight: 1}}]",
            "data.packing=document",
            "data.sequence_length=32",
            "model.normalization=rmsnorm",
            "model.positions=rotary",
            "model.feedforward=swiglu",
            "training.accumulation_steps=2",
            "training.eval_steps={half}",
            "handlers.weight_ema={{decay: 0.9}}",
        ),
        before=(
            ("documents.jsonl", *PREPARED, "documents", "--split", "document"),
            ("text.txt", *PREPARED, "text"),
        ),
    ),
    "finetuning": Case(
        150,
        30,
        (
            "case.yaml",
            "data.source=pairs.jsonl",
            "data.sequence_length=24",
            "training.optimizer=muon",
            "training.eval_steps={half}",
        ),
    ),
    "two_ranks": Case(
        80,
        20,
        (
            "case.yaml",
            "data.source=text.txt",
            "data.sequence_length=32",
            "training.accumulation_steps=2",
            "training.eval_steps={half}",
        ),
        launcher=(*TWO_RANKS, *ENGINE),
    ),
}
CASE_YAML = """\
name: case
seed: 7
data: {batch_size: 4}
model: {d_model: 32, num_layers: 2, num_heads: 2, dropout: 0.1}
training: {learning_rate: 3e-3, scheduler: cosine}
"""


def write_texts(place: Path, seed: int = 0) -> None:
    """Write the configuration and the text of the small cases, the same for the same seed."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 6))) for _ in range(60)]

    def sentence() -> str:
        return " ".join(chance.choices(words, k=chance.randint(3, 12))) + ".\n"

    documents = [{"text": "".join(sentence() for _ in range(6))} for _ in range(80)]
    pairs = [{"prompt": f"{word}: ", "response": word[::-1] + "\n"} for word in words]
    for name, records in (("documents.jsonl", documents), ("pairs.jsonl", pairs)):
        (place / name).write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (place / "text.txt").write_text("".join(sentence() for _ in range(400)), encoding="utf-8")
    (place / "case.yaml").write_text(CASE_YAML, encoding="utf-8")


# ---------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        lines: of the logs and incidents, by a name that tells where each stands.
        tensors: of the last checkpoint, by file and name: type, shape and bytes.
    """

    lines: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]

    def differences(self, other: Outcome) -> list[str]:
        """Return what is not the same, in the order of the run, in words."""
        found = []
        for name in [*self.lines, *(name for name in other.lines if name not in self.lines)]:
            own, theirs = (lines.get(name, "nothing") for lines in (self.lines, other.lines))
            if own != theirs:
                found.append(f"{name}: {difference(own, theirs)}")
        for name in sorted(self.tensors.keys() | other.tensors.keys()):
            own, theirs = self.tensors.get(name), other.tensors.get(name)
            if own is None or theirs is None:
                found.append(f"{name}: only in the {'head' if own is None else 'base'}")
            elif own != theirs:
                same_form = own[:2] == theirs[:2]
                forms = f"{own[0]} {own[1]} against {theirs[0]} {theirs[1]}"
                found.append(f"{name}: {'other bytes' if same_form else forms}")
        return found


def difference(own: Any, theirs: Any) -> str:
    """Return how two records differ, by their fields if they have some."""
    if isinstance(own, dict) and isinstance(theirs, dict):
        own, theirs = (
            {key: value for key, value in one.items() if key not in other or other[key] != value}
            for one, other in ((own, theirs), (theirs, own))
        )
    return f"{str(own)[:200]} against {str(theirs)[:200]}"


def read_outcome(run: Path) -> Outcome:
    """Read what a run left, without its fields of time and speed.

    Raises:
        FileNotFoundError: there is no log of metrics or no last checkpoint.
    """
    lines: dict[str, Any] = {}
    logs = [run / "metrics.jsonl", *run.glob("samples.jsonl")]
    for log in logs:
        for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
            lines[f"{log.name}:{number}"] = without_time(json.loads(line))
    for report in sorted(run.glob("incidents/*/report.json")):
        decided = json.loads(report.read_text(encoding="utf-8"))
        lines[report.parent.name] = {key: decided[key] for key in DECIDED if key in decided}
    last = run / "checkpoints" / (run / "checkpoints" / "last").read_text().strip()
    lines["last checkpoint"] = last.name
    tensors = {
        f"{file.name} {name}": tensor
        for file in sorted(last.glob("*.safetensors"))
        for name, tensor in read_tensors(file)
        if not name.endswith(UNSEEDED)
    }
    return Outcome(lines, tensors)


def without_time(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without its fields of time and speed."""
    return {
        key: value
        for key, value in record.items()
        if key != "elapsed_seconds" and not key.endswith(("_per_second", "mfu"))
    }


def read_tensors(file: Path) -> Iterable[tuple[str, tuple[str, tuple[int, ...], bytes]]]:
    """Yield name, type, shape and bytes of each tensor of a safetensors file."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, end = entry["data_offsets"]
            data = content[start + first : start + end]
            yield name, (entry["dtype"], tuple(entry["shape"]), data)


# ---------------------------------------------------------------------- runs


def take_out(revision: str, place: Path) -> Path:
    """Write the files of a revision into a new directory and return it."""
    place.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision, "--", *TAKEN_OUT],
        check=True,
        capture_output=True,
    )
    subprocess.run(["tar", "-x", "-C", str(place)], input=archive.stdout, check=True)
    return place


class Side:
    """One revision at work.

    Args:
        tree: its files; `src` is put on the path of its processes.
        place: a directory of its own for its runs.
    """

    def __init__(self, tree: Path, place: Path) -> None:
        self.tree = tree
        self.place = place
        place.mkdir()
        inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
        self.environment = inherited | {
            "PYTHONPATH": str(tree / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(place / "cache"),
        }
        found = self.start(place, ["-c", "import fundamentallm; print(fundamentallm.__file__)"])
        module = Path(found.communicate()[0].splitlines()[-1])
        if not module.is_relative_to(tree / "src"):
            raise RuntimeError(f"expected the package under {tree / 'src'}, got {module}")

    def start(self, directory: Path, command: Sequence[str]) -> subprocess.Popen[str]:
        """Start Python on this revision."""
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def compare(case: Case, name: str, sides: Sequence[Side], quick: bool) -> tuple[Outcome, list[str]]:
    """Run a case under both revisions; return what the base left and the differences."""
    places = [side.place / name for side in sides]
    for place in places:
        place.mkdir()
        write_texts(place)
    for command in case.commands(sides[0].tree, quick):
        pairs = zip(sides, places, strict=True)
        started = [side.start(place, command) for side, place in pairs]
        try:
            said = [process.communicate(timeout=SECONDS)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        codes = [process.returncode for process in started]
        if codes != [0, 0]:
            said = ["\n".join(text.splitlines()[-6:]) for text in said]
            failed = " ".join(command)
            return Outcome({}, {}), [f"exit codes {codes} of `{failed}`", *said]
    base, head = (read_outcome(place / "run") for place in places)
    return base, base.differences(head)


def run_trials(base: str, head: str | None, names: Iterable[str], quick: bool) -> bool:
    """Compare two revisions case by case, print what comes out, and tell whether all is equal."""
    equal = True
    with tempfile.TemporaryDirectory(prefix="revisions-") as scratch:
        trees = [
            take_out(base, Path(scratch, "base")),
            ROOT if head is None else take_out(head, Path(scratch, "head")),
        ]
        sides = [
            Side(tree, Path(scratch, f"runs-{number}")) for number, tree in enumerate(trees, 1)
        ]
        for name in names:
            outcome, found = compare(CASES[name], name, sides, quick)
            if not (outcome.tensors or found):
                found = ["nothing to compare"]
            print(
                f"{name}: {len(outcome.lines)} lines, {len(outcome.tensors)} tensors, "
                f"{len(found)} differences",
                flush=True,
            )
            for line in found[:SHOWN]:
                print(f"  {line}", flush=True)
            equal = equal and not found
    return equal


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and compare."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="the revision to be equal to")
    parser.add_argument("--head", help="the revision to test (default: the working tree)")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    options = parser.parse_args(arguments)
    return 0 if run_trials(options.base, options.head, options.case, options.quick) else 1


if __name__ == "__main__":
    sys.exit(main())
