"""Checkpoints and incidents with right hashes and wrong contents: refused by name, at little cost.

They come from other versions, from programs of a user, or from a stranger.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_injection.forge import Contents, forge
from fault_injection.heal import make_incident
from tests.runs import trained

from fundamentallm.engine.cli import main

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2}
training: {total_steps: 4, eval_steps: 2, log_steps: 2}
handlers: {tensorboard: false, samples: false, progress: false, weight_ema: {}}
"""
MOST_SECONDS = 20
MOST_BYTES = 1 << 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(TEXT, folder / "text.txt")
    return trained(folder, CONFIG)


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only checkpoint of a run in the working directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    checkpoints = Path("runs/tiny/checkpoints")
    for older in ("step-00000000", "step-00000002"):
        shutil.rmtree(checkpoints / older, ignore_errors=True)
    for pointer in ("best", "last"):
        (checkpoints / pointer).unlink(missing_ok=True)
    return checkpoints / "step-00000004"


@pytest.fixture(autouse=True)
def _costs_little(capsys: pytest.CaptureFixture[str]) -> Any:
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.process_time()
    yield
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert (after.ru_maxrss - before.ru_maxrss) * 1024 < MOST_BYTES
    assert time.process_time() - started < MOST_SECONDS


Change = Callable[[Contents], object]


def model(**fields: Any) -> Change:
    return lambda it: it.metadata["config"]["model"].update(fields)


def metadata(**fields: Any) -> Change:
    return lambda it: it.metadata.update(fields)


def state(**parts: Any) -> Change:
    return lambda it: it.skeletons["state"].update(parts)


def config(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda it: change(it.metadata["config"])


FORGED: dict[str, Change] = {
    "a key of a later version": config(lambda it: it.update(quantum=True)),
    "a key of a later model": model(experts=8),
    "a section that is no table": config(lambda it: it.update(training=[1])),
    "a component that is no component": model(normalization=7),
    "a configuration that is a list": metadata(config=[1, 2]),
    "a tokenizer that is a text": metadata(tokenizer="character"),
    "a tokenizer of nothing": metadata(tokenizer={"type": "character"}),
    "data that is a list": metadata(data=["x"]),
    "a response end that is a number": metadata(data={"sha256": "0", "response_end": 5}),
    "a validation loss that is a word": metadata(val_loss="low"),
    "versions that are a list": metadata(versions=["torch"]),
    "handlers that are a list": state(handlers=[1]),
    "a handler's state that is a number": state(handlers={"weight_ema": 5}),
    "averages that are a list": state(handlers={"weight_ema": {"averages": [1]}}),
    "averages of unknown weights": state(handlers={"weight_ema": {"averages": {"x": 1.0}}}),
    "a second model": state(model={}),
    "a larger vocabulary": model(vocab_size=10**9),
    "2^31 positions": model(sequence_length=2**31),
    "10^15 positions": model(sequence_length=10**15),
    "a billion layers": model(num_layers=10**9),
    "a width of 10^12": model(d_model=10**12),
    "a hidden width of 10^15": model(d_ff=10**15),
    "a tokenizer that is larger than the model": metadata(
        tokenizer={"type": "byte"},
    ),
}


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_checkpoint_that_says_what_it_cannot_mean_is_refused(checkpoint, capsys, change, command):
    if change is FORGED["2^31 positions"]:
        # The two lengths of a configuration are one.
        forge(checkpoint, config(lambda it: it["data"].update(sequence_length=2**31)))
    if change is FORGED["10^15 positions"]:
        forge(checkpoint, config(lambda it: it["data"].update(sequence_length=10**15)))
    forge(checkpoint, change)
    extra = ["--prompt", "a", "--max-tokens", "2"] if command == "generate" else []
    assert main([command, "runs/tiny", *extra]) in (2, 3, 4)
    assert capsys.readouterr().err.startswith("reading runs/tiny\nerror: ")


def test_verify_says_which_key_is_unknown(checkpoint, capsys):
    forge(checkpoint, FORGED["a key of a later model"])
    assert main(["verify", "runs/tiny"]) == 4
    said = capsys.readouterr()
    assert "model.experts: unknown key 'experts'" in said.out + said.err


def moments(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda it: it.tensors.update(
        {
            name: change(tensor)
            for name, tensor in it.tensors.items()
            if name.endswith("exp_avg") and tensor.ndim == 2
        }
    )


RESUMED: dict[str, Change] = {
    "no configuration": lambda it: it.metadata.pop("config"),
    "no tokenizer": lambda it: it.metadata.pop("tokenizer"),
    "no data": lambda it: it.metadata.pop("data"),
    "a key of a later version": FORGED["a key of a later version"],
    "handlers that are a list": FORGED["handlers that are a list"],
    "handler state of another form": state(handlers={"loss_ema": {"value": "x"}, "weight_ema": 5}),
    "no trainer": lambda it: it.skeletons["state"].pop("trainer"),
    "a trainer that is a list": state(trainer=[]),
    "parameter groups that are none": lambda it: it.skeletons["state"]["optimizer"].update(
        param_groups=5
    ),
    "parameter groups of words": lambda it: it.skeletons["state"]["optimizer"].update(
        param_groups=["x"]
    ),
    "a budget that is a word": lambda it: it.metadata["config_as_written"]["training"].update(
        total_steps="many"
    ),
    "buffers that are a number": state(buffers=5),
    "averages of another shape": lambda it: it.tensors.update(
        {name: tensor.flatten() for name, tensor in it.tensors.items() if ".averages." in name}
    ),
    "moments of another shape": moments(lambda it: torch.ones(3, 3)),
    # The fused kernel would write behind the end of these, into memory that is not theirs.
    "moments of less dimensions": moments(lambda it: torch.zeros(3)),
    "empty moments": moments(lambda it: it[:0]),
    "counts of steps that are many": lambda it: it.tensors.update(
        {name: torch.ones(200) for name in it.tensors if name.endswith(".step")}
    ),
    "an option of the optimizer that is a word": lambda it: it.skeletons["state"]["optimizer"][
        "param_groups"
    ][0].update(eps="small"),
    "a counter that is a word": lambda it: it.skeletons["state"]["trainer"].update(epoch_nll="x"),
    "a counter that is a switch": lambda it: it.skeletons["state"]["trainer"].update(
        checkpoints=True
    ),
    "a skipped step that is a word": lambda it: it.skeletons["state"]["trainer"]["ledger"].update(
        skipped=["x"]
    ),
    "a lowered rate that is a word": lambda it: it.skeletons["state"]["trainer"]["ledger"].update(
        cuts=[[1, 9, "x"]]
    ),
    "moments that are a word": lambda it: it.skeletons["state"]["optimizer"].update(state="x"),
}


@pytest.mark.parametrize("change", RESUMED.values(), ids=RESUMED)
def test_no_run_goes_on_from_such_a_checkpoint(checkpoint, capsys, change):
    forge(checkpoint, change)
    more = ["training.total_steps=6", "--resume", "runs/tiny"]
    assert main(["run", "tiny.yaml", *more]) == 4
    assert "error: " in capsys.readouterr().err


def test_how_an_update_is_computed_is_this_machines_choice(checkpoint, capsys):
    def change(it: Contents) -> None:
        for group in it.skeletons["state"]["optimizer"]["param_groups"]:
            group.update(fused=True, foreign=True, differentiable=True, capturable=True)

    forge(checkpoint, change)
    assert main(["run", "tiny.yaml", "training.total_steps=6", "--resume", "runs/tiny"]) == 0


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    incident, _ = make_incident(tmp_path_factory.mktemp("recorded"), 3)
    return incident


@pytest.fixture
def incident(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / recorded.name))


def window(change: Callable[[dict[str, torch.Tensor], str], object]) -> Change:
    def on_tensors(it: Contents) -> None:
        for name in [name for name in it.tensors if name.startswith("window.0.")]:
            change(it.tensors, name)

    return on_tensors


def inputs(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    name = "window.0.input_ids"
    return lambda it: it.tensors.update({name: change(it.tensors[name])})


def generator(value: torch.Tensor) -> Change:
    return lambda it: it.tensors.update({"generators.torch": value})


EVIDENCE: dict[str, Change] = {
    "ids beyond the vocabulary": inputs(lambda ids: ids + 10**6),
    "negative ids": inputs(lambda ids: ids - 10**6),
    "ids that are no integers": inputs(lambda ids: ids.float()),
    "ids of 32 bits": inputs(lambda ids: ids.int()),
    "one row without a batch": inputs(lambda ids: ids[0]),
    "inputs shorter than targets": inputs(lambda ids: ids[:, 1:].clone()),
    "no rows": window(lambda all, name: all.update({name: all[name][:0].clone()})),
    "rows longer than the context": window(
        lambda all, name: all.update({name: all[name].repeat(1, 50)})
    ),
    "200,000 rows": window(lambda all, name: all.update({name: all[name][:1].repeat(200_000, 1)})),
    "targets below -100": lambda it: it.tensors.update(
        {"window.0.target_ids": it.tensors["window.0.target_ids"] - 10**6}
    ),
    "a window that is a table": state(window={}),
    "a window of 50,000 micro-batches": lambda it: it.skeletons["state"].update(
        window=it.skeletons["state"]["window"][:1] * 50_000
    ),
    "generators of another form": state(generators=[1]),
    "a generator of three bytes": generator(torch.zeros(3, dtype=torch.uint8)),
    "a generator of floats": generator(torch.zeros(5056)),
    "a generator of another name": lambda it: it.skeletons["state"]["generators"].update(
        {"cuda:x": it.skeletons["state"]["generators"]["torch"]}
    ),
}


@pytest.mark.parametrize("change", EVIDENCE.values(), ids=EVIDENCE)
def test_evidence_that_is_no_window_of_its_run_is_never_computed_with(incident, capsys, change):
    (evidence,) = (incident / "evidence").glob("step-*")
    forge(evidence, change)
    assert main(["replay", str(incident)]) == 4
    assert "error: " in capsys.readouterr().err


def test_sound_evidence_is_replayed_after_the_same_way_to_the_disk(incident):
    (evidence,) = (incident / "evidence").glob("step-*")
    forge(evidence, lambda contents: None)
    assert main(["replay", str(incident)]) == 0


@pytest.mark.parametrize(
    "fields", [{"num_layers": 10**9}, {"vocab_size": 10**9}, {"dropout": "high"}], ids=str
)
def test_a_report_of_another_model_than_the_evidence_is_refused(incident, capsys, fields):
    path = incident / "report.json"
    report = json.loads(path.read_text())
    report["description"]["config"]["model"].update(fields)
    path.write_text(json.dumps(report))
    assert main(["replay", str(incident)]) == 4
    assert "error: " in capsys.readouterr().err


def test_a_checkpoint_that_leaves_out_how_it_computed_goes_on_by_the_defaults(checkpoint, capsys):
    forge(checkpoint, lambda it: it.metadata["config"].pop("training"))
    assert main(["run", "tiny.yaml", "training.total_steps=6", "--resume", "runs/tiny"]) == 0
    assert "from step" in capsys.readouterr().err
