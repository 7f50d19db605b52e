"""The table of docs/ignite.md: every handler and metric of the installed Ignite, and what holds.

A handler "works" if it does on a Trainer what it does on a plain engine whose function returns the
same outputs; one that is "refused" raises a ConfigError when it is attached. A class or function
that a later Ignite has and the table does not fails here.
"""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ignite.contrib.handlers
import ignite.handlers
import ignite.metrics
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import param_scheduler, state_param_scheduler
from ignite.handlers.base_logger import BaseLogger
from ignite.metrics import Metric
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fundamentallm.config import TrainingConfig
from fundamentallm.errors import ConfigError
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.trainer import Trainer

PAGE = Path(__file__).parents[2] / "docs" / "ignite.md"
ROWS = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE))
STEPS, EPOCHS = 10, 2  # of the tiny loaders

Read = Callable[[], Any]
Check = Callable[[Engine, nn.Module, Optimizer, Path], Read]
h = ignite.handlers


def make_trainer() -> Trainer:
    torch.manual_seed(3)
    config = TrainingConfig(learning_rate=1e-2, eval_steps=4)
    trainer = Trainer(tiny_model(), *tiny_loaders(), device="cpu", config=config)
    trainer._checkpoint_dir = None
    return trainer


@cache
def recorded() -> tuple[list[Any], list[dict[str, Any]]]:
    """Return the outputs of the steps of an undisturbed run, and the weights after each."""
    outputs: list[Any] = []
    weights: list[dict[str, Any]] = []

    def note(engine: Trainer) -> None:
        outputs.append(engine.state.output)
        weights.append({k: v.clone() for k, v in engine.model.state_dict().items()})

    recorder = make_trainer()
    recorder.add_event_handler(Events.ITERATION_COMPLETED, note)
    recorder.train(num_epochs=EPOCHS)
    return outputs, weights


def on_both(check: Check, place: Path) -> tuple[Any, Any]:
    """Attach to a Trainer, and to an engine that returns its outputs and has its weights."""
    outputs, weights = recorded()
    trainer = make_trainer()
    ours = check(trainer, trainer.model, trainer.optimizer, place / "ours")
    trainer.train(num_epochs=EPOCHS)

    twin = make_trainer()

    def replay(engine: Engine, batch: Any) -> Any:
        twin.model.load_state_dict(weights[engine.state.iteration - 1])
        return outputs[engine.state.iteration - 1]

    plain = Engine(replay)
    theirs = check(plain, twin.model, twin.optimizer, place / "theirs")
    plain.run(range(STEPS), max_epochs=EPOCHS)
    return ours(), theirs()


# ------------------------------------------------------------------ one check a row

CHECKS: dict[str, Check] = {}


def row(*names: str) -> Callable[[Check], Check]:
    def enter(check: Check) -> Check:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return enter


def values_of(engine: Engine, read: Callable[[], Any]) -> Read:
    """Read a value after each step."""
    seen: list[Any] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(read()))
    return lambda: seen


@row("Checkpoint", "DiskSaver")
def saves(engine: Engine, model: nn.Module, optimizer: Optimizer, place: Path) -> Read:
    saver = h.DiskSaver(place, create_dir=True)
    step = h.global_step_from_engine(engine, Events.ITERATION_COMPLETED)
    checkpoint = h.Checkpoint({"model": model}, saver, n_saved=2, global_step_transform=step)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=6), checkpoint)

    def read() -> Any:
        files = sorted(place.iterdir())
        states = [torch.load(file, weights_only=True) for file in files]
        return [file.name for file in files], [
            float(sum(v.sum() for v in s.values())) for s in states
        ]

    return read


@row("ModelCheckpoint")
def saves_models(engine: Engine, model: nn.Module, optimizer: Optimizer, place: Path) -> Read:
    checkpoint = h.ModelCheckpoint(
        place, "best", n_saved=2, score_function=lambda e: -e.state.output
    )
    engine.add_event_handler(Events.EPOCH_COMPLETED, checkpoint, {"model": model})
    return lambda: sorted(file.name for file in place.iterdir())


@row("Timer")
def times(engine: Engine, *_: Any) -> Read:
    timer = h.Timer(average=True)
    timer.attach(
        engine,
        start=Events.EPOCH_STARTED,
        resume=Events.ITERATION_STARTED,
        pause=Events.ITERATION_COMPLETED,
        step=Events.ITERATION_COMPLETED,
    )
    return lambda: (timer.step_count, timer.running, timer.value() > 0)


@row("EarlyStopping")
def stops_early(engine: Engine, *_: Any) -> Read:
    handler = h.EarlyStopping(3, lambda e: -abs(e.state.iteration - 4), engine)
    handler.attach(engine, Events.ITERATION_COMPLETED)
    return lambda: (engine.state.iteration, handler.counter, handler.best_score)


@row("TerminateOnNan")
def stops_on_nan(engine: Engine, *_: Any) -> Read:
    handler = h.TerminateOnNan(
        lambda x: x if engine.state.iteration < 7 else torch.tensor(torch.nan)
    )
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
    return lambda: engine.state.iteration


@row("TimeLimit")
def stops_in_time(engine: Engine, *_: Any) -> Read:
    limit = h.TimeLimit(1)
    limit.start_time -= 10
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), limit)
    return lambda: engine.state.iteration


@row("global_step_from_engine")
def knows_steps(engine: Engine, *_: Any) -> Read:
    transforms = [
        h.global_step_from_engine(engine, event)
        for event in (Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED)
    ]
    other = Engine(lambda *_: None)
    return values_of(engine, lambda: [t(other, Events.ITERATION_STARTED) for t in transforms])


@row("EpochOutputStore")
def stores_outputs(engine: Engine, *_: Any) -> Read:
    h.EpochOutputStore().attach(engine, "losses")
    return lambda: [float(x) for x in engine.state.losses]  # type: ignore[attr-defined]


def schedule(make: Callable[[Any, Any], Any], event: Any = Events.ITERATION_STARTED) -> Check:
    def check(engine: Engine, model: nn.Module, optimizer: Any, place: Path) -> Read:
        engine.add_event_handler(event, make(optimizer, engine))
        return values_of(engine, lambda: [group["lr"] for group in optimizer.param_groups])

    return check


class Harmonic(param_scheduler.ParamScheduler):
    def get_param(self) -> float:
        return 0.1 / (1 + self.event_index)


class Saw(param_scheduler.CyclicalScheduler):
    def get_param(self) -> float:
        return float(self.start_value + self.event_index * (self.end_value - self.start_value))


def cosine(optimizer: Any, *_: Any) -> Any:
    return h.CosineAnnealingScheduler(optimizer, "lr", 0.1, 0.01, cycle_size=6)


def line(optimizer: Any, *_: Any) -> Any:
    return h.PiecewiseLinear(optimizer, "lr", [(0, 0.0), (4, 0.1), (15, 0.01)])


def each_group(optimizer: Any, *_: Any) -> Any:
    return h.ParamGroupScheduler(
        [
            h.PiecewiseLinear(
                optimizer, "lr", [(0, 0.1), (9, 0.01 * index)], param_group_index=index
            )
            for index in range(len(optimizer.param_groups))
        ]
    )


def plateau(optimizer: Any, engine: Engine) -> Any:
    def measure(engine: Engine) -> None:
        engine.state.metrics["own"] = float(engine.state.iteration // 5)

    engine.add_event_handler(Events.ITERATION_COMPLETED, measure)
    return h.ReduceLROnPlateauScheduler(optimizer, "own", factor=0.5, patience=2)


CHECKS |= {
    "ParamScheduler": schedule(lambda o, _: Harmonic(o, "lr")),
    "BaseParamScheduler": schedule(lambda o, _: Harmonic(o, "lr")),
    "CyclicalScheduler": schedule(lambda o, _: Saw(o, "lr", 0.1, 0.2, cycle_size=4)),
    "CosineAnnealingScheduler": schedule(cosine),
    "LinearCyclicalScheduler": schedule(
        lambda o, _: h.LinearCyclicalScheduler(o, "lr", 0.1, 0.01, cycle_size=6)
    ),
    "PiecewiseLinear": schedule(line),
    "ConcatScheduler": schedule(lambda o, _: h.ConcatScheduler([line(o), cosine(o)], [6])),
    "ParamGroupScheduler": schedule(each_group),
    "create_lr_scheduler_with_warmup": schedule(
        lambda o, _: h.create_lr_scheduler_with_warmup(cosine(o), 0.0, 4, 0.05)
    ),
    "LRScheduler": schedule(
        lambda o, _: h.LRScheduler(torch.optim.lr_scheduler.MultiStepLR(o, [3, 9], 0.1))
    ),
    "ReduceLROnPlateauScheduler": schedule(plateau, Events.ITERATION_COMPLETED),
}


def state_schedule(make: Callable[[], Any]) -> Check:
    def check(engine: Engine, *_: Any) -> Read:
        make().attach(engine)
        return values_of(engine, lambda: engine.state.x)  # type: ignore[attr-defined]

    return check


class Count(state_param_scheduler.StateParamScheduler):
    def get_param(self) -> float:
        return float(self.event_index)


new = {"param_name": "x", "create_new": True}
CHECKS |= {
    "StateParamScheduler": state_schedule(lambda: Count(**new)),
    "LambdaStateScheduler": state_schedule(lambda: h.LambdaStateScheduler(lambda i: i**2, **new)),
    "PiecewiseLinearStateScheduler": state_schedule(
        lambda: h.PiecewiseLinearStateScheduler([(0, 0.0), (5, 1.0)], **new)
    ),
    "ExpStateScheduler": state_schedule(lambda: h.ExpStateScheduler(1.0, 0.9, **new)),
    "StepStateScheduler": state_schedule(lambda: h.StepStateScheduler(1.0, 0.9, 3, **new)),
    "MultiStepStateScheduler": state_schedule(
        lambda: h.MultiStepStateScheduler(1.0, 0.9, [3, 6], **new)
    ),
}


@row("EMAHandler")
def averages_weights(engine: Engine, model: nn.Module, *_: Any) -> Read:
    handler = h.EMAHandler(model, momentum=0.1, momentum_warmup=0.5, warmup_iters=5)
    handler.attach(engine)
    return lambda: [float(p.double().sum()) for p in handler.ema_model.parameters()]


@row("FBResearchLogger")
def writes_lines(engine: Engine, *_: Any) -> Read:
    lines: list[str] = []

    class Log:
        info = staticmethod(lines.append)

    h.FBResearchLogger(Log(), show_output=True).attach(engine, "Train", every=4)
    return lambda: [
        re.sub(r"ETA.*?  |(Iter|Data prep|Total) time.*|\(.*s / it\)", "", x) for x in lines
    ]


@row("BasicTimeProfiler")
def profiles(engine: Engine, *_: Any) -> Read:
    profiler = h.BasicTimeProfiler()
    profiler.attach(engine)
    return lambda: (len(profiler.processing_times), int((profiler.processing_times > 0).sum()))


@row("HandlersTimeProfiler")
def profiles_handlers(engine: Engine, *_: Any) -> Read:
    profiler = h.HandlersTimeProfiler()
    profiler.attach(engine)
    heard: list[int] = []

    def own(engine: Engine) -> None:
        heard.append(engine.state.iteration)

    engine.add_event_handler(Events.ITERATION_COMPLETED, own)

    def read() -> Any:
        times = profiler.event_handlers_times[Events.ITERATION_COMPLETED]
        own_times = next(values for name, values in times.items() if name.endswith("own"))
        return len(profiler.processing_times), len(profiler.dataflow_times), len(own_times), heard

    return read


@row("ProgressBar")
def shows_progress(engine: Engine, *_: Any) -> Read:
    steps, named, epochs = io.StringIO(), io.StringIO(), io.StringIO()
    options = {
        "persist": True,
        "mininterval": 0,
        "ncols": 60,
        "bar_format": "{desc}[{n_fmt}/{total_fmt}]{postfix}",
    }
    ignite.metrics.RunningAverage(output_transform=lambda x: x).attach(engine, "loss")
    h.ProgressBar(file=steps, **options).attach(engine)
    h.ProgressBar(file=named, **options).attach(
        engine, ["loss"], output_transform=lambda x: {"now": x}
    )
    h.ProgressBar(file=epochs, **options).attach(
        engine, event_name=Events.EPOCH_STARTED, closing_event_name=Events.COMPLETED
    )

    def read() -> Any:
        found = [re.findall(r"[^\r\n]+", text.getvalue()) for text in (steps, named, epochs)]
        return [sorted(set(map(str.strip, lines))) for lines in found]

    return read


def logger(name: str) -> Check:
    """What is attached to a logger is called as on a plain engine; services are tested apart."""

    def check(engine: Engine, *_: Any) -> Read:
        cls = getattr(h, name)
        instance = cls.__new__(cls)  # without its service
        calls: list[Any] = []

        def note(engine: Engine, logger: BaseLogger, event: Any) -> None:
            step = engine.state.get_event_attrib_value(event)
            calls.append((logger is instance, event.name, step, float(engine.state.output or 0.0)))

        instance.attach(engine, note, Events.ITERATION_COMPLETED(every=3))
        instance.attach(engine, note, Events.EPOCH_COMPLETED)
        return lambda: calls

    return check


LOGGERS = (
    "ClearMLLogger",
    "MLflowLogger",
    "NeptuneLogger",
    "PolyaxonLogger",
    "TensorboardLogger",
    "VisdomLogger",
    "WandBLogger",
)
CHECKS |= {name: logger(name) for name in LOGGERS}


def numbers(make: Callable[[], Any]) -> Check:
    def check(engine: Engine, *_: Any) -> Read:
        make().attach(engine, "own")
        return lambda: engine.state.metrics["own"]

    return check


m = ignite.metrics
CHECKS |= {
    "Average": numbers(m.Average),
    "GeometricAverage": numbers(m.GeometricAverage),
    "VariableAccumulation": numbers(lambda: m.VariableAccumulation(lambda total, x: total + x)),
    "RunningAverage": numbers(lambda: m.RunningAverage(output_transform=lambda x: x)),
    "MetricGroup": numbers(lambda: m.MetricGroup({"mean": m.Average()})),
    "MetricsLambda": numbers(lambda: m.MetricsLambda(lambda a, b: a / b, m.Average(), 2.0)),
    "Frequency": lambda engine, *_: (
        m.Frequency().attach(engine, "own") or (lambda: type(engine.state.metrics["own"]))  # type: ignore[func-returns-value]
    ),
}

REFUSED: dict[str, Callable[[Trainer], None]] = {
    "BatchSizeScheduler": lambda t: h.BatchSizeScheduler(
        DataLoader(torch.zeros(4)),
        lambda i: 1,  # type: ignore[arg-type]
    ).attach(t),
}
# Each works where it has its pair of predictions and targets (trainer.evaluator), or a transform.
OF_PREDICTIONS = {
    name
    for name in m.__all__
    if inspect.isclass(thing := getattr(m, name))
    and issubclass(thing, Metric)
    and name not in CHECKS
    and name not in ("Metric", "GpuInfo")
}


def test_every_handler_and_metric_of_the_installed_ignite_has_a_row() -> None:
    public = {*h.__all__, *m.__all__}
    missing = sorted(public - ROWS.keys())
    assert not missing, f"docs/ignite.md has no row for {missing}: try them, and enter what holds"
    assert not sorted(ROWS.keys() - public - {"FastaiLRFinder"}), "no such thing in this Ignite"


def test_the_old_places_of_handlers_export_nothing_else() -> None:
    old = {
        name
        for name in dir(ignite.contrib.handlers)
        if inspect.isclass(getattr(ignite.contrib.handlers, name))
    }
    assert old <= ROWS.keys() | {"BaseLogger"}


def test_each_row_that_works_has_a_check_and_each_that_is_refused_a_refusal() -> None:
    works = {name for name, verdict in ROWS.items() if verdict == "works"}
    elsewhere = {"FastaiLRFinder", "GpuInfo"}  # test_foreign.py; needs a GPU
    assert works == CHECKS.keys() | elsewhere
    refused = {name for name, verdict in ROWS.items() if verdict == "refused"}
    assert refused == REFUSED.keys() | OF_PREDICTIONS
    verdicts = {"works", "refused", "helper"}
    assert set(ROWS.values()) == verdicts


@pytest.mark.parametrize("name", CHECKS)
def test_it_does_on_a_trainer_what_it_does_on_a_plain_engine(name: str, tmp_path: Path) -> None:
    ours, theirs = on_both(CHECKS[name], tmp_path)
    assert ours == theirs
    assert ours not in ([], None)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_when_attached_with_the_way_to_do_it_here(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        REFUSED[name](make_trainer())
    assert name in str(error.value)
    assert error.value.fix


@pytest.mark.parametrize("name", sorted(OF_PREDICTIONS))
def test_a_metric_of_predictions_is_refused_at_the_trainer(name: str) -> None:
    cls = getattr(m, name)
    metric = cls.__new__(cls)  # some need further packages
    metric._output_transform = lambda x: x
    trainer = make_trainer()
    with pytest.raises(ConfigError, match=f"{name} compares predictions") as error:
        metric.attach(trainer, "own")
    assert "trainer.evaluator" in error.value.fix
    assert not trainer.attached
