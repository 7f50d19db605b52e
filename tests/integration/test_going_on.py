"""A run goes on with a larger budget, and with a changed configuration where the user says so.

Each row of the table says what becomes of a run; where it trains on, the weights are bitwise those
of a loop by hand that loads the checkpoint and has the new settings.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.nn import functional

from fundamentallm.compute.rng import restore_rng
from fundamentallm.config import load_config
from fundamentallm.data.loaders import Batching
from fundamentallm.data.sources import read_source
from fundamentallm.data.tokenizer import tokenizer_from_dict
from fundamentallm.engine import run as run_module
from fundamentallm.engine.cli import main
from fundamentallm.engine.wiring import assemble as assembly
from fundamentallm.models.build import build_model
from fundamentallm.reports.run_data import read_run
from fundamentallm.training.checkpoint.changes import CHANGES, records_in
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.checkpoint.tree import equal
from fundamentallm.training.trainer import Trainer

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2, dropout: 0.1}
training: {learning_rate: 1e-2, total_steps: 12, eval_steps: 4, log_steps: 2}
handlers: {tensorboard: false, samples: false, progress: false}
"""
ROWS = 56  # sequences of 16 of the training part, in an epoch
RUN = Path("runs/tiny")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG)
    return tmp_path


def press_ctrl_c(trainer: Trainer) -> None:
    signal.raise_signal(signal.SIGINT)


def crash(trainer: Trainer) -> None:
    raise ZeroDivisionError


def start(end: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a run that finishes, or ends at a step: `stopped 5`, `killed 7`."""
    kind, _, step = end.partition(" ")
    if kind == "finished":
        assert main(["run", "tiny.yaml", *words]) == 0
        return
    action = {"stopped": press_ctrl_c, "killed": crash}[kind]

    def assemble_and_end(*arguments: Any, **options: Any) -> assembly.Run:
        run = assembly.assemble(*arguments, **options)
        run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=int(step)), action)
        return run

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "assemble", assemble_and_end)
        if kind == "stopped":
            assert main(["run", "tiny.yaml", *words]) == 130
        else:
            with pytest.raises(ZeroDivisionError):
                main(["run", "tiny.yaml", *words])


# ---------------------------------------------------------------------- a loop by hand


@dataclass(frozen=True)
class ByHand:
    """What a loop by hand takes from the checkpoint to the end.

    Attributes:
        rate: of update k.
        last: the last step.
        rows: of a micro-batch.
        accumulation: micro-batches of a step.
        place: epoch and rows of it that were trained on; None: that of steps of 4 rows.
        group: options of both groups of the optimizer; `weight_decay` of the first.
        clip: the largest norm.
        smoothing: of the labels.
    """

    rate: Callable[[int], float] = lambda k: 1e-2
    last: int = 12
    rows: int = 4
    accumulation: int = 1
    place: tuple[int, int] | None = None
    group: dict[str, Any] = field(default_factory=dict)
    clip: float = 1.0
    smoothing: float = 0.0


def train_by_hand(checkpoint: Path, how: ByHand) -> nn.Module:
    """Load a checkpoint and train; nothing of the trainer is used but the order of the rows."""
    manifest, state = CheckpointStore(checkpoint.parent).load(checkpoint)
    config = load_config(Path("tiny.yaml"))
    sizes = manifest.metadata["config"]["model"]
    model = build_model(
        config.model.model_copy(
            update={"vocab_size": sizes["vocab_size"], "sequence_length": 16, "dropout": 0.1}
        )
    )
    model.load_state_dict(state["model"])
    model.train()
    saved = state["optimizer"]["param_groups"]
    names = [name for name, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    linear = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decay = [parameters[n] for n in names if n in linear or id(parameters[n]) in tied]
    others = [parameters[n] for n in names if not (n in linear or id(parameters[n]) in tied)]
    options = {"eps": 1e-8, "weight_decay": 0.01, "betas": (0.9, 0.999), **how.group}
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, **options},
            {"params": others, **options, "weight_decay": 0.0},
        ],
        fused=True,
    )
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    assert [len(group["params"]) for group in saved] == [len(decay), len(others)]
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
    tokenizer = tokenizer_from_dict(manifest.metadata["tokenizer"])
    source = read_source("text.txt")
    loader = source.loaders(tokenizer, config.data.split, Batching(16, 1, 1, config.seed), None)[0]
    assert len(loader) == ROWS
    epoch, done = how.place or divmod(manifest.step * 4, ROWS)
    restore_rng(state["random"]["rank 0"])
    for step in range(manifest.step + 1, how.last + 1):
        if done >= ROWS:
            epoch, done = epoch + 1, 0
        numbers = range(done, min(done + how.rows * how.accumulation, ROWS))
        done += how.rows * how.accumulation
        rows = [loader.window_at(epoch, number).micro_batches[0] for number in numbers]
        count = sum(row["target_ids"].numel() for row in rows)
        optimizer.zero_grad()
        for first in range(0, len(rows), how.rows):
            micro = rows[first : first + how.rows]
            inputs, targets = (
                torch.cat([row[key] for row in micro]) for key in ("input_ids", "target_ids")
            )
            loss = functional.cross_entropy(
                model(inputs).flatten(0, 1),
                targets.flatten(),
                reduction="sum",
                label_smoothing=how.smoothing,
            )
            (loss * (1 / count)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), how.clip)
        for group in optimizer.param_groups:
            group["lr"] = how.rate(step)
        optimizer.step()
    return model


def cosine(rate: float, warmup: int, last: int) -> Callable[[int], float]:
    return lambda k: rate * 0.5 * (1 + math.cos(math.pi * (k - warmup) / (last - warmup)))


# ---------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """A combination and its description.

    Attributes:
        end: how the run ended before: finished, stopped STEP, killed STEP.
        began: words that it was started with.
        now: words of the command that goes on.
        code: its exit code.
        says: what it prints, as a pattern.
        step: the step from which it goes on; None if it does not.
        by_hand: the loop that gives the same weights; None: they are not compared.
        keys: what is recorded as changed.
    """

    end: str
    now: list[str]
    began: list[str] = field(default_factory=list)
    code: int = 0
    says: str = ""
    step: int | None = None
    by_hand: ByHand | None = None
    keys: frozenset[str] = frozenset()


RATE, STEPS, BATCH = "training.learning_rate", "training.total_steps", "data.batch_size"
HALF = f"{RATE}=5e-3"
TABLE = {
    "more steps": Row(
        "finished",
        [f"{STEPS}=18"],
        says=r"continuing runs/tiny from step 12 with a larger budget \(training.total_steps: 12"
        r" in the run, 18 now\); the schedule linear_warmup does not depend on it",
        step=12,
        by_hand=ByHand(last=18),
        keys=frozenset({STEPS}),
    ),
    "more epochs": Row(
        "finished",
        ["training.num_epochs=2"],
        ["training.total_steps=null", "training.num_epochs=1"],
        says="a larger budget .training.num_epochs: 1 in the run, 2 now",
        step=14,
        by_hand=ByHand(last=28),
        keys=frozenset({"training.num_epochs"}),
    ),
    "more tokens": Row(
        "finished",
        ["training.max_tokens=1024"],
        ["training.total_steps=null", "training.max_tokens=512"],
        says="a larger budget .training.max_tokens: 512 in the run, 1024 now",
        step=8,
        by_hand=ByHand(last=16),
        keys=frozenset({"training.max_tokens"}),
    ),
    "steps in place of epochs": Row(
        "finished",
        [f"{STEPS}=16"],
        ["training.total_steps=null", "training.num_epochs=1"],
        says="another budget .training.total_steps: null in the run, 16 now",
        step=14,
        by_hand=ByHand(last=16),
        keys=frozenset({STEPS}),
    ),
    "a limit where none was": Row(
        "finished", ["training.max_tokens=100000"], says="is finished: the last step is done"
    ),
    "a schedule that depends on the steps": Row(
        "finished",
        [f"{STEPS}=24"],
        ["training.scheduler=cosine", "training.warmup_steps=2"],
        code=4,
        says="the schedule cosine depends on it.*training.total_steps: 12 in the run, 24 now"
        ".*--change",
    ),
    "that schedule, accepted": Row(
        "finished",
        [f"{STEPS}=24", "--change"],
        ["training.scheduler=cosine", "training.warmup_steps=2"],
        says="a larger budget .*the schedule cosine follows it",
        step=12,
        by_hand=ByHand(cosine(1e-2, 2, 24), last=24),
        keys=frozenset({STEPS}),
    ),
    "fewer steps, not yet done": Row(
        "stopped 5",
        [f"{STEPS}=8"],
        says="another budget .training.total_steps: 12 in the run, 8 now",
        step=5,
        by_hand=ByHand(last=8),
        keys=frozenset({STEPS}),
    ),
    "fewer steps, done": Row(
        "finished", [f"{STEPS}=10"], says="is finished: the last step is done"
    ),
    "another rate": Row(
        "stopped 5",
        [HALF, "--change"],
        says=r"change after step 5: training.learning_rate: 0.01 -> 0.005",
        step=5,
        by_hand=ByHand(lambda k: 5e-3),
        keys=frozenset({RATE}),
    ),
    "another rate, not accepted": Row(
        "stopped 5",
        [HALF, "--resume", "runs/tiny"],
        code=4,
        says="training.learning_rate: 0.01 in the run, 0.005 now.*accept the change with --change",
    ),
    "another rate, not accepted, by itself": Row(
        "stopped 5",
        [HALF],
        says="a new run starts in runs/tiny-2: runs/tiny has another configuration"
        r" \(training.learning_rate: 0.01 in the run, 0.005 now\); --change would go on with it",
    ),
    "another rate for a finished run": Row(
        "finished",
        [HALF, "--change"],
        says="finished.*total_steps=24 --resume runs/tiny --change",
    ),
    "another rate after a kill": Row(
        "killed 7",
        [HALF, "--change", "--resume", "runs/tiny"],
        says="continuing runs/tiny from step 4",
        step=4,
        by_hand=ByHand(lambda k: 5e-3),
        keys=frozenset({RATE}),
    ),
    "another schedule": Row(
        "stopped 5",
        ["training.scheduler=cosine", "training.warmup_steps=2", "--change"],
        says="training.scheduler: linear_warmup -> cosine",
        step=5,
        by_hand=ByHand(cosine(1e-2, 2, 12)),
        keys=frozenset({"training.scheduler", "training.warmup_steps"}),
    ),
    "other options of the optimizer": Row(
        "stopped 5",
        ["training.optimizer={name: adamw, betas: [0.8, 0.9], weight_decay: 0.5}", "--change"],
        says="training.optimizer: adamw -> ",
        step=5,
        by_hand=ByHand(group={"betas": (0.8, 0.9), "weight_decay": 0.5}),
        keys=frozenset({"training.optimizer", "training.optimizer_weight_decay"}),
    ),
    "another loss and clipping": Row(
        "stopped 5",
        [
            "training.loss={name: cross_entropy, label_smoothing: 0.1}",
            "training.max_grad_norm=0.5",
            "--change",
        ],
        says="training.max_grad_norm: 1.0 -> 0.5",
        step=5,
        by_hand=ByHand(smoothing=0.1, clip=0.5),
        keys=frozenset({"training.loss", "training.max_grad_norm"}),
    ),
    "a handler more": Row(
        "stopped 5",
        ["handlers.weight_ema={decay: 0.5}", "--change"],
        says="handlers.weight_ema: unset -> .*no state of the handler 'weight_ema'",
        step=5,
        by_hand=ByHand(),
        keys=frozenset({"handlers.weight_ema"}),
    ),
    "a handler less": Row(
        "stopped 5",
        ["handlers.spikes=false", "--change"],
        ["handlers.weight_ema={decay: 0.5}"],
        says="handlers.weight_ema: .* -> unset.*handler 'weight_ema' is not attached",
        step=5,
        by_hand=ByHand(),
        keys=frozenset({"handlers.weight_ema", "handlers.spikes"}),
    ),
    "without the handler that ended the run": Row(
        "finished",
        ["--change"],
        ["handlers.early_stopping={patience: 1, min_delta: 9.0}"],
        says="continuing runs/tiny from step 8",
        step=8,
        by_hand=ByHand(),
        keys=frozenset({"handlers.early_stopping"}),
    ),
    "another batch": Row(
        "stopped 5",
        [f"{BATCH}=6", "--change"],
        says="data.batch_size: 4 -> 6",
        step=5,  # 20 rows, of which the fourth step of 6 rows ends at 24
        by_hand=ByHand(rows=6, place=(0, 24)),
        keys=frozenset({BATCH}),
    ),
    "more accumulation": Row(
        "stopped 6",
        ["training.accumulation_steps=2", "--change"],
        says="training.accumulation_steps: 1 -> 2",
        step=6,
        by_hand=ByHand(accumulation=2, place=(0, 24)),
        keys=frozenset({"training.accumulation_steps"}),
    ),
    "another batch, whose epochs are the budget": Row(
        "stopped 5",
        [f"{BATCH}=8", "--change"],
        ["training.total_steps=null", "training.num_epochs=2"],
        step=5,  # 24 of 56 rows after the third step of 8: 4 more of that epoch, 7 of the next
        by_hand=ByHand(rows=8, place=(0, 24), last=5 + 4 + 7),
        keys=frozenset({BATCH}),
    ),
    "another batch, whose tokens are the budget": Row(
        "stopped 4",
        [f"{BATCH}=8", "--change"],
        ["training.total_steps=null", "training.max_tokens=1024"],
        step=4,  # 256 tokens are done, and a step has 128
        by_hand=ByHand(rows=8, place=(0, 16), last=4 + 6),
        keys=frozenset({BATCH}),
    ),
    "rate, batch and budget together": Row(
        "finished",
        [HALF, f"{BATCH}=2", f"{STEPS}=20", "--change"],
        says="a larger budget.*data.batch_size: 4 -> 2.*training.learning_rate: 0.01 -> 0.005",
        step=12,
        by_hand=ByHand(lambda k: 5e-3, rows=2, place=(0, 48), last=20),
        keys=frozenset({RATE, BATCH, STEPS}),
    ),
    "nothing, accepted": Row(
        "stopped 5", ["--change"], says="from step 5", step=5, by_hand=ByHand()
    ),
    "another model": Row(
        "stopped 5",
        ["model.d_model=32", "--change"],
        code=4,
        says="a run cannot change this.*model.d_model: 16 in the run, 32 now.*--resume never",
    ),
    "another tokenizer": Row(
        "stopped 5", ["data.tokenizer=byte", "--change"], code=4, says="data.tokenizer"
    ),
    "another optimizer": Row(
        "stopped 5",
        ["training.optimizer=sgd", "training.learning_rate=1", "--change"],
        code=4,
        says="training.optimizer: adamw in the run, sgd now.*model.init_from: RUN",
    ),
    "another seed": Row("stopped 5", ["seed=7", "--change"], code=4, says="seed.*model.init_from"),
    "without checkpoints": Row(
        "stopped 5", ["handlers.checkpointing=false", "--change"], code=4, says="checkpointing"
    ),
    "two contradicting words": Row(
        "finished", ["--change", "--resume", "never"], code=2, says="--resume never asks for a new"
    ),
}
QUICK = {"more steps", "a schedule that depends on the steps", "another rate", "another batch"}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=name, marks=() if name in QUICK else pytest.mark.long)
        for name, row in TABLE.items()
    ],
)
def test_a_combination_equals_its_description(row, monkeypatch, capsys):
    start(row.end, row.began, monkeypatch)
    checkpoint = None
    if row.step is not None:
        shutil.copytree(RUN / f"checkpoints/step-{row.step:08d}", f"kept/step-{row.step:08d}")
        checkpoint = Path(f"kept/step-{row.step:08d}")
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    capsys.readouterr()
    # What the run began with is in the file, as it would be of a user.
    keep = [w for w in row.began if not any(w.split("=")[0] == n.split("=")[0] for n in row.now)]
    dropped = [w for w in keep if w.split("=")[0].startswith("handlers.")]
    again = [w for w in keep if w not in dropped]

    assert main(["run", "tiny.yaml", *again, *row.now]) == row.code

    output = "".join(capsys.readouterr())
    assert re.search(row.says, output, re.DOTALL), output
    if row.step is None:
        assert {path: path.read_bytes() for path in before} == before
        return
    assert checkpoint is not None
    newest = RUN / "checkpoints" / (RUN / "checkpoints/last").read_text().strip()
    if row.by_hand is not None:
        assert newest.name == f"step-{row.by_hand.last:08d}"
        state = CheckpointStore(newest.parent).read(newest)
        for name, weight in train_by_hand(checkpoint, row.by_hand).state_dict().items():
            assert torch.equal(state["model"][name], weight), name
    metadata = json.loads((newest / "MANIFEST.json").read_text())["metadata"]
    found = metadata.get(CHANGES, [])
    assert {key for change in found for key, _, _ in change["differences"]} == set(row.keys)
    assert all(change["step"] == row.step for change in found)
    readme = (RUN / "README.md").read_text()
    for key in row.keys:
        assert f"| {row.step} | `{key}: " in readme
    marks = [mark.text for mark in read_run(RUN).marks if mark.kind == "change"]
    assert len(marks) == bool(row.keys)
    assert all(key in marks[0] for key in row.keys)


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["constant", "linear_warmup"])
def test_more_seconds_go_on_if_the_schedule_does_not_follow_the_clock(
    schedule, monkeypatch, capsys
):
    seconds = iter(range(10**6))
    monkeypatch.setattr(assembly, "seconds_since_start", lambda: float(next(seconds)))
    words = ["run", "tiny.yaml", f"{STEPS}=null", f"training.scheduler={schedule}"]
    assert main([*words, "training.max_seconds=20"]) == 0
    ended = (RUN / "checkpoints/last").read_text()
    seconds = iter(range(10**6))
    capsys.readouterr()

    follows = schedule != "constant"
    assert main([*words, "training.max_seconds=60"]) == (4 if follows else 0)

    said = capsys.readouterr().err
    assert "training.max_seconds: 20.0 in the run, 60.0 now" in said
    assert ("accept that with --change" in said) == follows
    assert ((RUN / "checkpoints/last").read_text() > ended) != follows
    if follows:
        assert main([*words, "training.max_seconds=60", "--change"]) == 0
        assert (RUN / "checkpoints/last").read_text() > ended


@pytest.mark.long
def test_a_changed_run_is_stopped_and_resumed_exactly(monkeypatch):
    """The same command, without --change, goes on to the same bits and keeps the record."""
    began = ["training.total_steps=null", "training.num_epochs=2", "training.scheduler=cosine"]
    start("stopped 5", began, monkeypatch)
    shutil.copytree(RUN, "whole")
    changed = [*began, f"{BATCH}=6", HALF, "training.optimizer_weight_decay=0.3"]
    assert main(["run", "tiny.yaml", *changed, "--run-dir", "whole", "--change"]) == 0
    start("stopped 9", [*changed, "--change"], monkeypatch)
    start("stopped 17", changed, monkeypatch)

    assert main(["run", "tiny.yaml", *changed]) == 0

    last = (RUN / "checkpoints/last").read_text().strip()
    stores = [CheckpointStore(run / "checkpoints") for run in (Path("whole"), RUN)]
    whole, cut = (store.load(store.directory / last) for store in stores)
    for part in ("model", "optimizer", "handlers", "random"):
        assert equal(cut[1][part], whole[1][part]), part
    for key in ("iteration", "epoch_length", "epochs_ended_early", "tokens_seen", "epoch_nll"):
        assert cut[1]["trainer"][key] == whole[1]["trainer"][key], key
    assert cut[0].metadata[CHANGES] == whole[0].metadata[CHANGES]
    assert [change["step"] for change in cut[0].metadata[CHANGES]] == [5]


@pytest.mark.long
def test_an_older_checkpoint_forgets_the_changes_that_came_after_it():
    keep = "training.keep_last=9"
    assert main(["run", "tiny.yaml", keep]) == 0
    assert main(["run", "tiny.yaml", keep, f"{STEPS}=16"]) == 0
    assert [mark.text for mark in read_run(RUN).marks] == [f"{STEPS}: 12 -> 16"]

    assert "## Changes" in (RUN / "README.md").read_text()
    older = str(RUN / "checkpoints/step-00000008")
    assert main(["run", "tiny.yaml", keep, "--resume", older]) == 0

    assert read_run(RUN).marks == ()
    assert "## Changes" not in (RUN / "README.md").read_text()


@pytest.mark.parametrize("junk", [3, [3], [{"step": "x", "differences": []}], [{"step": 1}]])
def test_what_is_no_record_of_a_change_is_left_out(junk):
    assert records_in(Manifest("x", 0, {}, {CHANGES: junk}, "")) == []
