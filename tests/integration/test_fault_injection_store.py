"""Samples of the trials on the checkpoint store, and the mutants that each must catch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_injection import corruption, power_loss, retention
from fault_injection.faults import scratch_directory

from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import read_chunks
from fundamentallm.training.checkpoint import directory as checkpoint_directory
from fundamentallm.training.checkpoint import manifest
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.handlers import checkpointing


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory() as directory:
        yield directory


# Power loss


@pytest.mark.parametrize("count", [20, pytest.param(50, marks=pytest.mark.long)])
def test_what_was_saved_survives_a_loss_of_power(scratch: Path, count: int) -> None:
    result = power_loss.Trials(scratch).run(count)

    assert result.failures == []
    assert result.states["ordered"] >= count
    assert result.states["reordered"] >= count
    assert result.second_cuts > count / 10
    assert len(result.power_cuts) > count


@pytest.mark.parametrize("forgotten", ["sync", "sync_directory"])
def test_a_store_that_does_not_sync_is_caught(scratch: Path, forgotten: str) -> None:
    result = power_loss.Trials(scratch, forget=[forgotten]).run(10)

    assert result.violations["ordered"] > 0
    assert result.violations["reordered"] > 0


def test_a_store_that_deletes_before_it_commits_is_caught(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CheckpointStore.write

    def retire_and_write(
        store: CheckpointStore, name: str, tree: Any, *args: Any, **kw: Any
    ) -> Any:
        store.retire([name])
        return write(store, name, tree, *args, **kw)

    monkeypatch.setattr(CheckpointStore, "write", retire_and_write)
    monkeypatch.setattr(
        power_loss, "COURSES", {"overwrite": [power_loss.save(1), power_loss.save(1, 2.0)]}
    )

    assert power_loss.Trials(scratch).run(40).violations.total() > 0


# Corruption


@pytest.fixture
def damaged(scratch: Path) -> corruption.Campaign:
    return corruption.Trials(scratch)


@pytest.mark.parametrize("count", [60, pytest.param(160, marks=pytest.mark.long)])
def test_every_injection_is_detected_and_every_sound_one_loads(
    damaged: corruption.Campaign, count: int
) -> None:
    damaged.inject(count)
    damaged.refuse_nonfinite(every=10)
    damaged.refuse_unfit()
    damaged.accept(10)
    result = damaged.result

    assert result.failures == []
    assert result.detected == result.injections.total() == count
    assert set(result.injections) == set(corruption.INJECTIONS)
    assert result.nonfinite_refused == result.nonfinite == 30
    assert result.unfit_refused == result.unfit == len(corruption.UNFIT_WITHOUT)
    assert result.accepted == result.clean == 10
    assert result.tensors_a_load > 90


def test_hashes_that_are_not_compared_are_missed(
    damaged: corruption.Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint_directory, "_checked_chunks", lambda disk, path, record: read_chunks(disk, path)
    )
    monkeypatch.setattr(corruption, "INJECTIONS", {"flip_bit": corruption.flip_bit})
    damaged.inject(20)

    assert damaged.result.detected < 20


def test_a_manifest_that_is_not_compared_is_missed(
    damaged: corruption.Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_is_own_text", lambda fields, data: True)
    monkeypatch.setattr(corruption, "INJECTIONS", {"edit_manifest": corruption.edit_manifest})
    damaged.inject(20)

    assert damaged.result.detected < 20


def test_nonfinite_states_that_are_not_refused_are_missed(
    damaged: corruption.Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corruption.snapshot, "check_finite", lambda *_: None)
    damaged.refuse_nonfinite(every=100)

    assert damaged.result.nonfinite_refused < damaged.result.nonfinite


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_load_that_leaves_something_out_is_missed(
    damaged: corruption.Campaign, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getattr(damaged.trainer, part), "load_state_dict", lambda state: None)
    damaged.accept(2)

    assert damaged.result.accepted == 0
    assert "still holds NaN" in damaged.result.failures[0]


# Retention


@pytest.fixture
def quiet_log() -> Iterator[None]:
    logger = logging.getLogger("fundamentallm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("quiet_log")
def test_the_best_the_newest_and_the_pinned_stay() -> None:
    counts = retention.run(120)

    assert counts.total() >= 120
    assert counts["save"] > 10


@pytest.mark.usefixtures("quiet_log")
@pytest.mark.parametrize("mutant", ["best is not kept", "nan is a score", "one is enough"])
def test_a_careless_handler_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prune = CheckpointStore.prune
    if mutant == "best is not kept":

        def forgetful(
            store: CheckpointStore, keep_last: int, keep: Any = (), passing: Any = ()
        ) -> Any:
            (store.directory / "best").unlink(missing_ok=True)
            return prune(store, keep_last)

        monkeypatch.setattr(CheckpointStore, "prune", forgetful)
    elif mutant == "nan is a score":
        careless = SimpleNamespace(isfinite=lambda number: True, inf=math.inf, nan=math.nan)
        monkeypatch.setattr(checkpointing, "math", careless)
    else:
        monkeypatch.setattr(
            CheckpointStore,
            "prune",
            lambda store, *others: store.retire(store.step_names()[1:]) or (),
        )
    with pytest.raises((AssertionError, CheckpointError)):
        retention.run(300)
