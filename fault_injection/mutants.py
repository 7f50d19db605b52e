"""Change the program at random, one place at a time: its tests must notice.

    python -m fault_injection.mutants [--count 200] [--seed 0] [--out mutants.json]
        [--only PATH] [--numbers N ...]

A mutant is the program with one change in the training step, the loop, the decision of a step,
checkpoints, recovery, loaders or schedules: another comparison or arithmetic operator, another
constant, a condition or its part turned round, a statement left out, a value not returned.
`--count` of them are drawn among all places with equal chance; texts, annotations, messages of
errors and assertions are no places.

Each mutant is tried in a child of a process that has imported torch, in a copy of the program: the
tests of its module that run the changed function, quickest file first, until one fails. Which test
runs which function is measured once. A test that takes several times its time has failed as well.

The command fails when `MOST_SURVIVING` of the mutants or more survive, or when one survives that is
not explained in `mutants_explained.json`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import difflib
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis.configuration import set_hypothesis_home_dir

from fault_injection.guard import watch

ROOT = Path(__file__).parents[1]
PACKAGE = "src/fundamentallm"
EXPLAINED = Path(__file__).with_name("mutants_explained.json")
MOST_SURVIVING = 0.05
SLOWER = 4  # times its tests' processor time: the mutant goes round in circles
LEAST_SECONDS = 40
ADDRESSES = 8 << 30  # bytes that a mutant may take and do no harm
COPIED = ("src", "tests", "fault_injection", "configs", "examples", "docs")
COPIED_FILES = ("pyproject.toml", "README.md", "CHANGELOG.md")
PRELOADED = (
    "torch", "torch.nn.functional", "torch.utils.data", "torch.distributed", "ignite.engine",
    "ignite.handlers", "ignite.metrics", "numpy", "yaml", "pydantic", "safetensors.torch",
    "tokenizers", "hypothesis", "hypothesis.strategies", "tqdm", "tensorboardX",
)  # fmt: skip

STEP = (
    "test_precision",
    "test_step",
    "test_accumulation",
    "test_trainer",
    "test_agreeing",
    "handlers/test_nan_rollback",
)
LOOP = (
    "test_trainer", "test_agreeing", "test_interventions", "test_limits", "test_clock",
    "test_history",
    "test_events", "test_epochs", "test_foreign", "test_saving_before_evaluating",
    "test_ignite_contract",
    "handlers/test_firing_order", "handlers/test_checkpointing", "handlers/test_hooks",
    "handlers/test_evaluation", "handlers/test_nan_rollback",
)  # fmt: skip
CHECKPOINT = (
    "test_checkpoint", "test_finite", "test_store", "test_manifest", "test_checkpoint_catalogue",
    "test_portable", "test_scores", "test_snapshot", "test_state_tree", "test_tensor_file",
    "handlers/test_checkpointing",
    "handlers/test_saving_on_a_failing_disk", "handlers/test_asynchronous_saving",
)  # fmt: skip
RECOVERY = (
    "test_diagnosis", "test_incident", "test_outliers", "handlers/test_nan_rollback",
    "handlers/test_spikes",
)  # fmt: skip
LOADERS = (
    "test_loader", "test_mixture", "test_packing", "test_permutation", "test_data_examples",
    "test_prefetch", "test_global_batch", "test_limits",
)  # fmt: skip
SCHEDULES = ("test_schedulers", "handlers/test_schedule", "test_clock")
TESTS = {  # of a file or directory below the package
    "training/step.py": STEP,
    "training/decision.py": ("test_decision", *STEP),
    "training/loop.py": LOOP,
    "training/steering.py": LOOP,
    "training/trainer.py": LOOP,
    "training/dispatch.py": LOOP,
    "training/limits.py": ("handlers/test_schedule", *LOOP),
    "training/clock.py": LOOP,
    "training/checkpoint": CHECKPOINT,
    "training/handlers/checkpointing.py": (
        *CHECKPOINT,
        "test_saving_before_evaluating",
        "test_epochs",
    ),
    "training/recovery": RECOVERY,
    "training/recovery/data_faults.py": ("test_data_faults", "test_token_file", *LOOP),
    "training/handlers/nan_rollback.py": RECOVERY,
    "training/interventions.py": ("test_interventions", *RECOVERY),
    "data/loaders": LOADERS,
    "data/loaders/plain.py": ("test_foreign", *LOADERS),
    "training/schedulers.py": SCHEDULES,
    "training/handlers/schedule.py": SCHEDULES,
}

COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
ARITHMETIC: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,), ast.Mod: (ast.Add,), ast.Pow: (ast.Mult,), ast.BitOr: (ast.BitAnd,),
    ast.BitAnd: (ast.BitOr,), ast.BitXor: (ast.BitAnd,),
}  # fmt: skip
NO_PLACES = {"annotation", "returns", "body", "orelse", "finalbody", "handlers", "exc"}
LEFT_OUT = (ast.Expr, ast.AugAssign, ast.Raise, ast.Continue, ast.Break)
STORED = (ast.Attribute, ast.Subscript)
OPTIONS = (
    "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0", "-o", "addopts=",
    "-m", "not long", "-W", "ignore::pytest.PytestAssertRewriteWarning",
)  # fmt: skip
GONE = {"failed": True}
OWN_FAULT = 70  # an exit code that pytest has not
SAYING = {"warning", "info", "debug", "error", "warn", "print", "exception"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: below the root.
        function: qualified name of the innermost function or class, empty for the module.
        line: of the changed statement.
        first: first line of the innermost function, its decorators included; 0 outside of one.
        what: kind of the change.
        before: the statement as it was; of a compound statement its head.
        after: the same, changed.
        source: the whole changed file.
    """

    file: str
    function: str
    line: int
    first: int
    what: str
    before: str
    after: str
    source: str = field(repr=False)

    @property
    def diff(self) -> str:
        """Lines of the change, as of `diff -u`."""
        pair = self.before.splitlines(), self.after.splitlines()
        lines = list(difflib.unified_diff(*pair, n=0, lineterm=""))[2:]
        return "\n".join(line for line in lines if not line.startswith("@@"))


def changed_expressions(node: ast.AST) -> Iterator[str]:
    """Make each change inside a node, yield its kind, and take it back."""
    if isinstance(node, ast.Compare):
        for at, comparison in enumerate(node.ops):
            for other in COMPARISONS[type(comparison)]:
                node.ops[at] = other()
                yield "comparison"
            node.ops[at] = comparison
    if isinstance(node, ast.BinOp | ast.AugAssign):
        operator = node.op
        for other in ARITHMETIC.get(type(operator), ()):
            node.op = other()
            yield "arithmetic"
        node.op = operator
    if isinstance(node, ast.BoolOp):
        junction = node.op
        node.op = ast.Or() if isinstance(junction, ast.And) else ast.And()
        yield "condition"
        node.op = junction
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        test = node.test
        node.test = ast.UnaryOp(ast.Not(), test)
        yield "condition"
        node.test = test
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        node.value = not value if isinstance(value, bool) else value + 1
        yield "constant"
        node.value = value
    for name, part in ast.iter_fields(node):
        if name in NO_PLACES or isinstance(part, ast.JoinedStr):
            continue
        for child in part if isinstance(part, list) else [part]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.stmt):
                yield from changed_expressions(child)


def is_no_place(node: ast.stmt) -> bool:
    """Return whether a statement is left as it is: it only says, claims or imports something."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.dump(node.test)
    if not isinstance(node, ast.Expr):
        return isinstance(node, ast.Assert | ast.Import | ast.ImportFrom)
    if not isinstance(node.value, ast.Call):
        return isinstance(node.value, ast.Constant)
    name = node.value.func
    return getattr(name, "attr", getattr(name, "id", "")) in SAYING


def changes(body: list[ast.stmt], around: tuple[ast.stmt, ...] = ()) -> Iterator[Any]:
    """Make each change in a block and what it holds; yield statement, what is around it, kind."""
    for at, node in enumerate(body):
        if is_no_place(node):
            continue
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            for kind in changed_expressions(node):
                yield node, around, kind
            yield from changes(node.body, (*around, node))
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if (around and isinstance(node, LEFT_OUT)) or isinstance(target, STORED):
            body[at] = ast.copy_location(ast.Pass(), node)
            yield body[at], around, "statement left out"
            body[at] = node
        if isinstance(node, ast.Return) and not (
            node.value is None or (isinstance(node.value, ast.Constant) and not node.value.value)
        ):
            value = node.value
            node.value = ast.Constant(None)
            yield node, around, "returned value"
            node.value = value
        for kind in changed_expressions(node):
            yield node, around, kind
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        for block in [*blocks, *(handler.body for handler in getattr(node, "handlers", []))]:
            yield from changes(block, around)


def head(node: ast.stmt) -> str:
    """Return a statement as text, a compound one without its blocks."""
    if isinstance(node, ast.Try):
        return "try: ..."
    shown = copy.copy(node)
    if hasattr(shown, "body"):
        shown.body = [ast.Expr(ast.Constant(...))]
    if hasattr(shown, "orelse"):
        shown.orelse = []
    return ast.unparse(ast.fix_missing_locations(shown))


def mutants_of(file: str, numbers: set[int]) -> list[Mutant]:
    """Return the mutants of a file with these numbers."""
    text = (ROOT / file).read_text()
    tree = ast.parse(text)
    sound = {
        (node.lineno, node.col_offset): node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.stmt)
    }
    found = []
    for number, (node, around, what) in enumerate(changes(tree.body)):
        if number not in numbers:
            continue
        inner = around[-1] if around else None
        first = 0
        if isinstance(inner, ast.FunctionDef):
            first = min([inner.lineno, *(one.lineno for one in inner.decorator_list)])
        found.append(
            Mutant(
                file=file,
                function=".".join(one.name for one in around),
                line=node.lineno,
                first=first,
                what=what,
                before=head(sound[node.lineno, node.col_offset]),
                after=head(node),
                source=ast.unparse(ast.fix_missing_locations(tree)),
            )
        )
    return found


def draw(count: int, seed: int, only: str = "") -> list[Mutant]:
    """Draw mutants of the files whose path holds `only`, each with equal chance."""
    files = []
    for place in TESTS:
        path = ROOT / PACKAGE / place
        paths = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        files += [str(one.relative_to(ROOT)) for one in paths if only in str(one)]
    files = list(dict.fromkeys(files))
    every = [
        (file, number)
        for file in files
        for number, _ in enumerate(changes(ast.parse((ROOT / file).read_text()).body))
    ]
    drawn: dict[str, set[int]] = {file: set() for file in files}
    for file, number in random.Random(seed).sample(every, min(count, len(every))):
        drawn[file].add(number)
    print(f"{count} of {len(every):,} mutants of {len(files)} files, seed {seed}", flush=True)
    return [mutant for file in files for mutant in mutants_of(file, drawn[file])]


def files_testing(file: str) -> list[str]:
    """Return the test files of a file of the program."""
    below = file.removeprefix(f"{PACKAGE}/")
    place = max(
        (place for place in TESTS if below == place or below.startswith(f"{place}/")), key=len
    )
    names = TESTS[place]
    return [f"tests/unit/{name}.py" for name in names]


class Recorder:
    """A plugin of pytest: which test runs which function, and how long each takes.

    A function that runs while a fixture of a module or session is made belongs to all tests of the
    file.

    Args:
        sources: of the program; other functions are not looked at.
    """

    def __init__(self, sources: str) -> None:
        self.sources = sources
        self.tests: dict[str, dict[str, Any]] = {}
        self._of_files: dict[str, set[str]] = defaultdict(set)
        self._seen: set[str] = set()

    def trace(self, frame: Any, event: str, argument: Any) -> None:
        """Note the function that begins; for `sys.settrace`."""
        code = frame.f_code
        if code.co_filename.startswith(self.sources):
            self._seen.add(f"{code.co_filename[len(self.sources) :]}:{code.co_firstlineno}")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Begin a test."""
        self._seen = set()
        self.tests[nodeid] = {"seconds": 0.0, "failed": False}
        # Python takes a tracer away that raises, as one does at the deepest recursion.
        sys.settrace(self.trace)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        """Keep apart what a fixture of several tests runs."""
        before, self._seen = self._seen, set()
        yield
        if fixturedef.scope == "function":
            before |= self._seen
        else:
            self._of_files[request.node.nodeid.partition("::")[0]] |= self._seen
        self._seen = before

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add the time of one part of a test, and after the last one what it ran."""
        test = self.tests[report.nodeid]
        test["seconds"] += report.duration
        test["failed"] |= report.failed
        if report.when == "teardown":
            test["functions"] = self._seen

    def result(self) -> dict[str, dict[str, Any]]:
        """Return by test: seconds, whether it failed, and its functions."""
        for name, test in self.tests.items():
            of_file = self._of_files[name.partition("::")[0]]
            test["functions"] = sorted(test.get("functions", set()) | of_file)
        return self.tests


class Chooser:
    """A plugin of pytest: the order of the tests, their time limits, and the first that fails.

    Args:
        tests: what a `Recorder` found.
        function: that is changed, as the recorder writes it; empty where it is none.
    """

    def __init__(self, tests: dict[str, dict[str, Any]], function: str) -> None:
        self.tests = tests
        self.function = function
        self.killer = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep the tests that run the function, or all where none does; quickest file first."""
        sound = [item for item in items if not self.tests.get(item.nodeid, GONE)["failed"]]
        chosen = [
            item for item in sound if self.function in self.tests[item.nodeid]["functions"]
        ] or sound
        of_file: dict[str, float] = defaultdict(float)
        for item in chosen:
            of_file[str(item.path)] += self.tests[item.nodeid]["seconds"]
        items[:] = sorted(
            chosen,
            key=lambda item: (
                of_file[str(item.path)],
                str(item.path),
                self.tests[item.nodeid]["seconds"],
            ),
        )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Let the system end this process where a test takes too long."""
        signal.alarm(LEAST_SECONDS + int(SLOWER * self.tests[nodeid]["seconds"]))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note the test that noticed."""
        if report.failed and not self.killer:
            self.killer = report.nodeid


class Copy:
    """A copy of the program and its tests, in which a mutant is tried.

    Args:
        place: an empty directory.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.root = place / "program"
        for name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__", "*.ipynb")
            shutil.copytree(ROOT / name, self.root / name, ignore=ignored)
        for name in COPIED_FILES:
            shutil.copy(ROOT / name, self.root / name)
        self.tests: dict[str, dict[str, Any]] = {}
        self._changes = 0

    def write(self, file: str, text: str) -> None:
        """Write a file; compiled code of an earlier one of the same second is not taken for it."""
        path = self.root / file
        path.write_text(text)
        self._changes += 1
        os.utime(path, (self._changes, self._changes))

    def run(self, files: Sequence[str], plugin: Recorder | Chooser) -> tuple[int, Any]:
        """Run tests in a child; return the exit code, below 0 after a signal, and its report."""
        report = self.place / "report.json"
        report.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            code = OWN_FAULT
            try:
                self._become()
                watch(self.place, may_start=True)
                if isinstance(plugin, Recorder):
                    self._check_started()
                    threading.settrace(plugin.trace)
                stop = ["-x"] if isinstance(plugin, Chooser) else []
                code = int(pytest.main([*OPTIONS, *stop, *files], plugins=[plugin]))
                sys.settrace(None)
                found = plugin.result() if isinstance(plugin, Recorder) else plugin.killer
                report.write_text(json.dumps(found))
            except BaseException:
                report.write_text(json.dumps(traceback.format_exc()))
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it has started
        found = json.loads(report.read_text()) if report.exists() else None
        if code == OWN_FAULT:
            raise RuntimeError(f"the tests cannot be run: {found}")
        return code, found

    def _become(self) -> None:
        """Make of this process one that runs the copy."""
        os.setsid()
        os.chdir(self.root)
        temporary = self.place / "temporary"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name in ("TMPDIR", "XDG_CACHE_HOME", "HOME", "TORCHINDUCTOR_CACHE_DIR"):
            os.environ[name] = str(temporary)
        tempfile.tempdir = None
        set_hypothesis_home_dir(temporary)
        for name, value in os.environ.items():  # one that leads to the program leads to its copy
            os.environ[name] = value.replace(str(ROOT / "src"), str(self.root / "src"))
        os.environ["PYTHONPATH"] = str(self.root / "src")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False
        sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(self.place / "compiled")
        sys.path[:] = [str(self.root / "src"), str(self.root), *sys.path[1:]]
        for name in [name for name in sys.modules if name.startswith("fault_injection")]:
            del sys.modules[name]
        said = os.open(self.place / "said.txt", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for stream in (0, 1, 2):
            os.dup2(said, stream)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESSES, held + ADDRESSES))

    def _check_started(self) -> None:
        """Refuse surroundings in which a process that a test starts runs another program."""
        look = "import importlib.util as u; print(u.find_spec('fundamentallm').origin)"
        found = subprocess.check_output([sys.executable, "-c", look], text=True).strip()
        if not found.startswith(f"{self.root}/"):
            raise RuntimeError(f"a started Python imports {found}, not the copy {self.root}")

    def record(self, files: Sequence[str]) -> None:
        """Measure the tests of these files on the sound program."""
        code, tests = self.run(files, Recorder(f"{self.root}/"))
        if code not in (0, 1):
            said = (self.place / "said.txt").read_text()[-2000:]
            raise RuntimeError(f"the sound program cannot be tested: exit code {code}\n{said}")
        self.tests = tests

    def killer(self, mutant: Mutant) -> str:
        """Return what noticed a mutant, empty where it survives."""
        function = f"{mutant.file}:{mutant.first}" if mutant.first else ""
        files = files_testing(mutant.file)
        running = [
            file
            for file in files
            if any(
                function in test["functions"]
                for name, test in self.tests.items()
                if name.startswith(f"{file}::")
            )
        ]
        sound = (self.root / mutant.file).read_text()
        self.write(mutant.file, mutant.source)
        try:
            code, killer = self.run(running or files, Chooser(self.tests, function))
        finally:
            self.write(mutant.file, sound)
        if code == 0:
            return ""
        return killer or ("time" if code == -signal.SIGALRM else f"exit code {code}")


def explanations() -> dict[tuple[str, ...], str]:
    """Return why mutants survive that nothing can notice: by file, function and diff."""
    return {
        (one["file"], one["function"], one["diff"]): one["why"]
        for one in json.loads(EXPLAINED.read_text())
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Try the mutants of the command line; return 1 where too many survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="PATH", help="files whose path holds this")
    parser.add_argument("--numbers", type=int, nargs="+", help="of those drawn, only these")
    parser.add_argument("--out", type=Path, help="where a list in JSON is written")
    options = parser.parse_args(argv)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    drawn = draw(options.count, options.seed, options.only)
    chosen = options.numbers or range(len(drawn))
    explained = explanations()
    results: list[dict[str, Any]] = []
    started = time.monotonic()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        program = Copy(Path(scratch).resolve())
        program.record(sorted({file for n in chosen for file in files_testing(drawn[n].file)}))
        failing = [name for name, test in program.tests.items() if test["failed"]]
        print(f"{len(program.tests):,} tests in {time.monotonic() - started:.0f} s", flush=True)
        print(f"not used, since they fail on the sound program: {failing}", flush=True)
        for number in chosen:
            mutant, began = drawn[number], time.monotonic()
            killer = program.killer(mutant)
            why = explained.get((mutant.file, mutant.function, mutant.diff), "")
            results.append(
                {
                    "number": number,
                    **{k: v for k, v in dataclasses.asdict(mutant).items() if k != "source"},
                    "killed_by": killer,
                    "explained": why,
                    "seconds": round(time.monotonic() - began, 1),
                }
            )
            verdict = f"killed by {killer}" if killer else f"SURVIVED {why or 'unexplained'}"
            where = f"{mutant.file}:{mutant.line} {mutant.function} ({mutant.what})"
            took = results[-1]["seconds"]
            print(f"{number}: {verdict}, {took} s\n{where}\n{mutant.diff}\n", flush=True)
            if options.out:  # after each, for an hour's work may be stopped
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    survived = [one for one in results if not one["killed_by"]]
    unexplained = [one["number"] for one in survived if not one["explained"]]
    print(
        f"seed {options.seed}: {len(results)} mutants, {len(survived)} survived "
        f"({len(survived) / max(len(results), 1):.1%}), unexplained: {unexplained}; "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if unexplained or len(survived) >= MOST_SURVIVING * len(results) else 0


if __name__ == "__main__":
    sys.exit(main())
