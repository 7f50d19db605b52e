"""Fuzzing: thousands of files that nobody meant to write, each refused by a typed error at most.

    python -m fault_injection.fuzz [--yaml 40] [--checkpoints 40] [--tokenizers 40]
        [--incidents 20] [--examples 40] [--folders 20] [--cold 0] [--seed 0] [--full]

`--full` is what a release is held to: 30,000 files and twenty cold trials of each kind, within an
hour of one core. How far a series is stands on the terminal, and a failure as soon as it is found.

Each trial changes a sound file and gives it to the program: bytes are flipped, cut and repeated;
values of JSON are exchanged, removed and multiplied, and of a checkpoint the hashes are made right
again. What must hold in every trial: it ends well or by a `FundamentaLLMError`; no process is
started and no module of the place is imported; nothing is written outside the trial's directory; it
takes less than a GiB more than the parent and less than 20 seconds of a processor.

Trials are forked from a parent that has imported everything; `--cold N` repeats the first N of each
kind in a process of their own. A failure is printed with its number: the same seed and number make
the same file, and `--only KIND:NUMBER` repeats it with its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fault_injection.faults import scratch_directory, silent
from fault_injection.forge import Contents, forge
from fault_injection.guard import Breach, watch
from fault_injection.heal import make_incident
from fundamentallm.config import load_config
from fundamentallm.data.examples import encode_examples
from fundamentallm.data.sources import read_source
from fundamentallm.data.sources.examples import ExampleSource
from fundamentallm.data.tokenizer import ByteTokenizer, load_tokenizer
from fundamentallm.engine.cli import main as command_line
from fundamentallm.errors import FundamentaLLMError
from fundamentallm.models.build import check_model

CPU_SECONDS = 20
WALL_SECONDS = 240  # other programs may want the same cores
MOST_BYTES = 1 << 30
ADDRESSES = 8 << 30  # more than a trial may take, and less than would harm the machine
GOOD_CODES = (0, 2, 3, 4, 20)
SHOWN = 5
TELL_SECONDS = 60

TEXT = "the cat sat on the mat and the dog sat on the log, and so they sat. " * 40
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 4, split: [0.8, 0.2, 0.0]}
model: {d_model: 16, num_layers: 1, num_heads: 2}
training: {learning_rate: 1e-3, total_steps: 4, eval_steps: 2, log_steps: 2}
handlers: {tensorboard: false, samples: false, progress: false, weight_ema: {}, loss_ema: {}}
"""
START = """\
name: started
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {init_from: folder}
training: {total_steps: 1, eval_steps: 1}
handlers: {tensorboard: false, samples: false, progress: false}
"""
EXAMPLES = "".join(
    json.dumps({"prompt": f"what is {n} and {n}?", "response": f"it is {2 * n}"}) + "\n"
    for n in range(30)
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 255, 2**31, 2**32, 2**63, 10**18, 10**40, 0.5, -0.0, 1e308, 1e-320,
    "", "x", "\0", "\x1b[31m", "\udc80", "../../evil", "/etc/passwd", "evil", "x" * 20_000, "nan",
    [], {}, [[]], [None], ["x"], {"x": 1}, {"": {}}, {"$tensor": "x"}, {"$float": "nan"},
    {"$tuple": []}, {"$dict": [[1, 2]]}, {"name": "rotary", "base": 1e300}, {"name": "evil"},
)  # fmt: skip
LINES = (
    '!!python/object/apply:os.system ["touch ../evil"]',
    "!!python/name:os.system",
    "&a [*a, *a, *a]",
    "{<<: {a: 1}}",
    "[" * 3_000,
    "{a: " * 1_000,
    "1e999",
    "0x7fffffffffffffff",
    "9" * 5_000,
    "\t\t- ?",
    '"\\x00\\ud800"',
    "${HOME}",
    "2024-01-01",
    "~",
    "!!binary AAAA",
    "|\n  text",
    "? [complex, key]\n: 1",
    "%YAML 1.2\n---\n---",
)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one change somewhere inside, which may be at its top."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.04:
        return rng.choice(VALUES)
    key: Any = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    kind = rng.random()
    if kind < 0.68:
        copy[key] = mutated_json(copy[key], rng)
    elif kind < 0.78:
        del copy[key]
    elif kind < 0.88:
        copy[key] = rng.choice(VALUES)
    elif isinstance(copy, dict):
        copy[rng.choice(["x", "$tensor", "quantum", f"{key}_", key.upper()])] = rng.choice(
            [copy[key], *VALUES[:4]]
        )
    else:
        copy = copy * rng.choice([0, 2, 50])
    return copy


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to four damages."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice([1, 1, 2, 8, 64, 1024])
        kind = rng.randrange(6)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            del changed[at : at + length]
        elif kind == 2:
            changed[at:at] = rng.randbytes(length)
        elif kind == 3:
            changed[at:at] = changed[at : at + length] * rng.choice([1, 3, 100])
        elif kind == 4:
            changed[at : at + length] = b"\xff" * length
        elif at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutated_file(path: Path, rng: random.Random) -> None:
    """Change a file: as JSON where it is JSON, most of the time, else its bytes."""
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        value = json.loads(data)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            value = mutated_json(value, rng)
        data = json.dumps(value).encode()
    else:
        data = mutated_bytes(data, rng)
    path.write_bytes(data)


def mutated_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """Change one tensor of a file: its values, type or shape, or that it is there."""
    if not tensors:
        return
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    changes: list[Callable[[], Any]] = [
        lambda: tensors.pop(name),
        lambda: tensors.update({name + "x": tensor}),
        lambda: tensors.update({name: tensor.double()}),
        lambda: tensors.update({name: tensor.to(torch.float8_e4m3fn)}),
        lambda: tensors.update({name: tensor.to(torch.bool)}),
        lambda: tensors.update({name: tensor.flatten().contiguous()}),
        lambda: tensors.update({name: tensor[None].contiguous()}),
        lambda: tensors.update({name: tensor.flatten()[:0].clone()}),
        lambda: tensors.update({name: torch.full_like(tensor, -1)}),
        lambda: tensors.update({name: torch.zeros(3)}),
        lambda: tensors.update({name: tensor.flatten().repeat(200)}),
        lambda: tensors.update({name: torch.full(tensor.shape, float("nan"))}),
    ]
    rng.choice(changes)()


def mutated_checkpoint(path: Path, rng: random.Random) -> None:
    """Change a checkpoint, most of the time with hashes that are right again."""
    if rng.random() < 0.2:
        mutated_file(rng.choice(sorted(path.iterdir())), rng)
        return

    def change(contents: Contents) -> None:
        for _ in range(rng.choice([1, 1, 2, 3])):
            part = rng.random()
            if part < 0.45:
                found = mutated_json(contents.metadata, rng)
                contents.metadata = found if isinstance(found, dict) else {}
            elif part < 0.8:
                contents.skeletons = mutated_json(contents.skeletons, rng)
            else:
                mutated_tensors(rng.choice([contents.weights, contents.tensors]), rng)

    with contextlib.suppress(FundamentaLLMError, ValueError, OverflowError):  # cannot be written
        forge(path, change)


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Args:
        prepare: puts a changed one into the working directory.
        use: has the program read it; returns an exit code, or raises its errors.
    """

    prepare: Callable[[Path, random.Random], None]
    use: Callable[[random.Random], int]


def _yaml(material: Path, rng: random.Random) -> None:
    lines = CONFIG.splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        kind = rng.randrange(5)
        if kind == 0:
            key = lines[at].partition(":")[0]
            lines[at] = f"{key}: {rng.choice(LINES)}"
        elif kind == 1:
            head, comma, tail = lines[at].partition(",")
            lines[at] = head.rpartition(" ")[0] + " " + rng.choice(LINES) + comma + tail
        elif kind == 2:
            value = rng.choice(VALUES)
            lines.append(f"{rng.choice(['plugins', 'seed', 'x', 'model'])}: {json.dumps(value)}")
        elif kind == 3:
            lines.insert(at, rng.choice(LINES))
        else:
            changed = mutated_bytes(lines[at].encode("utf-8", "surrogatepass"), rng)
            lines[at] = changed.decode("latin-1")
    Path("run.yaml").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def _use_yaml(rng: random.Random) -> int:
    config = load_config(Path("run.yaml"))
    config.to_yaml()
    check_model(config.model)
    return 0


def _checkpoint(material: Path, rng: random.Random) -> None:
    shutil.copytree(material / "tiny", Path.cwd(), dirs_exist_ok=True)
    mutated_checkpoint(Path("runs/tiny/checkpoints/step-00000004"), rng)


def _use_checkpoint(rng: random.Random) -> int:
    words = rng.choice(
        [
            ["verify", "runs/tiny/checkpoints/step-00000004"],
            ["generate", "runs/tiny", "--prompt", "the", "--max-tokens", "3"],
            ["evaluate", "runs/tiny"],
            ["export", "runs/tiny", "--format", "torch", "--out", "out.pt"],
            ["export", "runs/tiny", "--format", "hf", "--out", "out"],
            ["run", "tiny.yaml", "training.total_steps=5", "--resume", "runs/tiny"],
        ]
    )
    return command_line(words)


def _tokenizer(material: Path, rng: random.Random) -> None:
    shutil.copytree(material / rng.choice(["tokens", "characters"]), "tokens")
    mutated_file(rng.choice(sorted(Path("tokens").iterdir())), rng)


def _use_tokenizer(rng: random.Random) -> int:
    tokenizer = load_tokenizer("tokens/tokenizer.json")
    with contextlib.suppress(FundamentaLLMError):
        tokenizer.decode(tokenizer.encode(TEXT[:200] + "a" * 200))
        tokenizer.decode(list(range(min(tokenizer.vocab_size, 300))))
    source = read_source("tokens")
    source.beginning(tokenizer)
    return 0


def _incident(material: Path, rng: random.Random) -> None:
    shutil.copytree(material / "incident", "incident")
    if rng.random() < 0.4:
        mutated_file(Path("incident/report.json"), rng)
    else:
        (evidence,) = Path("incident/evidence").glob("step-*")
        mutated_checkpoint(evidence, rng)


def _use_incident(rng: random.Random) -> int:
    return command_line(["replay", "incident"])


def _examples(material: Path, rng: random.Random) -> None:
    lines: list[bytes] = []
    for line in EXAMPLES.splitlines():
        if rng.random() < 0.1:
            changed = json.dumps(mutated_json(json.loads(line), rng)).encode()
            lines.append(changed if rng.random() < 0.5 else mutated_bytes(line.encode(), rng))
        else:
            lines.append(line.encode())
    data = b"\n".join(lines)
    Path("pairs.jsonl").write_bytes(mutated_bytes(data, rng) if rng.random() < 0.3 else data)


def _use_examples(rng: random.Random) -> int:
    source = read_source("pairs.jsonl", response_end=rng.choice(["\n", None, "###"]))
    assert isinstance(source, ExampleSource)
    encode_examples(source.examples, ByteTokenizer(end=rng.random() < 0.5), 64)
    return 0


def _folder(material: Path, rng: random.Random) -> None:
    shutil.copytree(material / "folder", "folder")
    Path("text.txt").write_text(TEXT)
    Path("start.yaml").write_text(START)
    mutated_file(rng.choice(sorted(Path("folder").iterdir())), rng)


def _use_folder(rng: random.Random) -> int:
    return command_line(["run", "start.yaml"])


KINDS = {
    "yaml": Kind(_yaml, _use_yaml),
    "checkpoints": Kind(_checkpoint, _use_checkpoint),
    "tokenizers": Kind(_tokenizer, _use_tokenizer),
    "incidents": Kind(_incident, _use_incident),
    "examples": Kind(_examples, _use_examples),
    "folders": Kind(_folder, _use_folder),
}
SAMPLE = {kind: 20 if kind in ("incidents", "folders") else 40 for kind in KINDS}
FULL = {
    "yaml": 10_000, "checkpoints": 10_000, "tokenizers": 5_000,
    "incidents": 2_000, "examples": 2_000, "folders": 1_000,
}  # fmt: skip
FULL_COLD = 20


def make_material(place: Path) -> None:
    """Make sound files of every kind, with the program's own commands."""
    for words in (
        ["run", "tiny.yaml"],
        ["prepare", "text.txt", "--out", "tokens", "--tokenizer", "bpe", "--vocab-size", "280"],
        ["prepare", "text.txt", "--out", "characters", "--tokenizer", "character"],
        ["export", "tiny/runs/tiny", "--format", "hf", "--out", "folder"],
    ):
        inside = place / "tiny" if words[0] == "run" else place
        inside.mkdir(exist_ok=True)
        (inside / "text.txt").write_text(TEXT)
        (inside / "tiny.yaml").write_text(CONFIG)
        before = Path.cwd()
        os.chdir(inside)
        code = command_line(words)
        os.chdir(before)
        if code != 0:
            raise RuntimeError(f"the sound files cannot be made: {' '.join(words)}")
    for older in (place / "tiny/runs/tiny/checkpoints").glob("step-0000000[0-3]"):
        shutil.rmtree(older)
    (place / "heal").mkdir()
    incident, _ = make_incident(place / "heal", 3)
    shutil.copytree(incident, place / "incident")


def trial(kind: str, number: int, seed: int, material: Path) -> str:
    """Do one trial in the working directory; return the fault, empty for none."""
    rng = random.Random(f"{seed} {kind} {number}")
    KINDS[kind].prepare(material, rng)
    Path("evil.py").write_text("open('../evil', 'w')\n")
    watch(Path.cwd())
    try:
        code = KINDS[kind].use(rng)
    except FundamentaLLMError as error:
        str(error)
        return ""
    except BaseException:
        return traceback.format_exc()
    return "" if code in GOOD_CODES else f"exit code {code}"


@contextlib.contextmanager
def trial_directory(scratch: Path) -> Iterator[Path]:
    """Yield a fresh directory in a directory of its own, to which nothing may be added."""
    outer = scratch / "trial"
    (outer / "in").mkdir(parents=True)
    try:
        yield outer / "in"
        if (added := {path.name for path in outer.iterdir()} - {"in"}) != set():
            raise Breach(f"written outside: {added}")
    finally:
        shutil.rmtree(outer)


def own_places(place: Path) -> dict[str, str]:
    """Return the variables by which programs and libraries keep their files inside a trial."""
    places = dict.fromkeys(("TMPDIR", "XDG_CACHE_HOME", "HOME"), str(place))
    # torch makes its own when it is imported: `place` itself would be made outside of `place`.
    return {**places, "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor")}


def forked(kind: str, number: int, seed: int, material: Path, place: Path) -> str:
    """Do one trial in a child of this process; return the fault, empty for none."""
    report = place.parent.parent / "report"
    return in_child(place, report, lambda: trial(kind, number, seed, material))


def in_child(place: Path, report: Path, work: Callable[[], str]) -> str:
    """Do some work in a child of this process, within limits of time and memory.

    Args:
        place: its working directory.
        report: a file through which the child tells what it found.
        work: returns the fault, empty for none.

    Returns:
        The fault, empty for none.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = os.fork()
    if not child:
        code = 1
        try:
            os.chdir(place)
            quiet = os.open(os.devnull, os.O_RDWR)
            output = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (0, 1, 2):
                os.dup2(quiet, stream)
            os.environ.update(own_places(place))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESSES, held + ADDRESSES))
            fault = work()
            os.write(output, fault.encode("utf-8", "backslashreplace"))
            code = 0
        except BaseException:
            os.write(output, traceback.format_exc().encode("utf-8", "backslashreplace"))
        finally:
            os._exit(code)
    started = time.monotonic()
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > WALL_SECONDS:
            os.kill(child, 9)
            os.wait4(child, 0)
            return f"more than {WALL_SECONDS} seconds"
        time.sleep(0.002)
    if status:
        ended = os.waitstatus_to_exitcode(status)
        return f"ended by {ended} (-24 is its time): {report.read_text()}"
    if (usage.ru_maxrss - before) * 1024 > MOST_BYTES:
        return f"{(usage.ru_maxrss - before) >> 10:,} MiB more than the parent"
    return report.read_text()


def cold(kind: str, number: int, seed: int, material: Path, place: Path) -> str:
    """Do one trial in a new process; return the fault, empty for none."""
    words = ["--trial", f"{kind}:{number}", "--seed", str(seed), "--material", str(material)]
    command = [sys.executable, "-m", "fault_injection.fuzz", *words]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]])
    done = subprocess.run(
        command,
        cwd=place,
        env={**os.environ, **own_places(place), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=WALL_SECONDS,
    )
    return "" if done.returncode == 0 else done.stderr[-2000:]


@dataclass
class Result:
    """What came of a series.

    Attributes:
        trials: how many there were, by kind.
        failures: kind:number and fault.
        slowest: the longest, in seconds on the wall.
        seconds: seconds on the wall by kind, forked and cold apart.
    """

    trials: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    slowest: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


def fuzz(
    counts: dict[str, int],
    seed: int = 0,
    num_cold: int = 0,
    only: Sequence[str] = (),
    tell: Callable[[str], object] = lambda line: None,
) -> Result:
    """Do so many trials of each kind; `tell` gets a line for a failure and one a minute."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    result = Result()
    with scratch_directory() as scratch, silent():
        material = scratch / "material"
        material.mkdir()
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            make_material(material)
        numbers = [(kind, n, forked) for kind, count in counts.items() for n in range(count)]
        numbers += [(kind, n, cold) for kind in counts for n in range(num_cold)]
        if only:
            pairs = [name.partition(":") for name in only]
            numbers = [(kind, int(number), forked) for kind, _, number in pairs]
        told = time.monotonic()
        for done, (kind, number, way) in enumerate(numbers):
            started = time.monotonic()
            if started - told > TELL_SECONDS:
                told = started
                tell(f"{done:,} of {len(numbers):,}, {len(result.failures)} failed")
            try:
                with trial_directory(scratch) as place:
                    fault = way(kind, number, seed, material, place)
            except Breach as error:
                fault = str(error)
            took = time.monotonic() - started
            result.slowest = max(result.slowest, took)
            name = f"cold {kind}" if way is cold else kind
            result.seconds[name] = result.seconds.get(name, 0.0) + took
            result.trials[kind] = result.trials.get(kind, 0) + 1
            if fault:
                result.failures.append((f"{kind}:{number}", fault))
                tell(f"{name}:{number} failed: {fault.splitlines()[-1][:200]}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the series of the command line; return 1 where one trial failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind, count in SAMPLE.items():
        parser.add_argument(f"--{kind}", type=int, default=count, metavar="N")
    parser.add_argument("--cold", type=int, default=0, metavar="N")
    parser.add_argument("--full", action="store_true", help="the counts of a release")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=(), metavar="KIND:NUMBER")
    parser.add_argument("--trial", default="", help=argparse.SUPPRESS)
    parser.add_argument("--material", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.trial:
        kind, _, number = options.trial.partition(":")
        fault = trial(kind, int(number), options.seed, options.material)
        print(fault, file=sys.stderr)
        return 1 if fault else 0
    counts = FULL if options.full else {kind: getattr(options, kind) for kind in SAMPLE}
    num_cold = FULL_COLD if options.full else options.cold
    started = time.monotonic()
    result = fuzz(
        counts, options.seed, num_cold, options.only, lambda line: print(line, file=sys.stderr)
    )
    for name, fault in result.failures[: None if options.only else SHOWN]:
        print(f"{name}: {fault}\n")
    done = ", ".join(f"{count:,} {kind}" for kind, count in result.trials.items())
    failed = [name for name, _ in result.failures]
    print("seconds: " + ", ".join(f"{kind} {took:.0f}" for kind, took in result.seconds.items()))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor = sum(one.ru_utime + one.ru_stime for one in used)
    print(f"{time.monotonic() - started:.0f} s on the wall, {processor:.0f} s of a processor")
    print(f"seed {options.seed}: {done}; slowest {result.slowest:.1f} s; failed: {failed}")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
