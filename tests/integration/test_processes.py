"""What can only be seen from outside a process: signals, terminals, pipes, locales, ranks."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests import forked

from fundamentallm.engine.cli import main

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2}
training: {learning_rate: 1e-2, total_steps: 12, eval_steps: 4, log_steps: 1}
handlers: {tensorboard: false, samples: false}
plugins: [signals_at_step]
"""
# Sends the process a signal after a step, as exactly as nothing outside it could.
PLUGIN = """
import os
from ignite.engine import Events
from fundamentallm.training.handlers.progress import Progress

def send(trainer):
    for number in os.environ["SIGNALS"].split(","):
        os.kill(os.getpid(), int(number))

def attach(self, trainer, original=Progress.attach):
    original(self, trainer)
    if "AT_STEP" in os.environ:
        at = int(os.environ["AT_STEP"])
        trainer.add_event_handler(Events.ITERATION_STARTED(once=at), send)

Progress.attach = attach
"""
ENGINE = (sys.executable, "-m", "fundamentallm.engine")
OF_TIME = ("elapsed_seconds", "train/tokens_per_second", "train/samples_per_second")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG)
    Path("signals_at_step.py").write_text(PLUGIN)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of CONFIG that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copy(TEXT, folder / "text.txt")
    (folder / "tiny.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "tiny.yaml", "plugins=[]"]) == 0
    return folder / "runs" / "tiny"


def run(arguments: Sequence[str], **variables: str):
    """Start Python itself; `forked.run` saves the seconds of its imports."""
    return subprocess.run(
        [*ENGINE, *arguments],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=forked.SECONDS,
    )


def weights(run: Path | str) -> bytes:
    return (Path(run) / "checkpoints" / "step-00000012" / "model.safetensors").read_bytes()


def timeless(run: Path | str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in OF_TIME} for line in lines]


def val_losses(run: Path | str) -> list[float]:
    return [line["val/loss"] for line in timeless(run) if "val/loss" in line]


# ---------------------------------------------------------------------- help


HEAVY = ("torch", "numpy", "pydantic", "ignite", "safetensors", "tqdm", "yaml", "tensorboardX")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["trian"], ["run"]])
def test_help_and_typos_import_nothing_heavy(arguments):
    program = f"""
import sys
from fundamentallm.engine.cli import main
try:
    main({arguments!r})
except SystemExit as stopped:
    heavy = sorted(set(sys.modules) & set({HEAVY!r}))
    print("imported", heavy, "code", stopped.code)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert result.stdout.endswith(f"imported [] code {0 if '--help' in arguments else 2}\n")


def test_help_as_a_user_asks_for_it():
    result = run(["--help"])

    assert result.returncode == 0
    for command in ("run", "check", "evaluate", "generate"):
        assert re.search(rf"^ +{command} ", result.stdout, re.MULTILINE)
    assert result.stderr == ""


# ---------------------------------------------------------------------- signals


SIGNALS = [
    signal.SIGINT,
    signal.SIGTERM,
    pytest.param(signal.SIGHUP, marks=pytest.mark.long),
    pytest.param(signal.SIGUSR1, marks=pytest.mark.long),
]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_the_step_and_the_run_goes_on_to_the_same_end(whole, place, capsys, number):
    result = forked.run(["run", "tiny.yaml"], place, AT_STEP="6", SIGNALS=str(int(number)))

    assert result.returncode == 128 + number
    by = "Ctrl-C" if number == signal.SIGINT else f"signal {int(number)}"
    assert f"stopped by {by}, saved at step 6; the same command goes on: " in result.stderr
    assert "error" not in result.stderr
    assert "Traceback" not in result.stderr
    assert Path("runs/tiny/checkpoints/last").read_text() == "step-00000006\n"

    assert main(["run", "tiny.yaml", "plugins=[]"]) == 0

    assert "from step 6" in capsys.readouterr().err
    assert weights("runs/tiny") == weights(whole)
    assert timeless("runs/tiny") == timeless(whole)


def test_a_second_signal_ends_the_process_at_once(whole, place):
    result = forked.run(["run", "tiny.yaml"], place, AT_STEP="6", SIGNALS="2,15")

    assert result.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in result.stderr
    # Nothing was saved on the way out, and nothing that was saved is lost.
    assert Path("runs/tiny/checkpoints/last").read_text() == "step-00000004\n"


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_end(whole):
    result = run(["run", "tiny.yaml"], AT_STEP="6", SIGNALS="9")
    assert result.returncode == -signal.SIGKILL

    assert main(["run", "tiny.yaml", "plugins=[]"]) == 0

    assert weights("runs/tiny") == weights(whole)
    assert timeless("runs/tiny") == timeless(whole)


@pytest.mark.long
def test_a_signal_from_outside_is_heard(place):
    """The clock decides where it arrives; wherever that is, the run is saved there."""
    endless = ["training.total_steps=1000000", "training.eval_steps=1000000"]
    process = subprocess.Popen(
        [*ENGINE, "run", "tiny.yaml", *endless], stderr=subprocess.PIPE, text=True
    )
    try:
        metrics = Path("runs/tiny/metrics.jsonl")
        deadline = time.monotonic() + forked.SECONDS
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=forked.SECONDS)
    finally:
        process.kill()
        process.wait()

    assert process.returncode == 130
    step = int(re.search(r"saved at step (\d+);", error)[1])
    assert Path("runs/tiny/checkpoints/last").read_text() == f"step-{step:08d}\n"
    assert timeless("runs/tiny")[-1]["step"] == step


def test_a_signal_while_the_program_still_loads_is_no_traceback(place):
    # Imported in place of the real one, as everything in the working directory is by `-m`.
    Path("pydantic.py").write_text("import os\nos.kill(os.getpid(), 2)\nfor _ in range(9): pass\n")

    result = run(["run", "tiny.yaml"])

    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == "stopped by Ctrl-C"
    assert "Traceback" not in result.stderr


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux to look inside")
@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.5, 1.0])
def test_a_signal_from_outside_while_the_program_still_loads_is_no_traceback(place, seconds):
    process = subprocess.Popen(
        [*ENGINE, "run", "tiny.yaml", "training.total_steps=1000000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # Python's own start is not ours to answer for; the import of torch is.
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=forked.SECONDS)
    finally:
        process.kill()
        process.wait()

    assert process.returncode == 130, error
    assert error.splitlines()[-1].startswith("stopped by Ctrl-C")
    assert "Traceback" not in error


# ---------------------------------------------------------------------- terminals and pipes


def in_terminal(
    arguments: Sequence[str],
    dialogue: Sequence[tuple[bytes, bytes | signal.Signals]] = (),
    columns: int = 120,
) -> tuple[int, str]:
    """Run a command in a terminal of its own.

    Args:
        arguments: the command.
        dialogue: what to wait for, and what to type or which signal to send then.
        columns: the width of the terminal.

    Returns:
        Its exit code and what the terminal saw.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    variables = {"TERM": "dumb", "XDG_STATE_HOME": str(Path("state").resolve())}
    process = forked.Forked(arguments, [slave] * 3, {**os.environ, **variables})
    os.close(slave)
    rest = list(dialogue)
    seen, answered = b"", 0
    deadline = time.monotonic() + forked.SECONDS
    try:
        while time.monotonic() < deadline:
            if rest and rest[0][0] in seen[answered:]:
                answered = len(seen)
                _, answer = rest.pop(0)
                if isinstance(answer, bytes):
                    os.write(master, answer)
                else:
                    process.send_signal(answer)
            if not select.select([master], [], [], 0.2)[0]:
                continue
            try:
                data = os.read(master, 65536)
            except OSError:  # Linux reports a terminal whose last user has left this way
                break
            if not data:
                break
            seen += data
        return process.wait(), seen.decode()
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_a_terminal_sees_a_progress_bar():
    code, seen = in_terminal(["run", "tiny.yaml"])

    assert code == 0, seen
    assert "100%|" in seen
    assert "12/12" in seen
    assert re.search(r"12/12.*loss \d", seen)
    assert "step 8: validation loss" in seen
    assert "Done: 12 steps" in seen


@pytest.mark.parametrize("columns", [60, pytest.param(40, marks=pytest.mark.long)])
def test_a_narrow_terminal_shows_the_loss_and_no_torn_line_after_ctrl_c(
    place, monkeypatch, columns
):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("AT_STEP", "6")
    monkeypatch.setenv("SIGNALS", "2")
    code, seen = in_terminal(["run", "tiny.yaml"], columns=columns)

    assert code == 128 + signal.SIGINT, seen
    assert not re.search("\x1b\\[[0-9;]*m", seen)  # no colour
    frames = [frame for frame in re.split("[\r\n]", seen) if "%|" in frame]
    assert any("loss " in frame for frame in frames)
    if columns == 60:
        assert all("ETA " in frame for frame in frames if "loss " in frame)
    assert all(len(frame) <= columns - 3 for frame in frames)  # room for ^C in the same line
    line = re.search(r"[\r\n]([^\r\n]*)stopped by Ctrl-C, saved at step 6; the same command", seen)
    assert line is not None
    assert line[1] == ""  # at the beginning of a line, with no word before it


def test_no_terminal_sees_lines_and_no_bar(capsys):
    assert main(["run", "tiny.yaml", "plugins=[]", "handlers.progress.min_interval=0.0"]) == 0

    log = capsys.readouterr().err
    assert "%|" not in log
    assert "\r" not in log
    assert "step 12/12: loss" in log


def test_a_terminal_without_a_prompt_is_asked_for_one(whole):
    code, seen = in_terminal(
        ["generate", str(whole), "--max-tokens", "5"], [(b"> ", b"the \n"), (b"> ", b"\x04")]
    )

    assert code == 0, seen
    assert "Ctrl-D" in seen
    assert seen.count("the ") >= 2


def test_prompts_of_an_earlier_session_come_back(whole):
    pytest.importorskip("readline")
    ask = ["generate", str(whole), "--max-tokens", "5", "--stop", "zzz"]
    first, _ = in_terminal(ask, [(b"> ", b"hi then \n"), (b"> ", b"\x04")])
    again, seen = in_terminal(ask, [(b"> ", b"\x10\n"), (b"> ", b"\x04")])  # Ctrl-P

    assert (first, again) == (0, 0)
    assert seen.count("hi then ") >= 2
    history = Path("state/fundamentallm/prompts")
    assert "hi then " in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_a_text_and_not_the_session(whole):
    ask = ["generate", str(whole), "--max-tokens", "1000000"]
    code, seen = in_terminal(
        ask, [(b"> ", b"the \n"), (b"\nthe ", signal.SIGINT), (b"> ", b"\x04")]
    )

    assert code == 0, seen
    assert "Traceback" not in seen
    assert "stopped by" not in seen


def test_a_reader_that_leaves_is_no_traceback(whole):
    """As `... | head -1`: long output, and nobody there who reads it."""
    reading, writing = os.pipe()
    with Path(os.devnull).open() as nothing, Path("error.txt").open("w") as error:
        process = forked.Forked(
            ["generate", str(whole), "--max-tokens", "3000"],
            [nothing.fileno(), writing, error.fileno()],
            os.environ,
        )
    os.close(writing)
    assert select.select([reading], [], [], 60)[0]
    os.read(reading, 1)
    os.close(reading)

    assert process.wait(timeout=forked.SECONDS) in (0, 128 + signal.SIGPIPE)
    expected = r"reading \S+\nfrom \S+step-00000012 \(step 12\); validation loss [\d.]+\n"
    assert re.fullmatch(expected, Path("error.txt").read_text())


def test_a_run_whose_output_nobody_reads_still_finishes(place):
    reading, writing = os.pipe()
    os.close(reading)
    try:  # Python's own streams: how their last flush fails is the matter
        result = subprocess.run(
            [*ENGINE, "run", "tiny.yaml"],
            stdout=writing,
            stderr=writing,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": ""},  # buffered, as users have it
            timeout=forked.SECONDS,
        )
    finally:
        os.close(writing)

    assert result.returncode == 0
    assert Path("runs/tiny/checkpoints/last").read_text() == "step-00000012\n"


ACUTE = "\N{LATIN SMALL LETTER E WITH ACUTE}"
POETRY = f"\N{EM DASH} {ACUTE}t{ACUTE} \N{SNOWMAN}" * 100
POETIC = ("data.source=poetry.txt", "handlers.samples.num_tokens=20", "plugins=[]")


@pytest.mark.long
def test_a_locale_without_utf8_is_no_obstacle(place):
    # PYTHONUTF8=0 and PYTHONCOERCECLOCALE=0: or Python would choose UTF-8 by itself.
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    Path("poetry.txt").write_text(POETRY, encoding="utf-8")

    result = run(["run", "tiny.yaml", *POETIC], **plain)

    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    assert "It writes:" in result.stdout
    assert "Error" not in result.stderr
    sample = json.loads(Path("runs/tiny/samples.jsonl").read_text("utf-8").splitlines()[-1])
    assert not sample["text"].isascii()


class AsciiTerminal(io.TextIOWrapper):
    """Standard output that takes ASCII alone."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", errors="strict")

    def shown(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode("ascii")


def test_a_sample_is_shown_on_a_terminal_that_cannot_show_it(place, monkeypatch):
    Path("poetry.txt").write_text(POETRY, encoding="utf-8")
    terminal = AsciiTerminal()
    monkeypatch.setattr(sys, "stdout", terminal)

    assert main(["run", "tiny.yaml", *POETIC]) == 0

    assert "\\u2603" in terminal.shown().split("It writes:")[1]


@pytest.mark.parametrize("prompt", ["", ACUTE], ids=["empty", "acute"])
def test_text_is_generated_for_a_terminal_that_cannot_show_it(place, monkeypatch, prompt):
    Path("poetry.txt").write_text(POETRY, encoding="utf-8")
    assert main(["run", "tiny.yaml", *POETIC]) == 0
    terminal = AsciiTerminal()
    monkeypatch.setattr(sys, "stdout", terminal)

    assert main(["generate", "runs/tiny", "--max-tokens", "20", "--prompt", prompt]) == 0

    assert len(terminal.shown()) > 20


# ---------------------------------------------------------------------- ranks


def torchrun(arguments: Sequence[str], ranks: int = 2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, f"--nproc_per_node={ranks}", "-m", "fundamentallm.engine", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=forked.SECONDS,
    )


def test_two_ranks_learn_what_one_learns_with_accumulation(place):
    half = ["data.batch_size=2", "training.total_steps=8", "plugins=[]"]

    both = forked.run_ranks(["run", "tiny.yaml", *half, "--run-dir", "two"], place)

    assert [rank.returncode for rank in both] == [0, 0], [rank.stderr for rank in both]
    double = ["training.accumulation_steps=2", "--run-dir", "one"]
    assert main(["run", "tiny.yaml", *half, *double]) == 0
    assert len(val_losses("two")) == 2
    assert val_losses("two") == pytest.approx(val_losses("one"), rel=1e-6)
    assert [line["tokens"] for line in timeless("two")] == [
        line["tokens"] for line in timeless("one")
    ]
    assert ["run directory: two" in rank.stderr for rank in both] == [True, False]
    assert ["Done: 8 steps" in rank.stdout for rank in both] == [True, False]
    names = {path.name for path in Path("two/checkpoints").glob("step-*")}
    assert names == {"step-00000000", "step-00000004", "step-00000008"}


@pytest.mark.long
def test_two_ranks_stop_and_go_on_to_the_same_end():
    half = ["data.batch_size=2", "handlers.logs=true", "plugins=[]"]
    shape = [*half, "training.stop_after_seconds=1"]
    assert torchrun(["run", "tiny.yaml", *half, "--run-dir", "whole"]).returncode == 0

    paused = torchrun(["run", "tiny.yaml", *shape, "--run-dir", "cut"])
    assert paused.returncode == 0, paused.stderr
    assert Path("cut/checkpoints/last").read_text() == "step-00000001\n"
    again = torchrun(["run", "tiny.yaml", *half, "--run-dir", "cut"])

    assert again.returncode == 0, again.stderr
    assert weights("cut") == weights("whole")
    assert timeless("cut") == timeless("whole")


OWN_DISK = """
import os
from pathlib import Path
from ignite.engine import Events
from fundamentallm.training.handlers import HANDLERS

os.chdir(f"rank{os.environ['RANK']}")

@HANDLERS.register("shrink")
class Shrink:
    def attach(self, trainer):
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), self.shrink)

    def shrink(self, trainer):
        if os.environ["RANK"] == os.environ["FAULTY"]:
            os.truncate("out/all.tokens", os.path.getsize("out/all.tokens") // 2)
"""


@pytest.mark.long
@pytest.mark.parametrize("faulty", ["0", "1"])
def test_a_file_that_shrinks_under_one_of_two_ranks_ends_both_saved(place, monkeypatch, faulty):
    """Each rank reads a copy of its own, as on two machines."""
    assert main(["prepare", "text.txt", "--out", "rank0/out", "--tokenizer", "byte"]) == 0
    shutil.copytree("rank0", "rank1")
    Path("own_disk.py").write_text(OWN_DISK)
    monkeypatch.setenv("PYTHONPATH", f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    half = ["data.batch_size=2", "data.source=out", "plugins=[own_disk]"]

    def both_ranks(run_dir: str, *more: str):
        shape = [*half, *more, "--run-dir", str(place / run_dir)]
        return torchrun(["run", str(place / "tiny.yaml"), *shape])

    monkeypatch.setenv("FAULTY", faulty)
    spoiled = both_ranks("cut", "handlers.shrink=true")

    assert spoiled.returncode != 0
    assert spoiled.stderr.count("the token file changed while it was in use") == 2
    # torchrun reports the exit codes with a traceback, which holds no frame of ours.
    assert "fundamentallm/engine" not in spoiled.stderr
    assert re.findall(r"exitcode +: (\d+)", spoiled.stderr)[0] == "3"
    assert Path("cut/checkpoints/last").read_text() == "step-00000006\n"

    shutil.copy("rank" + ("1" if faulty == "0" else "0") + "/out/all.tokens", f"rank{faulty}/out")
    monkeypatch.setenv("FAULTY", "none")
    assert both_ranks("cut", "handlers.shrink=true").returncode == 0
    assert both_ranks("whole", "handlers.shrink=true").returncode == 0
    assert weights("cut") == weights("whole")
    assert timeless("cut") == timeless("whole")


@pytest.mark.long
def test_an_error_with_two_ranks_is_a_message_and_leaves_nothing(place):
    before = {path.name for path in place.iterdir()}

    result = torchrun(["run", "tiny.yaml", "data.source=nowhere.txt", "plugins=[]"])

    assert result.returncode != 0
    assert "nowhere.txt: no such file or folder" in result.stderr
    # torchrun itself reports the exit codes with a traceback; frames of ours are another matter.
    assert "fundamentallm/engine" not in result.stderr
    assert {path.name for path in place.iterdir()} - before <= {"__pycache__"}


@pytest.mark.parametrize(("world_size", "shut_down"), [("1", True), ("2", False)])
def test_a_rank_ends_without_shutting_the_interpreter_down(world_size, shut_down):
    script = (
        "import atexit; atexit.register(print, 'shut down');"
        "from fundamentallm.engine.cli import exit_process;"
        "print('written'); exit_process(3)"
    )
    environment = {**os.environ, "WORLD_SIZE": world_size}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 3
    assert done.stdout.splitlines() == ["written", *["shut down"] * shut_down]


def test_a_shutdown_does_not_look_through_what_torch_has_made():
    code = (
        "import atexit, gc;"
        "from fundamentallm.engine.cli import exit_process;"
        "atexit.register(lambda: print(len(gc.get_objects()) < 100, gc.get_freeze_count() > 5000));"
        "exit_process(3)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (3, "True True\n")
