"""Which checkpoint a run goes back to, and that no question about it reads the disk."""

from __future__ import annotations

import shutil
from collections import Counter
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

from fundamentallm.config.training import TrainingConfig
from fundamentallm.errors import CheckpointError
from fundamentallm.events import TrainingEvents
from fundamentallm.files.filesystem import Filesystem
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.catalogue import Catalogue, Entry, Survey
from fundamentallm.training.checkpoint.directory import CONTENT_FILES
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.handlers import Checkpointing, Evaluation
from fundamentallm.training.trainer import Trainer


def catalogue(*steps: int, stops: tuple[int, ...] = ()) -> Catalogue:
    return Catalogue.of(Entry(step, f"{step:x}", "r", step in stops) for step in steps)


# ------------------------------------------------------------------ what it answers


@pytest.mark.parametrize(
    ("steps", "stops", "before", "best", "expected"),
    [
        ((), (), None, None, None),
        ((0, 4, 8), (), None, None, 8),
        ((0, 4, 8), (), 7, None, 4),
        ((0, 4, 8), (), 4, None, 4),
        ((4, 8), (), 3, None, 4),  # none is early enough: the oldest
        ((0, 4, 8, 9), (9,), None, None, 8),  # what only a stop asked for does not count
        ((7, 9), (7, 9), None, None, 9),  # unless there is nothing else
        ((7, 9), (7, 9), 8, None, 9),
        ((0, 4, 8, 12, 16), (), 5, None, 8),  # kept by a kill alone: three are kept
        ((0, 4, 8, 12, 16), (), 5, 4, 4),  # but the best is
        ((0, 4, 8, 12, 13, 16), (13,), 5, None, 8),
    ],
)
def test_the_way_back(steps, stops, before, best, expected):
    found = catalogue(*steps, stops=stops).to_restore(before, 3, best)
    assert (found and found.step) == expected


def test_entries_come_and_go():
    known = catalogue(0, 4, 8)
    assert [entry.step for entry in known.including(Entry(6, "x", "r", False)).entries] == [
        *(8, 6, 4, 0)
    ]
    again = known.including(Entry(4, "new", "r", True))
    assert again.get(4) == Entry(4, "new", "r", True)
    assert again.names(for_a_stop=True) == {"step-00000004"}
    assert again.names(for_a_stop=False) == {"step-00000000", "step-00000008"}
    assert [entry.step for entry in known.without(["step-00000004"]).entries] == [8, 0]
    assert [entry.step for entry in known.until(4).entries] == [4, 0]
    assert known.newest is not None
    assert known.newest.step == 8
    assert known.get(5) is known.get(None) is None


def test_what_is_told_to_another_rank_is_what_the_first_knows():
    known = catalogue(0, 4, 8, stops=(4,)).including(Entry(9, "", None, False))
    assert Catalogue.from_json(known.to_json()) == known
    assert Catalogue.from_json(Catalogue().to_json()) == Catalogue()


# ------------------------------------------------------------------ what is read


class Reads(Filesystem):
    """Counts how often each checkpoint's content files are opened."""

    def __init__(self) -> None:
        self.opened: Counter[tuple[str, str]] = Counter()

    def open(self, path: Path) -> FileIO:
        if path.name in CONTENT_FILES:
            self.opened[path.parent.name, path.name] += 1
        return super().open(path)

    def taken(self) -> dict[str, set[int]]:
        """Return, by checkpoint, how often its files were opened, and begin anew."""
        found: dict[str, set[int]] = {}
        for (name, file), _ in self.opened.items():
            found.setdefault(name, set()).add(self.opened[name, file])
        assert all(
            {file for name, file in self.opened if name == checkpoint} == CONTENT_FILES
            for checkpoint in found
        )
        self.opened.clear()
        return found


def make_trainer(directory: Path, reads: Filesystem | None = None, **options: Any) -> Trainer:
    torch.manual_seed(1)
    config = TrainingConfig(**{"total_steps": 8, "eval_steps": 2, "learning_rate": 1e-2, **options})
    handler = Checkpointing(directory, 4)
    if reads is not None:
        handler.store.filesystem = reads
    return Trainer(
        tiny_model(dropout=0.1),
        *tiny_loaders(),
        device="cpu",
        config=config,
        handlers=(Evaluation(), handler),
    )


def handler_of(trainer: Trainer) -> Checkpointing:
    assert isinstance(trainer.restore_point, Checkpointing)
    return trainer.restore_point


ALL = [f"step-{step:08d}" for step in (2, 4, 6, 8)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    make_trainer(directory).run()
    assert sorted(path.name for path in directory.glob("step-*")) == ALL
    return directory


@pytest.fixture
def place(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "checkpoints"))


def damage(directory: Path, name: str) -> None:
    path = directory / name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize("name", ["", *ALL])
def test_a_start_reads_each_checkpoint_once(place, name):
    """Chosen as the newest, or by its name; looked over, loaded, and the later ones set aside."""
    reads = Reads()
    survey = Survey(CheckpointStore(place, reads), snapshot.check_usable)
    chosen = survey.open(name) if name else survey.newest()
    assert chosen is not None
    assert chosen.name == name or (not name and chosen.step == 8)
    trainer = make_trainer(place, reads, total_steps=11)
    trainer.resume(place / chosen.name, survey)
    assert trainer.state.iteration == chosen.step
    assert reads.taken() == {each: {1} for each in ALL}
    trainer.run()
    # To settle and prune needs no second look; what is written is compared with the memory.
    assert not set(reads.taken()) & set(ALL[: ALL.index(chosen.name) + 1])


def test_a_resume_without_a_survey_reads_each_once_too(place):
    reads = Reads()
    make_trainer(place, reads).resume(place / "step-00000006")
    assert reads.taken() == {each: {1} for each in ALL}


def test_a_start_reads_a_damaged_one_once_and_sets_it_aside(place, caplog):
    damage(place, "step-00000008")
    damage(place, "step-00000004")
    (place / ".step-00000009.tmp-0123456789ab").mkdir()  # left by a killed save
    reads = Reads()
    survey = Survey(CheckpointStore(place, reads), snapshot.check_usable)
    newest = survey.newest()
    assert newest is not None
    trainer = make_trainer(place, reads)
    trainer.resume(place / newest.name, survey)
    assert trainer.state.iteration == 6
    assert max(reads.opened.values()) == 1
    assert sorted(path.name for path in (place / "corrupt").iterdir()) == [ALL[1], ALL[3]]
    assert [entry.step for entry in handler_of(trainer).catalogue.entries] == [6, 2]
    assert not list(place.glob(".*"))
    moved = [record.getMessage() for record in caplog.records if "moved" in record.getMessage()]
    assert ["step-00000008" in line for line in moved] == [True, False]  # newest first


def test_each_resume_looks_at_the_directory_as_it_is_then(place, caplog):
    trainer = make_trainer(place)
    with caplog.at_level("INFO"):
        trainer.resume(place / "step-00000008")
        assert "continuing from" not in caplog.text
        damage(place, "step-00000004")
        trainer.resume(place / "step-00000006")
    assert "continuing from step 6: moved step-00000008 to" in caplog.text
    assert [path.name for path in (place / "corrupt").iterdir()] == ["step-00000004"]
    assert [path.name for path in (place / "superseded").iterdir()] == ["step-00000008"]
    assert (place / "last").read_text() == "step-00000006\n"
    assert [entry.step for entry in handler_of(trainer).catalogue.entries] == [6, 2]


def test_a_damaged_one_that_is_named_is_refused_each_time(place):
    damage(place, "step-00000006")
    survey = Survey(CheckpointStore(place), snapshot.check_usable)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="damaged"):
            survey.open("step-00000006")
    newest = survey.newest()
    assert newest is not None
    assert newest.step == 8


def test_questions_read_nothing_and_a_rollback_what_it_loads(tmp_path):
    reads = Reads()
    trainer = make_trainer(tmp_path, reads)
    loaded = []

    @trainer.on(Events.ITERATION_STARTED(once=7))
    def ask_and_go_back() -> None:
        if loaded:
            return
        reads.opened.clear()  # what was written was compared
        handler = handler_of(trainer)
        answers = trainer.restore_step(), trainer.restore_step(5), trainer.restore_step(1)
        assert answers == (6, 4, 0)
        assert handler.last_checkpoint == tmp_path / "step-00000006"
        trainer.roll_back("a test", 5)
        assert not reads.opened

    @trainer.on(TrainingEvents.FLLM_ROLLED_BACK)
    def look() -> None:
        loaded.append((trainer.state.iteration, reads.taken()))

    trainer.run()
    assert loaded == [(4, {"step-00000004": {1}})]
    assert trainer.state.iteration == 8


@pytest.mark.parametrize("fault", ["damaged", "another one"])
def test_a_rollback_sets_aside_what_is_no_longer_what_was_saved(tmp_path, finished, fault, caplog):
    trainer = make_trainer(tmp_path)
    went_to = []

    @trainer.on(Events.ITERATION_STARTED(once=7))
    def spoil_and_go_back() -> None:
        if went_to:
            return
        if fault == "damaged":
            damage(tmp_path, "step-00000006")
        else:
            shutil.rmtree(tmp_path / "step-00000006")
            shutil.copytree(finished / "step-00000006", tmp_path / "step-00000006")
        trainer.roll_back("a test")

    trainer.add_event_handler(
        TrainingEvents.FLLM_ROLLED_BACK, lambda: went_to.append(trainer.state.iteration)
    )
    trainer.run()
    assert went_to == [4]
    assert [path.name for path in (tmp_path / "corrupt").iterdir()] == ["step-00000006"]
    assert "moved to" in caplog.text
    assert {"damaged": "is damaged", "another one": "not the checkpoint that"}[fault] in caplog.text
    assert trainer.state.iteration == 8


def test_without_a_checkpoint_left_a_rollback_ends_the_run(tmp_path):
    trainer = make_trainer(tmp_path)

    @trainer.on(Events.ITERATION_STARTED(once=3))
    def spoil_and_go_back() -> None:
        for path in tmp_path.glob("step-*"):
            damage(tmp_path, path.name)
        trainer.roll_back("a test")

    with pytest.raises(CheckpointError, match="no checkpoint left to go back to"):
        trainer.run()
    assert len(list((tmp_path / "corrupt").iterdir())) == 2


def test_weights_of_an_earlier_step_are_verified_when_they_are_read(tmp_path):
    trainer = make_trainer(tmp_path)
    store = CheckpointStore(tmp_path)
    found: list[list[int]] = []
    nothing_early_enough: list[dict[str, set[int]]] = []
    reads = Reads()

    @trainer.on(Events.ITERATION_STARTED(once=7))
    def look() -> None:
        expected = {step: store.read(tmp_path / f"step-{step:08d}")["model"] for step in (0, 2, 6)}
        damage(tmp_path, "step-00000004")
        for before in (None, 5, 1, -1):
            reads.opened.clear()
            weights = trainer.weights_before(before)
            if before == -1:
                nothing_early_enough.append(reads.taken())
            found.append(
                [
                    step
                    for step, model in expected.items()
                    if weights and all(torch.equal(model[name], weights[name]) for name in model)
                ]
            )

    handler_of(trainer).store.filesystem = reads
    trainer.run()
    assert found == [[6], [2], [0], []]
    assert nothing_early_enough == [{}]
    assert not (tmp_path / "corrupt").exists()  # to look is not to go back
