"""Options of a YAML: what may be written, what is refused, and what says one thing twice."""

from __future__ import annotations

import importlib
import operator
import pkgutil
import typing
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union

import pytest
import yaml

import fundamentallm
from fundamentallm.config import RunConfig
from fundamentallm.data.tokenizer import TOKENIZERS
from fundamentallm.engine.wiring.assemble import (
    DEFAULT_HANDLERS,
    assemble,
    check_names,
    open_machine,
)
from fundamentallm.engine.wiring.conflicts import settle_kept_checkpoints
from fundamentallm.engine.wiring.run_directory import RunDirectory, choose, nowhere
from fundamentallm.errors import ConfigError
from fundamentallm.inference.stored_model import stored_config
from fundamentallm.models.families import ADAPTERS, MODELS
from fundamentallm.models.layers.feedforward import FEEDFORWARDS
from fundamentallm.models.layers.normalization import NORMALIZATIONS
from fundamentallm.models.layers.positions import POSITIONS
from fundamentallm.registry import Registry, _type_hints
from fundamentallm.training.handlers import HANDLERS, LossEMA
from fundamentallm.training.losses import LOSSES
from fundamentallm.training.metrics import METRICS
from fundamentallm.training.optimizers import OPTIMIZERS
from fundamentallm.training.schedulers import SCHEDULERS

PLACES: dict[str, Registry[Any]] = {
    "handlers": HANDLERS,
    "evaluation.metrics": METRICS,
    "training.optimizer": OPTIMIZERS,
    "training.scheduler": SCHEDULERS,
    "training.loss": LOSSES,
    "model.family": MODELS,
    "model.adapter": ADAPTERS,
    "model.normalization": NORMALIZATIONS,
    "model.positions": POSITIONS,
    "model.feedforward": FEEDFORWARDS,
    "data.tokenizer": TOKENIZERS,
}
OPTIONS = [
    (place, name, key)
    for place, registry in PLACES.items()
    for name in registry.names()
    for key in registry.options(name)
]
VALUES: list[Any] = [
    "abc",
    -1,
    True,
    3,
    1.5,
    None,
    [],
    [0.5],
    [0.5, 0.5],
    [0.5, "b"],
    ["abc"],
    {"a": 1},
    [[1]],
]


def fits(annotation: Any, value: Any) -> bool:
    """Whether a YAML value is of a type, told without the library that the registry asks."""
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin in (Union, UnionType):
        return any(fits(member, value) for member in arguments)
    if origin is typing.Annotated:
        bounds = [bound for note in arguments[1:] for bound in note.metadata]
        return fits(arguments[0], value) and (value is None or all(map(keeps(value), bounds)))
    if origin is Literal:
        return any(value is known or value == known for known in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return isinstance(value, list) and all(fits(arguments[0], one) for one in value)
    if origin is tuple:
        return (
            isinstance(value, list)
            and len(value) == len(arguments)
            and all(map(fits, arguments, value))
        )
    if annotation is float:
        return type(value) in (int, float)
    assert annotation in (int, bool, str, NoneType), f"say here what fits {annotation}"
    return type(value) is annotation


def keeps(value: Any) -> Callable[[Any], bool]:
    """Return whether a value keeps a bound, which has one of four fields."""
    relations = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}
    return lambda bound: all(
        relation(value, getattr(bound, name))
        for name, relation in relations.items()
        if hasattr(bound, name)
    )


def configuration(path: Path, sections: dict[str, Any]) -> RunConfig:
    path.write_text(yaml.safe_dump(sections))
    return RunConfig.from_yaml(path)


def component(place: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    if place == "handlers":
        return {"handlers": {name: options}}
    section, field = place.split(".")
    if place == "evaluation.metrics":
        return {section: {field: {name: options}}}
    if place == "model.family":  # its options stand beside it
        return {section: {field: name, **options}}
    return {section: {field: {"name": name, **options}}}


@pytest.mark.parametrize(("place", "name", "key"), OPTIONS)
def test_a_value_of_the_wrong_type_is_refused_at_its_line(tmp_path, place, name, key):
    registry = PLACES[place]
    annotation = _type_hints(registry.get(name))[key]
    others = {
        other: "x.json"
        for other, parameter in registry.options(name).items()
        if parameter.default is parameter.empty and other != key
    }
    wrong = [value for value in VALUES if not fits(annotation, value)]
    assert len(wrong) >= 8
    prefix = {
        "handlers": f"handlers.{name}",
        "evaluation.metrics": f"evaluation.metrics.{name}",
        "model.family": "model",
    }.get(place, place)
    dotted = f"{prefix}.{key}"
    for value in wrong:
        path = tmp_path / "c.yaml"
        with pytest.raises(ConfigError) as caught:
            check_names(configuration(path, component(place, name, {**others, key: value})))
        lines = path.read_text().splitlines()
        line = next(n for n, text in enumerate(lines, 1) if text.lstrip().startswith(f"{key}:"))
        assert caught.value.where == f"{path}:{line}: {dotted}"
        assert caught.value.got
        assert caught.value.expected


def test_no_registry_whose_names_a_configuration_writes_is_left_out():
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(fundamentallm.__path__, "fundamentallm.")
        if not module.name.endswith("__main__")
    ]
    known = {
        id(value): value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, Registry)
    }
    with_options = {
        registry.kind
        for registry in known.values()
        if any(registry.options(name) for name in registry.names())
    }
    # The first argument of an export is its path, which the command line has.
    assert with_options - {"export format"} <= {registry.kind for registry in PLACES.values()}


@pytest.mark.parametrize(
    ("handler", "option", "value"),
    [
        ("checkpointing", "to_save", {"a": 1}),
        ("checkpointing", "score_function", "abc"),
        ("progress", "stream", "abc"),
        ("progress", "clock", 1),
        ("throughput", "clock", None),
    ],
)
def test_a_seam_for_callers_in_python_is_no_option(tmp_path, handler, option, value):
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match=f"has no option '{option}'") as caught:
        check_names(configuration(path, {"handlers": {handler: {option: value}}}))
    assert caught.value.where == f"{path}:3: handlers.{handler}.{option}"


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"num_tokens": 0}, {"temperature": -1.0}, {"every": -1}], ids=str
)
def test_samples_refuse_when_they_are_built(place, options):
    with pytest.raises(ConfigError, match=next(iter(options))) as caught:
        assembled(place, handlers={"samples": options})
    assert ": handlers.samples" in caught.value.where


# ---------------------------------------------------------------- one thing said twice


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return tmp_path


def tiny(**sections: Any) -> dict[str, Any]:
    return {
        "data": {"source": "text.txt", "sequence_length": 8, "batch_size": 2},
        "model": {"d_model": 8, "num_layers": 1, "num_heads": 2},
        **sections,
        "training": {"total_steps": 2, "log_steps": 1, **sections.get("training", {})},
    }


def assembled(place: Path, directory: RunDirectory | None = None, **sections: Any) -> Any:
    config = configuration(place / "c.yaml", tiny(**sections))
    check_names(config)
    return assemble(config, directory or nowhere(config), open_machine(config), measuring=False)


def test_two_numbers_of_checkpoints_are_an_error_that_names_both_places(place):
    with pytest.raises(ConfigError, match=r"keep_last 7 and .*n_saved 2 disagree") as caught:
        assembled(place, training={"keep_last": 7}, handlers={"checkpointing": {"n_saved": 2}})
    lines = (place / "c.yaml").read_text().splitlines()
    at = {line.split(":")[0].strip(): number for number, line in enumerate(lines, 1)}
    path = place / "c.yaml"
    assert caught.value.where == (
        f"{path}:{at['keep_last']}: training.keep_last and "
        f"{path}:{at['n_saved']}: handlers.checkpointing.n_saved"
    )


@pytest.mark.parametrize(
    ("training", "checkpointing", "kept"),
    [
        ({}, {}, 3),
        ({"keep_last": 5}, {}, 5),
        ({}, {"n_saved": 4}, 4),
        ({"keep_last": 4}, {"n_saved": 4}, 4),
        ({"keep_last": 5}, {"asynchronous": True}, 5),
    ],
)
def test_one_number_of_checkpoints_holds_wherever_it_was_written(
    place, training, checkpointing, kept
):
    run = assembled(place, training=training, handlers={"checkpointing": checkpointing})
    assert run.trainer.restore_point.n_saved == kept
    assert run.config.training.keep_last == kept


def test_a_run_that_began_with_both_goes_on_with_n_saved(place):
    config = configuration(
        place / "c.yaml",
        tiny(training={"keep_last": 7}, handlers={"checkpointing": {"n_saved": 2}}),
    )
    assert settle_kept_checkpoints(config, begins=False).training.keep_last == 2
    assert config.training.keep_last == 7  # what was written is still known


def test_it_goes_on_from_its_checkpoint_and_says_so(place):
    both = {"n_saved": 2}
    first = assembled(place, handlers={"checkpointing": both})
    first.directory.path.mkdir(parents=True)
    first.trainer.run()
    sections = {"training": {"keep_last": 7, "total_steps": 4}, "handlers": {"checkpointing": both}}
    config = configuration(place / "c.yaml", tiny(**sections))
    directory = choose(config, str(first.directory.path), None)
    assert directory.checkpoint is not None
    run = assembled(place, directory, **sections)
    assert run.trainer.restore_point.n_saved == 2
    note = "training.keep_last has no effect: the run keeps 2 checkpoints, the n_saved that it"
    assert [known for known in run.notes if known.startswith(note)]


def test_a_run_whose_configuration_names_its_score_is_read_and_continues_without_the_name(place):
    named = {"n_saved": 2, "score_name": "loss"}  # an option of an earlier release
    first = assembled(place, handlers={"checkpointing": {"n_saved": 2}})
    first.directory.path.mkdir(parents=True)
    for stored in ("config", "config_as_written"):
        first.trainer.description[stored]["handlers"]["checkpointing"] = named
    first.trainer.run()
    sections = {"training": {"total_steps": 4}, "handlers": {"checkpointing": {"n_saved": 2}}}
    config = configuration(place / "c.yaml", tiny(**sections))
    directory = choose(config, str(first.directory.path), None)
    assert directory.checkpoint is not None
    assert stored_config(directory.checkpoint.metadata["config"], "here").handlers
    assert assembled(place, directory, **sections).trainer.restore_point.n_saved == 2
    with pytest.raises(ConfigError, match="has no option 'score_name'"):
        assembled(place, handlers={"checkpointing": named})


# ---------------------------------------------------------------- to no effect


@pytest.mark.parametrize(
    ("sections", "note"),
    [
        (
            {"training": {"scheduler": "cosine"}, "handlers": {"schedule": False}},
            "training.scheduler has no effect: the handler schedule is switched off",
        ),
        (
            {"handlers": {"evaluation": False, "early_stopping": True}},
            "handlers.early_stopping has no effect: the handler evaluation is switched off",
        ),
        (
            {"training": {"checkpoint_steps": 1}, "handlers": {"checkpointing": False}},
            "training.checkpoint_steps has no effect: the handler checkpointing is switched off",
        ),
        (
            {"training": {"optimizer": "lion", "optimizer_eps": 1e-6}},
            "training.optimizer_eps has no effect: the optimizer lion has no such option",
        ),
        (
            {"training": {"scheduler": "constant", "warmup_steps": 1}},
            "training.warmup_steps has no effect: the schedule constant does not use it",
        ),
        (
            {"training": {"scheduler": "linear_warmup", "min_learning_rate": 1e-5}},
            "training.min_learning_rate has no effect: the schedule linear_warmup does not use it",
        ),
    ],
)
def test_a_setting_that_nobody_reads_is_said(place, sections, note):
    assert note in assembled(place, **sections).notes


def test_nothing_is_said_of_settings_that_are_read(place):
    run = assembled(
        place,
        training={"scheduler": "cosine", "min_learning_rate": 1e-5, "optimizer_eps": 1e-6},
        handlers={"early_stopping": True},
    )
    assert not [note for note in run.notes if "no effect" in note]


@pytest.mark.parametrize("name", DEFAULT_HANDLERS)
def test_a_run_does_without_any_one_of_the_default_handlers(place, name):
    run = assembled(place, handlers={"samples": {"num_tokens": 2}, name: False})
    run.directory.path.mkdir(parents=True)
    run.trainer.run()
    assert run.trainer.state.iteration == 2


def test_an_option_says_what_it_would_be(place):
    assert HANDLERS.options("loss_ema")["decay"].default == LossEMA().decay
