"""The file of what was measured before: nothing depends on it, and nothing breaks it for good."""

from __future__ import annotations

import json
import logging
import os

import pytest

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.plan import Machine
from fundamentallm.config import RunConfig
from fundamentallm.engine.tuning.measuring import Measurement
from fundamentallm.engine.tuning.speed_cache import SpeedCache, circumstances_of
from fundamentallm.errors import DataError
from fundamentallm.files import kept_figures

HERE = {"processor": "one", "threads": 2}
THERE = {"processor": "another", "threads": 2}
FIGURES = {"fp32": Measurement(0.5), "bf16 compiled": Measurement(0.25, 12.5)}


@pytest.fixture
def cache(tmp_path):
    return SpeedCache(tmp_path / "deep" / "speed.json")


def test_what_was_measured_is_known_in_the_same_circumstances_alone(cache):
    assert cache.get(HERE) == {}
    cache.put(HERE, FIGURES)
    cache.put(THERE, {"fp32": Measurement(7.0)})

    assert SpeedCache(cache.path).get(HERE) == FIGURES
    assert cache.get({**HERE, "threads": 1}) == {}
    assert [path.name for path in cache.path.parent.iterdir()] == ["speed.json"]


def test_it_lies_in_the_users_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert SpeedCache().path == tmp_path / "fundamentallm" / "speed.json"


def test_without_a_home_nothing_is_kept(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(kept_figures, "default_cache_dir", no_home)
    cache = SpeedCache()
    cache.put(HERE, FIGURES)
    assert cache.get(HERE) == {}


def no_home():
    raise DataError("no home")


def good(**changes):
    measured = {"fp32": {"step_seconds": 1.0, "compile_seconds": 0.0, **changes}}
    entry = {"of": HERE, "measured": measured}
    return {"version": 1, "entries": {kept_figures.key_of(HERE): entry}}


def test_the_example_of_a_good_file_is_one(cache):
    cache.path.parent.mkdir()
    cache.path.write_text(json.dumps(good()))
    assert cache.get(HERE) == {"fp32": Measurement(1.0)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\xff",
        "[" * 100_000,
        '{"version": 2, "entries": {}}',
        '{"version": 1, "entries": []}',
        json.dumps({"version": 1, "entries": {"a": {"of": {}, "measured": {"b": None}}}}),
        json.dumps(good(step_seconds=0)),
        json.dumps(good(step_seconds=-1)),
        json.dumps(good(step_seconds="x")),
        json.dumps(good(step_seconds=float("nan"))),
        json.dumps(good(compile_seconds=float("inf"))),
    ],
)
def test_a_broken_file_is_one_warning_and_written_anew(cache, text, caplog):
    cache.path.parent.mkdir()
    cache.path.write_text(text, encoding="latin-1")

    with caplog.at_level(logging.WARNING):
        assert cache.get(HERE) == {}
        cache.put(HERE, FIGURES)

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "speed.json is damaged and will be rewritten" in caplog.text
    assert cache.get(HERE) == FIGURES


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_refuses_is_a_warning(cache, caplog):
    cache.path.parent.mkdir(mode=0o500)
    cache.put(HERE, FIGURES)
    assert "cannot be stored" in caplog.text


def test_a_file_in_the_place_of_the_directory_is_a_warning(cache, caplog):
    cache.path.parent.write_text("here")
    cache.put(HERE, FIGURES)
    assert "cannot be stored" in caplog.text
    assert cache.get(HERE) == {}


def test_the_oldest_go_when_there_are_too_many(cache, monkeypatch):
    monkeypatch.setattr(kept_figures, "MOST_ENTRIES", 3)
    for threads in (1, 2, 3, 1, 4):
        cache.put({"threads": threads}, {"fp32": Measurement(float(threads))})

    assert [bool(cache.get({"threads": n})) for n in (1, 2, 3, 4)] == [True, False, True, True]


@pytest.mark.parametrize(
    "text",
    [
        "model: {d_model: 64}",
        "data: {batch_size: 3}",
        "data: {sequence_length: 64}",
        "training: {optimizer: lion}",
        "training: {loss: chunked_cross_entropy}",
        "training: {gradient_checkpointing: true}",
    ],
)
def test_another_shape_is_another_entry(text):
    plain = circumstances_of(RunConfig(), Machine())

    assert plain == circumstances_of(RunConfig.from_yaml("name: b\nseed: 7"), Machine())
    assert plain != circumstances_of(RunConfig.from_yaml(text), Machine())
    assert plain != circumstances_of(RunConfig(), Machine(ranks=Ranks(world_size=2)))
    assert {"processor", "device", "torch", "threads"} <= plain.keys()
