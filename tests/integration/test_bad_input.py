"""What a user can get wrong: one message that says what, where and how to mend it, and no harm."""

from __future__ import annotations

import errno
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests import forked
from tests.runs import trained

from fundamentallm.engine.cli import main
from fundamentallm.files.filesystem import Filesystem

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny
data:
  source: text.txt
  sequence_length: 16
  batch_size: 4
model: {d_model: 16, num_layers: 1, num_heads: 2}
training:
  learning_rate: 1e-2
  total_steps: 8
  eval_steps: 4
handlers: {tensorboard: false, samples: false, progress: false}
"""
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A directory with a finished run of CONFIG; tests take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(TEXT, folder / "text.txt")
    return trained(folder, CONFIG)


@pytest.fixture
def done(finished, place) -> Path:
    shutil.copytree(finished / "runs", place / "runs")
    return Path("runs/tiny")


@pytest.fixture
def refused(place, capsys):
    """Run a command that must fail; check the message, and that nothing was written."""

    def run(*arguments: str, code: int, says: tuple[str, ...]) -> str:
        capsys.readouterr()
        before = listing(place)
        assert main(list(arguments)) == code
        assert listing(place) == before
        captured = capsys.readouterr()
        assert captured.out == ""
        return checked_message(captured.err, says)

    return run


def listing(place: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in place.rglob("*"):
        status = path.lstat()
        if not path.is_dir():
            found[str(path)] = (status.st_size, status.st_mtime_ns)
        else:
            found[str(path)] = (0, 0)
    return found


def checked_message(stderr: str, says: tuple[str, ...]) -> str:
    """Return the one message on standard error; notes of the run may stand before it."""
    assert "Traceback" not in stderr
    starts = [match.start() for match in re.finditer(r"^error.*?: ", stderr, re.MULTILINE)]
    assert len(starts) == 1, stderr
    message = stderr[starts[0] :]
    for words in says:
        assert words in message, message
    return message


def error_cases(*cases: tuple) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("arguments", "code", "says"),
        [pytest.param(shlex.split(case[1]), *case[2:], id=case[0]) for case in cases],
    )


# ---------------------------------------------------------------------- configuration files


@error_cases(
    ("missing", "run nowhere.yaml", 2, ("nowhere.yaml",)),
    ("missing-check", "check nowhere.yaml", 2, ("nowhere.yaml",)),
    ("a-folder", "run .", 2, (".",)),
    ("below-a-file", "run text.txt/tiny.yaml", 2, ("text.txt/tiny.yaml",)),
    ("two-configs", "run tiny.yaml more.yaml", 2, ("more.yaml", "key=value")),
    ("not-an-override", "run tiny.yaml training.=3", 2, ("training.=3", "key=value")),
)
def test_a_config_that_is_not_there(refused, arguments, code, says):
    refused(*arguments, code=code, says=says)


# What is written instead of the first text in CONFIG, and what the message says.
FAULTS = {
    "empty": (CONFIG, "", ("bad.yaml", "empty")),
    "top-level-list": (CONFIG, "- a\n", ("bad.yaml:1", "a list")),
    "not-yaml": ("name: tiny", "name: [tiny", ("bad.yaml:", "not YAML")),
    "tab": ("  source", "\tsource", ("bad.yaml:3", "tab")),
    "not-utf8": ("name: tiny", "name: t\udcffny", ("bad.yaml", "UTF-8")),
    "unknown-top-key": ("model:", "modle:", ("bad.yaml:6: modle", "did you mean 'model'?")),
    "unknown-data-key": (
        "batch_size",
        "batch_sise",
        ("bad.yaml:5: data.batch_sise", "did you mean 'batch_size'?"),
    ),
    "unknown-model-key": (
        "d_model",
        "dmodel",
        ("bad.yaml:6: model.dmodel", "did you mean 'd_model'?"),
    ),
    "unknown-training-key": (
        "learning_rate",
        "lerning_rate",
        ("bad.yaml:8: training.lerning_rate", "did you mean 'learning_rate'?"),
    ),
    "unknown-handler": (
        "samples:",
        "sampels:",
        ("bad.yaml:11: handlers.sampels", "did you mean 'samples'?"),
    ),
    "unknown-handler-option": (
        "samples: false",
        "samples: {promt: A}",
        ("bad.yaml:11: handlers.samples.promt", "did you mean 'prompt'?"),
    ),
    "wrong-handler-option-type": (
        "samples: false",
        "samples: {num_tokens: many}",
        ("bad.yaml:11: handlers.samples.num_tokens", "integer", '"many"'),
    ),
    "handler-option-out-of-range": (
        "samples: false",
        "loss_ema: {beta: 7}",
        ("bad.yaml:11: handlers.loss_ema",),
    ),
    "handler-is-a-number": ("samples: false", "samples: 3", ("bad.yaml:11: handlers.samples",)),
    "duplicate-key": (
        "  eval_steps: 4",
        "  total_steps: 9",
        ("bad.yaml:10: training.total_steps", "twice", "lines 9 and 10"),
    ),
    "duplicate-top-key": ("handlers:", "name:", ("bad.yaml:11: name", "lines 1 and 11")),
    "nan": ("1e-2", ".nan", ("bad.yaml:8: training.learning_rate", "number is not finite")),
    "infinite": ("1e-2", ".inf", ("bad.yaml:8: training.learning_rate", "number is not finite")),
    "negative": ("1e-2", "-1e-2", ("bad.yaml:8: training.learning_rate", "above 0", "-0.01")),
    "zero": ("total_steps: 8", "total_steps: 0", ("bad.yaml:9: training.total_steps", "from 1")),
    "fraction": ("total_steps: 8", "total_steps: 8.5", ("bad.yaml:9: training.total_steps",)),
    "text-for-a-number": (
        "learning_rate: 1e-2",
        'learning_rate: "1e-2"',
        ("bad.yaml:8: training.learning_rate", "a number", "write 0.01"),
    ),
    "number-for-text": ("text.txt", "17", ("bad.yaml:3: data.source",)),
    "yes-for-true": (
        "eval_steps: 4",
        "compile: yes",
        ("bad.yaml:10: training.compile", "write true"),
    ),
    "no-value": (
        "eval_steps: 4",
        "eval_steps:",
        ("bad.yaml:10: training.eval_steps", "key has no value"),
    ),
    "a-section-that-is-a-number": (
        "model: {d_model: 16, num_layers: 1, num_heads: 2}",
        "model: 3",
        ("bad.yaml:6: model",),
    ),
    "heads-do-not-divide": (
        "num_heads: 2",
        "num_heads: 3",
        ("bad.yaml:6: model", "16", "3", "num_heads"),
    ),
    "warmup-too-long": (
        "eval_steps: 4",
        "warmup_steps: 8",
        ("bad.yaml:10: training.warmup_steps", "8", "remove warmup_steps"),
    ),
    "two-precisions": (
        "eval_steps: 4",
        "mixed_precision: true\n  precision: fp32",
        ("bad.yaml:10: training.mixed_precision", "disagree"),
    ),
    "two-seeds": (
        "  batch_size: 4",
        "  seed: 3\nseed: 4",
        ("bad.yaml:", "seed", "3", "4"),
    ),
    "unknown-optimizer": (
        "eval_steps: 4",
        "optimizer: adamww",
        ("bad.yaml:10: training.optimizer", "did you mean 'adamw'?"),
    ),
    "unknown-optimizer-option": (
        "eval_steps: 4",
        "optimizer: {name: adamw, beta: [0.9, 0.95]}",
        ("bad.yaml:10: training.optimizer.beta", "did you mean 'betas'?"),
    ),
    "optimizer-option-type": (
        "eval_steps: 4",
        "optimizer: {name: adamw, betas: [0.9]}",
        ("bad.yaml:10: training.optimizer.betas",),
    ),
    "optimizer-option-range": (
        "eval_steps: 4",
        "optimizer: {name: adamw, betas: [0.9, 1.5]}",
        ("bad.yaml:10: training.optimizer",),
    ),
    "optimizer-without-a-name": (
        "eval_steps: 4",
        "optimizer: {betas: [0.9, 0.95]}",
        ("bad.yaml:10: training.optimizer", "needs a name", "add name"),
    ),
    "unknown-scheduler": (
        "eval_steps: 4",
        "scheduler: cosin",
        ("bad.yaml:10: training.scheduler", "did you mean 'cosine'?"),
    ),
    "unknown-loss": (
        "eval_steps: 4",
        "loss: cross_entropi",
        ("bad.yaml:10: training.loss", "did you mean 'cross_entropy'?"),
    ),
    "loss-option-range": (
        "eval_steps: 4",
        "loss: {name: cross_entropy, label_smoothing: 2.0}",
        ("bad.yaml:10: training.loss",),
    ),
    "unknown-tokenizer": (
        "batch_size: 4",
        "tokenizer: charcter",
        ("bad.yaml:5: data.tokenizer", "did you mean 'character'?"),
    ),
    "unknown-norm": (
        "num_heads: 2",
        "normalization: rmsnrm",
        ("bad.yaml:6: model.normalization", "did you mean 'rmsnorm'?"),
    ),
    "unknown-device": (
        "eval_steps: 4",
        "device: gpu",
        ("bad.yaml:10: training.device", "gpu", "cuda"),
    ),
    "unknown-precision": (
        "eval_steps: 4",
        "precision: bf-16",
        ("bad.yaml:10: training.precision", "did you mean 'bf16'?"),
    ),
    "name-with-a-path": ("name: tiny", "name: ../tiny", ("bad.yaml:1: name",)),
    "split-beyond-1": (
        "batch_size: 4",
        "split: [0.9, 0.2, 0.0]",
        ("bad.yaml:5: data.split", "1.1"),
    ),
    "plugin-with-a-path": (
        "name: tiny",
        "plugins: [../evil.py]",
        ("bad.yaml:1: plugins", "../evil.py", "without .py or slashes"),
    ),
    "plugin-missing": (
        "name: tiny",
        "plugins: [no_such_plugin_here]",
        ("bad.yaml:1: plugins", "no_such_plugin_here", "not found"),
    ),
    "tag": ("name: tiny", "name: !!python/name:os.system tiny", ("bad.yaml:1", "tags")),
    "alias": ("name: tiny", "name: &a tiny", ("bad.yaml:1", "anchors")),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_fault_in_the_config(place, refused, command, fault):
    before, after, says = FAULTS[fault]
    assert before in CONFIG
    bad = CONFIG.replace(before, after, 1)
    Path("bad.yaml").write_bytes(bad.encode("utf-8", "surrogateescape"))

    refused(command, "bad.yaml", code=2, says=says)


@error_cases(
    ("unknown", "run tiny.yaml training.lr=1", 2, ("command line: training.lr=1",)),
    ("nan", "run tiny.yaml training.learning_rate=nan", 2, ("training.learning_rate=nan",)),
    ("text", "run tiny.yaml model.d_model=wide", 2, ("command line: model.d_model=wide", "wide")),
    ("below-a-value", "run tiny.yaml name.x=1", 2, ("command line: name.x=1",)),
    ("heads", "run tiny.yaml model.num_heads=5", 2, ("num_heads", "5", "16")),
)
def test_a_fault_in_an_override(refused, arguments, code, says):
    refused(*arguments, code=code, says=says)


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian", "tiny.yaml"],
        ["run"],
        ["run", "tiny.yaml", "--resum"],
        ["evaluate", "runs/tiny", "key=value"],
        ["generate", "runs/tiny", "--max-tokens", "many"],
        ["generate", "runs/tiny", "--temperature", "warm"],
    ],
)
def test_a_command_line_that_is_none(place, capsys, arguments):
    before = listing(place)

    with pytest.raises(SystemExit) as stopped:
        main(arguments)

    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err
    assert listing(place) == before


# ---------------------------------------------------------------------- text


TEXTS = {
    "missing": (None, ("bad.txt", "no such file or folder")),
    "empty": (b"", ("bad.txt", "no text", "0 characters")),
    "white-space": (b" \n\n\t", ("bad.txt", "only white space")),
    "too-short": (b"a b c", ("too short", "4 tokens", "at least 17", "data.sequence_length")),
    "latin-1": ("d\N{LATIN SMALL LETTER E WITH ACUTE}j\N{LATIN SMALL LETTER A WITH GRAVE} vu"
                .encode("latin-1"), ("bad.txt: byte 1", "0xe9", "UTF-8", "iconv")),
    "utf-16": ("text".encode("utf-16"), ("bad.txt", "UTF-16")),
    "gzip": (b"\x1f\x8b\x08\x00abc", ("bad.txt", "gzip", "unpack")),
    "nul": (b"text\x00text", ("bad.txt: byte 4", "NUL")),
}  # fmt: skip


@pytest.mark.parametrize("fault", TEXTS)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_text_that_cannot_be_used(place, refused, command, fault):
    data, says = TEXTS[fault]
    if data is not None:
        Path("bad.txt").write_bytes(data)

    message = refused(command, "tiny.yaml", "data.source=bad.txt", code=3, says=says)

    assert "fix:" in message


def test_a_folder_without_text(place, refused):
    Path("pictures").mkdir()
    Path("pictures/cat.jpg").write_bytes(b"\xff\xd8")

    refused("run", "tiny.yaml", "data.source=pictures", code=3, says=("pictures", ".txt", ".md"))


def test_a_folder_with_one_file_that_is_no_text_names_the_file(place, refused):
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("fine")
    Path("notes/b.txt").write_bytes(b"abc\xff")

    says = ("notes/b.txt: byte 3", "UTF-8")
    refused("run", "tiny.yaml", "data.source=notes", code=3, says=says)


def test_a_misspelt_source_is_guessed(refused):
    says = ("pyton-docs", "did you mean 'python-docs'?")
    refused("run", "tiny.yaml", "data.source=pyton-docs", code=3, says=says)


def test_a_pipe_is_no_text_and_nobody_waits_for_it(place, refused):
    os.mkfifo("pipe.txt")

    refused("run", "tiny.yaml", "data.source=pipe.txt", code=3, says=("pipe.txt", "pipe"))


@pytest.mark.skipif(IS_ROOT, reason="root may read everything")
def test_a_text_that_may_not_be_read(place, refused):
    Path("text.txt").chmod(0)

    refused("run", "tiny.yaml", code=3, says=("text.txt", "denied"))


# ---------------------------------------------------------------------- the machine


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_model_that_cannot_fit(refused, command):
    huge = ["model.d_model=65536", "model.num_layers=100", "model.num_heads=64"]

    says = ("model.d_model", "does not fit", "GiB", "at most", "lower model.d_model")
    refused(command, "tiny.yaml", *huge, code=2, says=says)


def test_a_gpu_that_is_not_there(refused, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    message = refused("run", "tiny.yaml", "training.device=cuda", code=5, says=("cuda",))

    assert "fix:" in message


def test_a_gpu_beyond_the_last(refused, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    refused("run", "tiny.yaml", "training.device=cuda:7", code=5, says=("cuda:7",))


@error_cases(
    ("evaluate", "evaluate runs/tiny --device gpu", 2, ("gpu", "cuda")),
    ("generate", "generate runs/tiny --device cuda:x", 2, ("cuda:x",)),
)
def test_a_device_that_does_not_exist(done, refused, arguments, code, says):
    refused(*arguments, code=code, says=says)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "RANK"])
def test_half_a_process_group(refused, monkeypatch, variable):
    monkeypatch.setenv(variable, "0" if variable == "RANK" else "2")

    refused("run", "tiny.yaml", code=5, says=("only in part", "torchrun"))


@pytest.mark.parametrize(("rank", "world_size"), [("0", "two"), ("x", "2"), ("2", "2"), ("0", "0")])
def test_a_process_group_that_makes_no_sense(refused, monkeypatch, rank, world_size):
    group = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in {**group, "MASTER_PORT": "29599"}.items():
        monkeypatch.setenv(name, value)

    refused("run", "tiny.yaml", code=5, says=("RANK",))


# ---------------------------------------------------------------------- places


def test_an_output_place_that_is_a_file(place, refused):
    Path("taken").write_text("mine")

    message = refused("run", "tiny.yaml", "--run-dir", "taken", code=4, says=("taken",))

    assert "fix:" in message


def test_a_runs_folder_that_is_a_file(place, refused):
    Path("runs").write_text("mine")

    refused("run", "tiny.yaml", code=5, says=("runs",))


def test_an_output_place_below_a_file(place, refused):
    refused("run", "tiny.yaml", "--run-dir", "text.txt/here", code=5, says=("text.txt",))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nobody may write")
def test_an_output_place_that_cannot_be_written(refused):
    refused("run", "tiny.yaml", "--run-dir", "/proc/fundamentallm", code=5, says=("/proc",))


def test_a_checkpoint_place_that_cannot_be_written(place, capsys):
    code = main(["run", "tiny.yaml", "training.checkpoint_dir=/proc/fundamentallm"])

    assert code == 4
    checked_message(capsys.readouterr().err, ("/proc/fundamentallm", "could not be saved"))


def test_a_disk_that_fills_up_keeps_the_earlier_checkpoints(place, capsys, monkeypatch):
    write = Filesystem.write

    def full_at_step_8(self, file, data):
        if "step-00000008" in str(file.name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        return write(self, file, data)

    monkeypatch.setattr(Filesystem, "write", full_at_step_8)

    assert main(["run", "tiny.yaml"]) == 4

    says = ("the disk is full", "step-00000008", "free space")
    checked_message(capsys.readouterr().err, says)
    left = {path.name for path in Path("runs/tiny/checkpoints").iterdir()}
    assert left == {"step-00000000", "step-00000004", "best", "last", "scores.jsonl"}
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert main(["run", "tiny.yaml"]) == 0
    assert "from step 4" in capsys.readouterr().err
    assert Path("runs/tiny/checkpoints/last").read_text() == "step-00000008\n"


def test_too_little_free_space_is_said_before_a_checkpoint_is_begun(place, capsys, monkeypatch):
    monkeypatch.setattr(Filesystem, "free_bytes", lambda self, directory: 1000)

    assert main(["run", "tiny.yaml"]) == 4

    says = ("the disk is full", "1,000 bytes free", "at least")
    checked_message(capsys.readouterr().err, says)
    assert list(Path("runs/tiny/checkpoints").iterdir()) == []


@pytest.mark.long
def test_a_limit_on_file_sizes_is_one_message(place):
    """The operating system's own refusal, in the middle of a write."""
    program = [sys.executable, "-m", "fundamentallm.engine", "run", "tiny.yaml"]
    limit = 20_000

    def only_small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = subprocess.run(
        program, preexec_fn=only_small_files, capture_output=True, text=True, timeout=forked.SECONDS
    )

    assert result.returncode == 4, result.stderr
    checked_message(result.stderr, ("could not be saved", "runs/tiny/checkpoints/step-00000004"))
    # Without the optimizer's moments, the first checkpoint is small enough.
    left = {path.name for path in Path("runs/tiny/checkpoints").iterdir()}
    assert left == {"step-00000000", "last"}


# ---------------------------------------------------------------------- going on with what is wrong


@error_cases(
    ("resume", "run tiny.yaml --resume nowhere", 4, ("nowhere", "no run or checkpoint")),
    ("resume-a-file", "run tiny.yaml --resume text.txt", 4, ("text.txt",)),
    ("resume-an-empty-folder", "run tiny.yaml --resume empty", 4, ("empty", "no checkpoint")),
    ("evaluate", "evaluate nowhere", 4, ("nowhere", "runs/")),
    ("generate", "generate nowhere", 4, ("nowhere", "runs/")),
    ("evaluate-an-empty-folder", "evaluate empty", 4, ("empty",)),
    ("evaluate-a-file", "evaluate text.txt", 4, ("text.txt",)),
    ("evaluate-a-pickle", "evaluate model.pt", 4, ("model.pt", "can run code")),
    ("generate-a-pickle", "generate model.pt", 4, ("model.pt", "can run code")),
)
def test_a_path_that_is_no_run(place, refused, arguments, code, says):
    Path("empty").mkdir()
    Path("model.pt").write_bytes(b"PK")

    refused(*arguments, code=code, says=says)


def test_the_run_directory_of_another_config(done, refused):
    says = ("runs/tiny", "model.d_model: 16 in the run, 32 now", "--resume never")
    refused("run", "tiny.yaml", "model.d_model=32", "--run-dir", "runs/tiny", code=4, says=says)


def test_a_fresh_start_in_a_directory_that_holds_a_run(done, refused):
    says = ("runs/tiny", "--run-dir")
    arguments = ["--run-dir", "runs/tiny", "--resume", "never"]
    refused("run", "tiny.yaml", *arguments, code=4, says=says)


@pytest.mark.parametrize("change", ["added", "other"])
def test_going_on_with_another_text(done, place, refused, change):
    text = TEXT.read_text()
    Path("text.txt").write_text(text + "." if change == "added" else text.upper())
    on = ["training.total_steps=10", "--resume", "runs/tiny"]

    says = (
        "text.txt",
        "differs from the one that the run started with",
        "SHA-256",
        "--resume never",
    )
    refused("run", "tiny.yaml", *on, code=4, says=says)


def test_going_on_by_itself_with_another_text(done, place, refused):
    shutil.rmtree(done / "checkpoints" / "step-00000008")
    Path("text.txt").write_text(TEXT.read_text() + ".")

    says = ("text.txt", "differs from the one that the run started with")
    refused("run", "tiny.yaml", code=4, says=says)


def test_going_on_with_another_tokenizer(done, refused):
    arguments = ["data.tokenizer=byte", "--resume", "runs/tiny"]

    says = ("data.tokenizer: character in the run, byte now",)
    refused("run", "tiny.yaml", *arguments, code=4, says=says)


def test_evaluating_with_a_changed_text(done, place, refused):
    Path("text.txt").write_text(TEXT.read_text() + ".")

    says = ("text.txt", "SHA-256", "--data")
    refused("evaluate", "runs/tiny", code=4, says=says)


@error_cases(
    ("missing", "evaluate runs/tiny --data nowhere.txt", 3, ("nowhere.txt",)),
    ("one-character", "evaluate runs/tiny --data one.txt", 3, ("one.txt", "at least 2")),
    ("foreign-characters", "evaluate runs/tiny --data greek.txt", 3, ("not in the vocabulary",)),
)
def test_evaluating_on_a_text_that_cannot_be_used(done, refused, arguments, code, says):
    Path("one.txt").write_text("a")
    Path("greek.txt").write_text("\N{GREEK SMALL LETTER ALPHA}\N{GREEK SMALL LETTER BETA}" * 9)

    refused(*arguments, code=code, says=says)


# ---------------------------------------------------------------------- damage


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


FILES = ["model.safetensors", "state.safetensors", "state.json", "MANIFEST.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_newest_checkpoint_is_passed_over_and_it_is_said(done, capsys, file):
    damage(done / "checkpoints" / "step-00000008" / file)

    assert main(["run", "tiny.yaml"]) == 0

    error = capsys.readouterr().err
    assert "from step 4" in error
    told = [line for line in error.splitlines() if line.startswith("warning: moved to")]
    assert len(told) == 1, error
    assert "corrupt: runs/tiny/checkpoints/step-00000008" in told[0]  # and why: its message
    assert Path("runs/tiny/checkpoints/corrupt/step-00000008").is_dir()
    assert Path("runs/tiny/checkpoints/last").read_text() == "step-00000008\n"
    assert main(["evaluate", "runs/tiny/checkpoints/step-00000008"]) == 0


def test_evaluate_passes_over_a_damaged_best(done, capsys):
    damage(done / "checkpoints" / "step-00000008" / "model.safetensors")

    assert main(["evaluate", "runs/tiny"]) == 0

    assert "step-00000004 (step 4)" in capsys.readouterr().out


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_damage_too(done, refused, file):
    (done / "checkpoints" / "step-00000008" / file).unlink()

    refused("evaluate", "runs/tiny/checkpoints/step-00000008", code=4, says=("step-00000008",))


def test_no_whole_checkpoint_is_an_error_that_names_each(done, refused):
    for step in ("00000000", "00000004", "00000008"):
        damage(done / "checkpoints" / f"step-{step}" / "model.safetensors")

    says = ("no usable checkpoint", "step-00000008", "step-00000004", "restore a copy")
    for arguments in (["run", "tiny.yaml"], ["evaluate", "runs/tiny"], ["generate", "runs/tiny"]):
        refused(*arguments, code=4, says=says)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("command", ["evaluate", "generate", "resume"])
def test_a_damaged_checkpoint_that_is_named_is_refused(done, refused, command, file):
    path = done / "checkpoints" / "step-00000004"
    damage(path / file)
    arguments = ["run", "tiny.yaml", "--resume"] if command == "resume" else [command]

    refused(*arguments, str(path), code=4, says=("step-00000004", file))


@pytest.mark.parametrize("pointer", [b"", b"step-00000099\n", b"../../elsewhere\n", b"\xff\x00"])
def test_a_stray_pointer_is_only_a_hint(done, capsys, pointer):
    for name in ("best", "last"):
        (done / "checkpoints" / name).write_bytes(pointer)

    assert main(["evaluate", "runs/tiny"]) == 0
    assert main(["run", "tiny.yaml"]) == 0

    out = capsys.readouterr().out
    assert "step-00000008" in out
    assert "finished" in out


# ---------------------------------------------------------------------- generating


@error_cases(
    ("no-tokens", "--max-tokens 0", 2, ("max_tokens", "at least 1")),
    ("negative-tokens", "--max-tokens -5", 2, ("max_tokens", "-5")),
    ("negative-temperature", "--temperature -1", 2, ("temperature", "-1")),
    ("nan-temperature", "--temperature nan", 2, ("temperature", "nan")),
    ("infinite-temperature", "--temperature inf", 2, ("temperature", "inf")),
    ("top-k-0", "--top-k 0", 2, ("top_k", "0")),
    ("top-p-0", "--top-p 0", 2, ("top_p", "0")),
    ("top-p-above-1", "--top-p 1.5", 2, ("top_p", "1.5")),
    ("top-p-nan", "--top-p nan", 2, ("top_p", "nan")),
    ("min-p-above-1", "--min-p 1.5", 2, ("min_p", "0 to 1", "1.5")),
    ("no-penalty", "--repetition-penalty 0", 2, ("repetition_penalty", "above 0")),
    ("an-empty-stop", "--stop ''", 2, ("stop", "not empty")),
    ("no-samples", "--num-samples 0", 2, ("num_samples", "at least 1")),
    ("a-seed-too-large", "--seed 99999999999999999999999", 2, ("seed",)),
    ("a-foreign-prompt", "--prompt \N{GREEK SMALL LETTER PI}", 3, ("not in the vocabulary",)),
)
def test_generate_options_out_of_range(done, refused, arguments, code, says):
    refused("generate", "runs/tiny", *arguments, code=code, says=says)


# ---------------------------------------------------------------------- debugging


def test_debug_shows_the_traceback(place):
    from fundamentallm.errors import ConfigError

    with pytest.raises(ConfigError):
        main(["run", "nowhere.yaml", "--debug"])
