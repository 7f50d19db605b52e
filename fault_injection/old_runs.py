"""Runs that an older revision has saved, and what it made of them: the present code does the same.

    python -m fault_injection.old_runs --revision REVISION --out tests/data/old_runs [--kind ...]

Takes the revision out of git and trains small runs with it that end at step 150 of 200, by a signal
or by a kill. Each is stored with its configuration and its text, and beside it, in expected.json,
what the same revision does with a copy: it resumes to the end (metric lines without fields of time
and speed, the order of the data, the final weights by tensor), verifies, evaluates, generates and
exports. `tests/integration/test_old_runs.py` has the present code do the same and compares.

Commands run in a process of their own by the name `fundamentallm.engine`; of either revision only
`fundamentallm.training.trainer.Trainer` is touched, to end a run at a step and to note its data.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_injection.revisions import ROOT, read_outcome, take_out

SAVED, KILLED, STEPS, STEPS_BY_CLOCK = 150, 158, 200, 170
SECONDS = 300  # until a process counts as hanging
# Which kernels compute a float32 sum decides its last bits, and processors choose other ones. With
# these every x86-64 processor that has FMA (which the C library's exp and log ask for) takes the
# same: torch's own for the plainest processor, MKL's reproducible branch, oneDNN's for SSE 4.1.
PINS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
GENERATED = ("--max-tokens", "40", "--seed", "3")


@dataclass(frozen=True)
class Kind:
    """One stored run.

    Args:
        config: what is particular about its configuration, by dotted key.
        is_killed: whether SIGKILL ended it some steps after its checkpoint; else SIGTERM in the
            step of the checkpoint.
        prepared: names of the texts that `prepare` turns into tokens of the same name.
    """

    config: Mapping[str, Any]
    is_killed: bool = False
    prepared: tuple[str, ...] = ()

    @property
    def last_step(self) -> int:
        """The step at which the resumed run ends; one under the clock is stopped there."""
        return STEPS_BY_CLOCK if "training.max_seconds" in self.config else STEPS


BUDGET = {"training.total_steps": STEPS}
KINDS = {
    "builtin": Kind({**BUDGET, "data.source": "python-docs"}, is_killed=True),
    "folder": Kind(
        {
            **BUDGET,
            "data.source": "texts",
            "model.normalization": "layernorm",
            "model.positions": "learned",
            "model.feedforward": "gelu",
            "model.dropout": 0.1,
            "training.accumulation_steps": 2,
        }
    ),
    "mixture": Kind(
        {
            **BUDGET,
            "data.sources": [{"path": "documents", "weight": 3}, {"path": "text", "weight": 1}],
            "data.packing": "document",
            "model.d_model": 8,
            "handlers.weight_ema": {"decay": 0.9},
        },
        is_killed=True,
        prepared=("documents.jsonl", "text.txt"),
    ),
    "finetuning": Kind(
        {**BUDGET, "data.source": "pairs.jsonl", "training.optimizer": "muon"},
    ),
    "max_tokens": Kind(
        {
            "data.source": "text.txt",
            "training.max_tokens": STEPS * 4 * 16,
            "training.scheduler": "cosine",
        },
        is_killed=True,
    ),
    "max_seconds": Kind(
        {
            "data.source": "text.txt",
            "training.max_seconds": 3_600,
            "training.scheduler": "cosine",
        }
    ),
}
CONFIG: dict[str, Any] = {
    "name": "old",
    "seed": 11,
    "data": {"sequence_length": 16, "batch_size": 4},
    "model": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32},
    "training": {
        "learning_rate": 1e-2,
        "eval_steps": SAVED,
        "eval_epochs": False,
        "log_steps": 10,
    },
    "handlers": {"progress": False, "tensorboard": False, "samples": False},
}


def write_inputs(place: Path, kind: Kind) -> None:
    """Write the configuration of a kind as JSON, which is YAML too, and the text that it names."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in kind.config.items():
        section, _, field = key.partition(".")
        config[section][field] = value
    (place / "run.yaml").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    chance = random.Random(5)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 5))) for _ in range(30)]

    def sentences(count: int) -> str:
        return "".join(" ".join(chance.choices(words, k=6)) + ".\n" for _ in range(count))

    texts = {
        "text.txt": sentences(120),
        "texts/a.txt": sentences(60),
        "texts/b.md": sentences(60),
        "documents.jsonl": "".join(json.dumps({"text": sentences(3)}) + "\n" for _ in range(40)),
        "pairs.jsonl": "".join(
            json.dumps({"prompt": f"{word}: ", "response": word[::-1] + "\n"}) + "\n"
            for word in words
        ),
        # The built-in text, as a Python of another patch release has it.
        "builtin/pydoc_data/__init__.py": "",
        "builtin/pydoc_data/topics.py": f"topics = {{'one': {sentences(120)!r}}}\n",
    }
    source = str(kind.config.get("data.source"))
    for name, text in texts.items():
        needed = name in kind.prepared or name.split("/")[0] == source
        if needed or (source == "python-docs" and name.startswith("builtin/")):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------- in a process of its own


def work(tree: Path, place: Path, steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Carry out commands in one new process with a revision's code.

    Args:
        tree: the revision's files.
        place: the directory to work in.
        steps: for each command its "words", and for one that is ended at a step the step under
            "end" and the signal's number under "by".

    Returns:
        for each the exit code, what it wrote to standard output and error, and the data of each
        step, as SHA-256; nothing after a kill.
    """
    inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    paths = [place / "builtin", tree / "src", ROOT]
    result = subprocess.run(
        [sys.executable, "-m", "fault_injection.old_runs", "--commands", json.dumps(list(steps))],
        cwd=place,
        env={
            **inherited,
            **PINS,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(place / "cache"),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if result.returncode == -signal.SIGKILL and steps[-1].get("by") == signal.SIGKILL:
        return []
    if result.returncode != 0:
        raise RuntimeError(f"exit code {result.returncode}: {result.stderr[-2_000:]}")
    told: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return told


def carry_out(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run commands of the engine one after the other, in this process."""
    from fundamentallm.training.trainer import Trainer

    build = Trainer.__init__
    current: dict[str, Any] = {}
    data: dict[int, str] = {}

    def watched(trainer: Any, *arguments: Any, **options: Any) -> None:
        build(trainer, *arguments, **options)
        watch(trainer, data, current.get("end"), current.get("by"))

    Trainer.__init__ = watched  # type: ignore[method-assign]
    told = []
    for step in steps:
        current.clear()
        current.update(step)
        data.clear()
        code: Any = 0
        said, complained = io.StringIO(), io.StringIO()
        sys.argv = ["fundamentallm", *step["words"]]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            try:
                runpy.run_module("fundamentallm.engine", run_name="__main__")
            except SystemExit as ended:
                code = ended.code
        told.append(
            {"code": code, "out": said.getvalue(), "err": complained.getvalue(), "data": dict(data)}
        )
    return told


def watch(trainer: Any, data: dict[int, str], end: int | None, by: int | None) -> None:
    """Note the ids that a model is trained on, and send this process a signal at a step."""
    from ignite.engine import Events
    from torch import nn

    embedding = next(m for m in trainer.model.modules() if isinstance(m, nn.Embedding))

    def note(module: Any, inputs: Any) -> None:
        if module.training:
            step = trainer.state.iteration
            ids = inputs[0].cpu().numpy().astype("<i8").tobytes()
            data[step] = hashlib.sha256(data.get(step, "").encode() + ids).hexdigest()[:16]

    embedding.register_forward_pre_hook(note)
    if end is not None:

        def leave() -> None:
            os.kill(os.getpid(), by or signal.SIGTERM)

        trainer.add_event_handler(Events.ITERATION_STARTED(once=end), leave)


# ---------------------------------------------------------------------- what is stored


def make(tree: Path, place: Path, kind: Kind) -> None:
    """Train a run to its checkpoint with a revision's code."""
    write_inputs(place, kind)
    prepared = [
        {"words": ["prepare", name, "--tokenizer", "character", "--out", name.partition(".")[0]]}
        for name in kind.prepared
    ]
    training = {
        "words": ["run", "run.yaml", "--run-dir", "run"],
        "end": KILLED if kind.is_killed else SAVED,
        "by": int(signal.SIGKILL if kind.is_killed else signal.SIGTERM),
    }
    told = work(tree, place, [*prepared, training])
    if not kind.is_killed and [one["code"] for one in told] != [0] * len(prepared) + [143]:
        raise RuntimeError(f"expected a run ended by a signal, got {told}")
    shutil.rmtree(place / "builtin", ignore_errors=True)
    for name in kind.prepared:
        (place / name).unlink()
    (place / "run" / ".lock").unlink(missing_ok=True)
    (place / "run" / "log.txt").unlink()
    for checkpoint in (place / "run" / "checkpoints").glob("step-*"):
        if checkpoint.name != f"step-{SAVED:08}":
            shutil.rmtree(checkpoint)  # as a person does who needs the space


def use(tree: Path, place: Path, kind: Kind, *, inexact: bool = False) -> dict[str, Any]:
    """Do everything with a stored run that a user can, and return what comes of it.

    Args:
        tree: the files of the revision to do it with.
        place: a copy of the stored directory; the run in it goes on.
        kind: of the run.
        inexact: resume also if a library has another version.
    """
    resume: dict[str, Any] = {
        "words": ["run", "run.yaml", "--resume", "run", *(["--allow-inexact"] * inexact)]
    }
    if "training.max_seconds" in kind.config:
        resume |= {"end": kind.last_step, "by": int(signal.SIGTERM)}
    asked = ["generate", "run", "--prompt", "a", *GENERATED]
    commands = {
        "verify": {"words": ["verify", "run"]},
        "evaluate": {"words": ["evaluate", "run", "--json"]},
        "greedy": {"words": [*asked, "--temperature", "0"]},
        "sampled": {"words": [*asked, "--temperature", "0.9", "--top-k", "8"]},
        "export": {"words": ["export", "run", "--format", "torch", "--out", "exported.pt"]},
        "resume": resume,
    }
    told = dict(zip(commands, work(tree, place, list(commands.values())), strict=True))
    outcome = read_outcome(place / "run")
    steps = told["resume"]["data"]
    return {
        "codes": {name: one["code"] for name, one in told.items()},
        "evaluate": json.loads(told["evaluate"]["out"].splitlines()[-1]),
        "greedy": told["greedy"]["out"],
        "sampled": told["sampled"]["out"],
        "exported": exported_tensors(place / "exported.pt"),
        "data": steps,
        "said": told["resume"]["err"],
        "lines": [
            line
            for name, line in outcome.lines.items()
            if name.startswith("metrics.jsonl") and line["step"] >= SAVED
        ],
        "weights": {
            name: f"{dtype} {list(shape)} {hashlib.sha256(content).hexdigest()}"
            for name, (dtype, shape, content) in outcome.tensors.items()
            if name.startswith("model.")
        },
    }


def exported_tensors(path: Path) -> dict[str, str]:
    """Return type, shape and SHA-256 of every tensor of a file of `export --format torch`."""
    import torch

    content = torch.load(path, weights_only=True)
    tensors = next(v for v in [content, *content.values()] if all(map(torch.is_tensor, v.values())))
    return {
        name: f"{str(tensor.dtype)[6:]} {list(tensor.shape)} "
        + hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the stored runs anew, or be the process that carries out commands."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--revision", help="the revision to make them with")
    parser.add_argument("--out", type=Path, help="the directory to write them to")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME")
    parser.add_argument("--commands", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.commands is not None:
        print("\n" + json.dumps(carry_out(options.commands)))
        return 0
    import torch

    with tempfile.TemporaryDirectory(prefix="old-runs-") as scratch:
        tree = take_out(options.revision, Path(scratch, "tree"))
        for name in options.kind:
            place, kind = Path(scratch, name), KINDS[name]
            place.mkdir()
            make(tree, place, kind)
            shutil.rmtree(place / "cache", ignore_errors=True)
            copy = shutil.copytree(place, Path(scratch, f"{name}-resumed"))
            expected = {
                "revision": options.revision,
                "torch": torch.__version__.partition("+")[0],
                "machine": platform.machine(),
                **use(tree, copy, kind),
            }
            text = json.dumps(expected, indent=1) + "\n"
            (place / "expected.json").write_text(text, encoding="utf-8")
            stored = options.out / name
            shutil.rmtree(stored, ignore_errors=True)
            shutil.copytree(place, stored)
            size = sum(file.stat().st_size for file in stored.rglob("*") if file.is_file())
            print(f"{name}: {size:,} bytes, {len(expected['lines'])} lines", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
