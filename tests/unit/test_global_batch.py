"""The rows of a step over all ranks: the arithmetic, what may differ on resume, one data order."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.compute.distributed import Ranks
from fundamentallm.config import RunConfig, load_config
from fundamentallm.config.global_batch import with_global_batch
from fundamentallm.data.batch import IGNORED
from fundamentallm.data.examples import Example, encode_examples
from fundamentallm.data.loaders import (
    Batching,
    EpochLoader,
    ExampleLoader,
    MixtureLoader,
    TokenWindowLoader,
)
from fundamentallm.data.tokenizer import ByteTokenizer
from fundamentallm.engine.wiring.comparison import Comparison
from fundamentallm.engine.wiring.exactness import refuse_other_rows, tell_other_split
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.training.checkpoint.manifest import Manifest

SPLITS = [(1, 4), (2, 3), (4, 3), (3, 2)]
"""(ranks, rows of a micro-batch) whose steps can have 12 rows."""


def run_config(training: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    return RunConfig.model_validate({"data": data, "training": training or {}})


def drift(stored: Manifest, config: RunConfig) -> list[str]:
    return [str(difference) for difference in Comparison.of(stored, config).others]


def accumulation(config: RunConfig, ranks: int) -> int:
    return with_global_batch(config, ranks).training.accumulation_steps


# ---------------------------------------------------------------- arithmetic


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 30))
def test_accumulation_makes_the_rows_or_is_refused(rows: int, ranks: int, batch_size: int) -> None:
    config = run_config(batch_size=batch_size, global_batch=rows)
    possible = [n for n in range(1, rows + 1) if n * ranks * batch_size == rows]
    if possible:
        assert [accumulation(config, ranks)] == possible
    else:
        with pytest.raises(ConfigError, match="no whole number"):
            accumulation(config, ranks)


def test_without_global_batch_nothing_changes() -> None:
    config = run_config({"accumulation_steps": 3}, batch_size=5)
    assert with_global_batch(config, 7) is config


@pytest.mark.parametrize(
    ("rows", "batch_size", "ranks", "nearest"),
    [
        (100, 8, 4, "data.global_batch 96 or 128, or data.batch_size 5 or 25"),
        (8, 16, 1, "data.global_batch 16, or data.batch_size 8"),
        (24, 4, 5, "data.global_batch 20 or 40, or 3 or 6 ranks"),
        (7, 2, 3, "data.global_batch 6 or 12"),
        (512, 8, 3, "data.global_batch 504 or 528, or 2 or 4 ranks"),
        (10, 4, 1, "data.global_batch 8 or 12, or data.batch_size 2 or 5"),
    ],
)
def test_the_nearest_possible_values_are_named(
    rows: int, batch_size: int, ranks: int, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        accumulation(run_config(batch_size=batch_size, global_batch=rows), ranks)
    assert caught.value.expected == nearest


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 20))
def test_each_value_that_is_named_is_possible(rows: int, ranks: int, batch_size: int) -> None:
    with_global = {"batch_size": batch_size, "global_batch": rows}
    try:
        accumulation(run_config(**with_global), ranks)
    except ConfigError as error:
        named, _, others = error.expected.partition(", or ")
        for value in named.removeprefix("data.global_batch ").split(" or "):
            assert accumulation(run_config(**{**with_global, "global_batch": int(value)}), ranks)
        if others.startswith("data.batch_size"):
            for value in others.removeprefix("data.batch_size ").split(" or "):
                assert accumulation(run_config(**{**with_global, "batch_size": int(value)}), ranks)
        elif others:
            for value in others.removesuffix(" ranks").split(" or "):
                assert accumulation(run_config(**with_global), int(value))


def test_an_error_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("data:\n  batch_size: 8\n  global_batch: 20\n")
    with pytest.raises(ConfigError) as caught:
        with_global_batch(load_config(path), 2)
    assert caught.value.where == f"{path}:3: data.global_batch"
    assert caught.value.got == "20 rows, in micro-batches of 8 on each of 2 ranks"


def test_a_set_accumulation_agrees_or_is_refused() -> None:
    config = run_config({"accumulation_steps": 4}, batch_size=2, global_batch=16)
    assert accumulation(config, 2) == 4
    with pytest.raises(ConfigError, match="disagree") as caught:
        accumulation(config, 1)
    assert caught.value.key == "training.accumulation_steps"
    assert caught.value.expected.startswith("accumulation_steps 8: 16 rows")


def test_a_set_accumulation_of_one_is_compared_too() -> None:
    config = run_config({"accumulation_steps": 1}, batch_size=2, global_batch=16)
    with pytest.raises(ConfigError, match="disagree"):
        accumulation(config, 1)


def test_what_is_written_for_one_number_of_ranks_is_read_on_another() -> None:
    resolved = with_global_batch(run_config(batch_size=2, global_batch=16), 2)
    assert "accumulation_steps" not in resolved.to_dict()["training"]
    again = RunConfig.from_yaml(resolved.to_yaml())
    assert again == resolved
    assert accumulation(again, 4) == 2


# ---------------------------------------------------------------- resuming


def manifest(config: RunConfig, ranks: int) -> Manifest:
    """What a run of the configuration on so many ranks leaves."""
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(Manifest)}
    metadata = {
        "config_as_written": config.model_dump(mode="json"),
        "config": with_global_batch(config, ranks).model_dump(mode="json"),
        "circumstances": {"ranks": ranks},
    }
    return Manifest(**{**fields, "name": "step-00000150", "metadata": metadata})


WITH_16 = {"batch_size": 4, "global_batch": 16}


@pytest.mark.parametrize(
    ("was", "now", "differing"),
    [
        (WITH_16, WITH_16, []),
        (WITH_16, {"batch_size": 8, "global_batch": 16}, []),
        (WITH_16, {"batch_size": 2, "global_batch": 16, "accumulation_steps": 4}, []),
        (WITH_16, {"batch_size": 4, "global_batch": 32}, ["data.global_batch"]),
        (
            WITH_16,
            {"batch_size": 8, "global_batch": 32},
            ["data.batch_size", "data.global_batch"],
        ),
        (WITH_16, {"batch_size": 4}, ["data.global_batch"]),
        (WITH_16, {**WITH_16, "sequence_length": 64}, ["data.sequence_length"]),
        # 2 ranks of 4 rows, twice: what the run's steps had before anybody said so.
        ({"batch_size": 4, "accumulation_steps": 2}, WITH_16, []),
        ({"batch_size": 4, "accumulation_steps": 2}, {"batch_size": 16, "global_batch": 16}, []),
        (
            {"batch_size": 4, "accumulation_steps": 2},
            {"batch_size": 4, "global_batch": 8},
            ["data.global_batch", "training.accumulation_steps"],
        ),
        ({"batch_size": 4}, {"batch_size": 2}, ["data.batch_size"]),
        (
            {"batch_size": 4},
            {"batch_size": 2, "accumulation_steps": 2},
            ["data.batch_size", "training.accumulation_steps"],
        ),
    ],
)
def test_what_may_differ_on_resume(
    was: dict[str, int], now: dict[str, int], differing: list[str]
) -> None:
    def config(values: dict[str, int]) -> RunConfig:
        training = {k: v for k, v in values.items() if k == "accumulation_steps"}
        return run_config(training, **{k: v for k, v in values.items() if k not in training})

    found = drift(manifest(config(was), 2), config(now))
    keys = {line.split(":")[0] for line in found}
    assert keys - {"model.sequence_length"} == set(differing)  # the model repeats the data's


def test_parallel_may_differ() -> None:
    config = run_config(**WITH_16)
    other = config.model_dump() | {"parallel": {"patience": {"step": 7.0}}}
    assert drift(manifest(config, 2), RunConfig.model_validate(other)) == []


@pytest.mark.parametrize("part", ["config", "circumstances"])
@pytest.mark.parametrize("value", [None, {}, {"data": 3, "ranks": "2"}])
def test_a_checkpoint_that_does_not_say_its_rows_frees_nothing(part: str, value: Any) -> None:
    stored = manifest(run_config(**WITH_16), 2)
    metadata = {**stored.metadata, part: value}
    other = run_config(batch_size=8, global_batch=16)
    found = drift(dataclasses.replace(stored, metadata=metadata), other)
    assert found == ["data.batch_size: 4 in the run, 8 now"]


def test_other_ranks_without_global_batch_are_refused_with_the_way_out() -> None:
    config = run_config({"accumulation_steps": 3}, batch_size=4)
    stored = manifest(config, 2)
    refuse_other_rows(stored, config, Ranks(0, 2))
    with pytest.raises(CheckpointError) as caught:
        refuse_other_rows(stored, config, Ranks(0, 4))
    assert caught.value.got == "4 ranks x 3 micro-batches x 4 rows = 48"
    assert caught.value.expected == "2 ranks x 3 micro-batches x 4 rows = 24"
    assert caught.value.fix == "start 2 ranks, or set data.global_batch: 24"
    as_advised = run_config(batch_size=4, global_batch=24)
    assert drift(stored, as_advised) == []
    refuse_other_rows(stored, with_global_batch(as_advised, 3), Ranks(0, 3))


def test_one_line_says_what_holds(caplog: pytest.LogCaptureFixture) -> None:
    config = run_config(**WITH_16)
    stored = manifest(config, 2)
    with caplog.at_level("INFO", "fundamentallm"):
        tell_other_split(stored, with_global_batch(config, 2), Ranks(0, 2))
        tell_other_split(stored, with_global_batch(config, 4), Ranks(1, 4))
    assert caplog.records == []
    with caplog.at_level("INFO", "fundamentallm"):
        tell_other_split(stored, with_global_batch(config, 1), Ranks())
    (record,) = caplog.records
    assert record.message == (
        "a step was 2 ranks x 2 micro-batches x 4 rows and is now 1 rank x 4 micro-batches x 4"
        " rows: the restored state is bitwise what was saved, and the run goes on equal to"
        " rounding (dropout draws other numbers)"
    )


# ---------------------------------------------------------------- one order on any number of ranks


def tokens(seed: int, count: int = 903) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 250, count)


def of_mixture(batching: Batching, end_id: int | None = None) -> MixtureLoader:
    sources = [tokens(0, 400), tokens(1, 133), tokens(2, 500)]
    return MixtureLoader(sources, [3.0, 1.0, 2.0], ["a", "b", "c"], batching, end_id)


def of_examples(batching: Batching) -> ExampleLoader:
    chance = np.random.default_rng(4)
    examples = [
        Example("p" * chance.integers(0, 5), chr(97 + n % 26) * chance.integers(2, 7), f"x:{n}")
        for n in range(101)
    ]
    return ExampleLoader(encode_examples(examples, ByteTokenizer(), 12), batching)


LOADERS: dict[str, Callable[[Batching], EpochLoader]] = {
    "tokens": lambda batching: TokenWindowLoader(tokens(0), batching),
    "packed": lambda batching: TokenWindowLoader(tokens(0), batching, end_id=17),
    "mixture": of_mixture,
    "packed mixture": lambda batching: of_mixture(batching, end_id=17),
    "examples": of_examples,
}


def order(kind: str, ranks: int, batch_size: int, seed: int = 5) -> tuple[str, list[int]]:
    """Return a hash over what the ranks read in two epochs, in order, and the targets by step."""
    steps = 12 // (ranks * batch_size)
    shares = [
        LOADERS[kind](Batching(12, batch_size, steps, seed, rank, ranks)) for rank in range(ranks)
    ]
    digest = hashlib.sha256()
    targets = []
    for epoch in range(2):
        for step in range(len(shares[0])):
            windows = [share.window_at(epoch, step) for share in shares]
            targets.append(sum(window.num_tokens for window in windows))
            assert len({len(window.micro_batches) for window in windows}) == 1
            for together in zip(*(window.micro_batches for window in windows), strict=True):
                for batch in together:
                    real = (batch["target_ids"] != IGNORED).any(dim=1)
                    for row in torch.nonzero(real).flatten().tolist():
                        for key in sorted(batch):
                            digest.update(np.trim_zeros(batch[key][row].numpy(), "b").tobytes())
    return digest.hexdigest(), targets


@pytest.mark.parametrize("kind", LOADERS)
def test_the_order_is_one_on_any_number_of_ranks(kind: str) -> None:
    expected = order(kind, 1, 12)
    assert order(kind, 1, 12, seed=6)[0] != expected[0]
    for ranks, batch_size in SPLITS:
        assert order(kind, ranks, batch_size) == expected, (ranks, batch_size)
