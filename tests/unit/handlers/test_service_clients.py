"""Neptune, Visdom and Polyaxon against recording fakes of their clients, not the services.

Each fake keeps what it is told as its client would, and has the calls that the logger makes and no
others.
"""

from __future__ import annotations

import html
import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.errors import ConfigError, MachineError
from fundamentallm.testing import SpoiltGradient, tiny_loaders, tiny_model
from fundamentallm.training.handlers import (
    HANDLERS,
    Checkpointing,
    Evaluation,
    MetricsLog,
    NaNRollback,
    Samples,
)
from fundamentallm.training.trainer import Trainer

SERVICES = ("neptune", "visdom", "polyaxon")
Series = dict[str, list[tuple[int | None, Any]]]


class NeptuneRun:
    """A run of Neptune: values and series by path; steps of a series grow, as the server demands.

    A path is a series or has others below it, and takes no NaN, as in the client.
    """

    made: ClassVar[list[NeptuneRun]] = []

    def __init__(self, **options: Any) -> None:
        sys.excepthook = print  # type: ignore[assignment]  # as its client does
        self.options = options
        online = options["mode"] == "async"
        self.fields: dict[str, Any] = next(
            (
                run.fields
                for run in self.made
                if online and run.options["custom_run_id"] == options["custom_run_id"]
            ),
            {},
        )
        self.stopped = False
        self.made.append(self)

    def __setitem__(self, path: str, value: Any) -> None:
        assert isinstance(value, (int, float, str))
        self.fields[path] = value

    def __getitem__(self, path: str) -> NeptuneField:
        return NeptuneField(self, path)

    def exists(self, path: str) -> bool:
        return path in self.fields

    def stop(self) -> None:
        self.stopped = True


class NeptuneField:
    def __init__(self, run: NeptuneRun, path: str) -> None:
        self.run, self.path = run, path

    def append(self, value: Any, step: int | None = None) -> None:
        assert value == value, "Neptune takes no NaN"
        for other in self.run.fields:
            assert not f"{other}/".startswith(f"{self.path}/") or other == self.path
            assert not f"{self.path}/".startswith(f"{other}/") or other == self.path
        series = self.run.fields.setdefault(self.path, [])
        assert step is None or not series or step > series[-1][0], (self.path, step)
        series.append((step, value))

    def upload(self, content: bytes) -> None:
        self.run.fields[self.path] = content

    def fetch(self) -> Any:
        return self.run.fields[self.path]


class NeptuneFile:
    @staticmethod
    def from_stream(stream: Any, extension: str) -> bytes:
        return stream.read()


class VisdomClient:
    """Visdom's client before a server, or a file: windows by name, of points or of lines of text.

    A text that is added to a window that is not there is lost, as the server loses it.
    """

    windows: ClassVar[dict[str, dict[str, Any]]] = {}
    saved: ClassVar[list[str]] = []

    def __init__(self, env: str, raise_exceptions: bool, **place: Any) -> None:
        assert raise_exceptions
        if place.get("offline"):
            assert Path(place["log_to_filename"]).parent.is_dir()
        self.place = place

    def line(self, win: str, env: str, name: str, update: str, opts: Any, **axes: Any) -> None:
        assert win == name
        numbers = zip(axes["X"], axes["Y"], strict=True)
        points = [[float(x), float(y) if y == y else None] for x, y in numbers]
        window = self.windows.setdefault(win, {"type": "plot", "points": []})
        window["points"] = points if update == "replace" else window["points"] + points

    def text(self, text: str, win: str, env: str, opts: Any, append: bool = False) -> None:
        if not append:
            self.windows[win] = {"type": "text", "content": text}
        elif win in self.windows:
            self.windows[win]["content"] += f"<br>{text}"

    def win_exists(self, win: str, env: str) -> bool:
        return win in self.windows

    def get_window_data(self, env: str) -> str:
        told = {}
        for name, window in self.windows.items():
            content: Any = window.get("content")
            if window["type"] == "plot":
                x, y = zip(*window["points"], strict=True)
                content = {"data": [{"x": x, "y": y, "name": name}]}
            told[name] = {"type": window["type"], "content": content}
        return json.dumps(told)

    def close(self, win: str, env: str) -> None:
        del self.windows[win]

    def save(self, envs: list[str]) -> None:
        self.saved.extend(envs)


class PolyaxonRun:
    made: ClassVar[list[PolyaxonRun]] = []

    def __init__(self, run_uuid: str | None, auto_create: bool, **options: Any) -> None:
        sys.excepthook = print  # type: ignore[assignment]  # as its client does
        assert auto_create == (run_uuid is None)
        self.run_uuid = run_uuid or "0123abc"
        self.options = options
        self.inputs: dict[str, Any] = {}
        self.series: Series = {}
        self.models: list[str] = []
        self.ended = False
        self.made.append(self)

    def log_inputs(self, async_req: bool, **inputs: Any) -> None:
        self.inputs |= inputs

    def log_metrics(self, step: int, **metrics: float) -> None:
        for name, number in metrics.items():
            self.series.setdefault(name, []).append((step, number))

    def log_text(self, name: str, text: str, step: int) -> None:
        self.series.setdefault(name, []).append((step, text))

    def log_model(self, path: str, name: str, framework: str, rel_path: str) -> None:
        assert (Path(path) / "MANIFEST.json").exists()
        self.models.append(name)

    def end(self) -> None:
        self.ended = True


@pytest.fixture(autouse=True)
def clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the fakes in the place of the packages."""

    def module(name: str, **contents: Any) -> None:
        fake = ModuleType(name)
        fake.__spec__ = ModuleSpec(name, None)
        vars(fake).update(contents)
        monkeypatch.setitem(sys.modules, name, fake)

    module("neptune", init_run=NeptuneRun)
    module("neptune.types", File=NeptuneFile)
    module("visdom", Visdom=VisdomClient)
    module("polyaxon")
    module("polyaxon.tracking", Run=PolyaxonRun)
    for kept in (NeptuneRun.made, PolyaxonRun.made, VisdomClient.windows, VisdomClient.saved):
        kept.clear()
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"VISDOM_{name}", raising=False)


def told_neptune() -> Series:
    return {k: v for run in NeptuneRun.made for k, v in run.fields.items() if isinstance(v, list)}


def told_visdom() -> Series:
    told: Series = {}
    for name, window in VisdomClient.windows.items():
        if window["type"] == "plot":
            told[name] = [(int(x), y) for x, y in window["points"]]
        elif name != "config":
            lines = html.unescape(window["content"]).split("<br>")
            told[name] = [(None, line) for line in lines]
    return told


def told_polyaxon() -> Series:
    told: Series = {}
    for run in PolyaxonRun.made:
        for name, series in run.series.items():
            told.setdefault(name.removesuffix("/text"), []).extend(series)
    return told


TOLD = {"neptune": told_neptune, "visdom": told_visdom, "polyaxon": told_polyaxon}
ONLINE = {
    "neptune": {"mode": "online", "project": "me/mine"},
    "visdom": {"server": "http://localhost"},
    "polyaxon": {"mode": "online"},
}


def make_trainer(run_dir: Path, *handlers: Any, steps: int = 8) -> Trainer:
    torch.manual_seed(0)
    train, val = tiny_loaders()
    config = TrainingConfig(total_steps=steps, eval_steps=4, log_steps=1, learning_rate=1e-2)
    return Trainer(
        tiny_model(),
        train,
        val,
        device="cpu",
        config=config,
        handlers=[*handlers, MetricsLog(run_dir), Evaluation()],
    )


def expected(run_dir: Path, name: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


@pytest.mark.parametrize("service", SERVICES)
def test_a_run_is_handed_over(service, tmp_path, caplog):
    hook = sys.excepthook
    options = {} if service == "visdom" else {"artifacts": "all"}
    logger = HANDLERS.build(service, options, run_dir=tmp_path)
    samples = Samples(CharacterTokenizer.from_text("abcdefghij\n"), tmp_path, num_tokens=20)
    make_trainer(tmp_path, samples, logger, Checkpointing(tmp_path / "checkpoints")).run()
    assert "cannot be written" not in caplog.text
    assert sys.excepthook is hook
    told = TOLD[service]()
    for name in ("train/loss", "train/grad_norm", "val/loss", "val/perplexity"):
        assert told[name] == expected(tmp_path, name)
    texts = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    shown = "\n".join(str(text) for _, text in told.get("samples") or told["sample"])
    assert len(texts) == 2
    for text in texts:
        lines = (text["prompt"] + text["text"]).split("\n")
        assert all(line in shown for line in lines)
    if service == "neptune":
        (run,) = NeptuneRun.made
        assert run.fields["config/training.learning_rate"] == 1e-2
        assert run.options["mode"] == "offline"
        assert run.stopped
        for step in (0, 4, 8):
            name = f"checkpoints/step-{step:08d}/model.safetensors"
            assert run.fields[name] == (tmp_path / name).read_bytes()
    elif service == "visdom":
        assert "training.learning_rate: 0.01" in VisdomClient.windows["config"]["content"]
    else:
        (other,) = PolyaxonRun.made
        assert other.inputs["training.learning_rate"] == 1e-2
        assert other.options["is_offline"]
        assert Path(other.options["artifacts_path"]).is_relative_to(tmp_path)
        assert other.models == ["step-00000000", "step-00000004", "step-00000008"]
        assert other.ended


@pytest.mark.parametrize("service", SERVICES)
def test_a_rollback_is_cut_or_marked(service, tmp_path, caplog):
    """Step 6 is spoilt: its numbers are not finite, and step 5 is taken a second time."""
    logger = HANDLERS.build(service, ONLINE[service], run_dir=tmp_path)
    saver = Checkpointing(tmp_path / "checkpoints")
    make_trainer(tmp_path, logger, NaNRollback(), saver, SpoiltGradient(6)).run()
    assert "cannot be written" not in caplog.text
    told = TOLD[service]()
    wanted = [(step, loss) for step, loss in expected(tmp_path, "train/loss") if step != 6]

    def losses(name: str) -> list[tuple[int | None, Any]]:
        return [(step, loss) for step, loss in told[name] if step != 6]

    if service == "visdom":
        assert losses("train/loss") == wanted
        assert VisdomClient.saved
    elif service == "neptune":  # 1 to 4 and 5; then 5 to 8
        assert losses("train/loss") == wanted[:5]
        assert losses("courses/2/train/loss") == wanted[4:]
        assert "step 4, " in told["courses/2/went_back_to"][0][1]
        assert NeptuneRun.made[0].fields["course"] == 2
    else:
        assert sorted(losses("train/loss")) == sorted([*wanted, wanted[4]])
        assert told["went_back_to"][0][1].startswith("4, ")
    names = ("rollbacks", "rollbacks/text", "courses/2/rollbacks")
    texts = [str(text) for name in names for _, text in told.get(name, [])]
    assert any("went back to step 4" in text for text in texts)


@pytest.mark.parametrize("service", SERVICES)
def test_a_resumed_run_goes_on_in_the_same_run(service, tmp_path, caplog):
    """From its last step nothing is cut; from an earlier one what came later is."""
    for steps, start in ((8, None), (10, 8), (12, 4)):
        logger = HANDLERS.build(service, ONLINE[service], run_dir=tmp_path)
        trainer = make_trainer(
            tmp_path, logger, Checkpointing(tmp_path / "checkpoints"), steps=steps
        )
        if start is not None:
            trainer.resume(tmp_path / f"checkpoints/step-{start:08d}")
        trainer.run()
        if steps == 10 and service == "neptune":
            assert [step for step, _ in told_neptune()["train/loss"]] == list(range(1, 11))
    assert "cannot be written" not in caplog.text
    told, wanted = TOLD[service](), expected(tmp_path, "train/loss")
    assert [step for step, _ in wanted] == list(range(1, 13))
    if service == "visdom":
        assert told["train/loss"] == wanted
    elif service == "neptune":
        assert len({run.options["custom_run_id"] for run in NeptuneRun.made}) == 1
        course = NeptuneRun.made[-1].fields["course"]
        assert told[f"courses/{course}/train/loss"] == wanted[4:]
    else:
        assert {run.run_uuid for run in PolyaxonRun.made} == {"0123abc"}
        assert told["train/loss"][-8:] == wanted[4:]


def test_visdom_takes_its_login_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("VISDOM_USERNAME", "me")
    monkeypatch.setenv("VISDOM_PASSWORD", "s3cr3t")
    logger = HANDLERS.build("visdom", {"server": "http://localhost"}, run_dir=tmp_path)
    make_trainer(tmp_path, logger, steps=2).run()
    assert logger._there.place["password"] == "s3cr3t"
    with pytest.raises(ConfigError, match="VISDOM_PASSWORD"):
        HANDLERS.build("visdom", {"server": "http://me:s3cr3t@host"}, run_dir=tmp_path)


def test_a_text_is_no_page_in_visdom(tmp_path):
    from fundamentallm.training.handlers import Record

    logger = HANDLERS.build("visdom", {}, run_dir=tmp_path)
    make_trainer(tmp_path, logger, steps=1).run()
    logger.send([Record("samples", 1, 1, 1, 0.0, text="<script>a & b</script>\nc")])
    shown = VisdomClient.windows["sample"]["content"]
    assert shown == "step 1: &lt;script&gt;a &amp; b&lt;/script&gt;<br>c"


@pytest.mark.parametrize(
    ("service", "command"),
    [
        ("neptune", r"pip install 'fundamentallm\[neptune\]'"),
        ("polyaxon", r"pip install 'fundamentallm\[polyaxon\]'"),
        ("visdom", r"pip install 'setuptools<81' && pip install --no-build-isolation visdom"),
    ],
)
def test_a_missing_package_is_named_with_its_command(service, command, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(MachineError, match=command):
        HANDLERS.build(service, {}, run_dir=tmp_path)
