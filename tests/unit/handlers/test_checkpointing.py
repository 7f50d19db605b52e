"""Which checkpoints are kept, which is the best, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from fundamentallm.compute.distributed import Ranks
from fundamentallm.config.training import TrainingConfig
from fundamentallm.errors import CheckpointError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.catalogue import Catalogue, Entry
from fundamentallm.training.checkpoint.finite import DamagedStateError
from fundamentallm.training.checkpoint.scores import Score
from fundamentallm.training.handlers import Checkpointing, Evaluation
from fundamentallm.training.trainer import Trainer

NAN = math.nan


def make_trainer(*handlers: Any, **options: Any) -> Trainer:
    torch.manual_seed(1)
    train, val = tiny_loaders()
    config = TrainingConfig(**{"learning_rate": 1e-2, "total_steps": 6, **options})
    return Trainer(
        tiny_model(dropout=0.1), train, val, device="cpu", config=config, handlers=handlers
    )


def kept(directory: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in directory.glob("step-*"))


def pointer(directory: Path, name: str) -> int | None:
    path = directory / name
    return int(path.read_text().strip()[5:]) if path.exists() else None


def scored_run(directory: Path, scores: list[float | None], n_saved: int = 2) -> Checkpointing:
    """Save after each step, with the score that the list has for that step."""
    handler = Checkpointing(
        directory, n_saved, score_function=lambda engine: scores[engine.state.iteration]
    )
    make_trainer(handler, checkpoint_steps=1, total_steps=len(scores) - 1).run()
    return handler


@pytest.mark.parametrize(
    ("scores", "best", "expected"),
    [
        ([None, 1.0, 2.0, 3.0, 4.0], 4, [3, 4]),
        ([None, 4.0, 3.0, 2.0, 1.0], 1, [1, 3, 4]),
        ([None, 1.0, 5.0, 2.0, 3.0, 4.0], 2, [2, 4, 5]),
        ([None, 2.0, 2.0, 2.0, 2.0], 1, [1, 3, 4]),  # of equals the first
        ([None, NAN, 1.0, NAN, NAN, NAN], 2, [2, 4, 5]),
        ([None, -math.inf, math.inf, -3.0, NAN], 3, [3, 4]),  # what is not finite is no score
        ([0.5, None, None, None], 0, [0, 2, 3]),
        ([None, NAN, NAN, NAN], None, [2, 3]),
        ([None, None, None, None], None, [2, 3]),
    ],
)
def test_keeps_the_newest_and_the_best(tmp_path, scores, best, expected):
    handler = scored_run(tmp_path, scores)
    assert kept(tmp_path) == expected
    assert pointer(tmp_path, "best") == best
    assert pointer(tmp_path, "last") == len(scores) - 1
    assert handler.best_step == best
    assert [entry.step for entry in handler.catalogue.entries] == expected[::-1]
    assert handler.last_checkpoint == tmp_path / f"step-{len(scores) - 1:08d}"


class Others(Ranks):
    """A rank whose others have these answers, in turn, and then the same as itself."""

    answers: ClassVar[list[bool]] = []

    def any(self, flag: bool) -> bool:
        return flag or bool(self.answers and self.answers.pop(0))


def test_a_checkpoint_that_another_rank_cannot_read_is_used_by_none(tmp_path):
    handler = Checkpointing(tmp_path, 3)
    trainer = make_trainer(handler, checkpoint_steps=2)
    trainer.run()
    trainer.ranks = Others()
    for bad, step in ((0, 6), (1, 4), (2, 2)):
        Others.answers[:] = [True] * bad
        found = handler.weights_before(trainer)
        expected = handler.store.read(tmp_path / f"step-{step:08d}")["model"]
        assert found is not None
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    Others.answers[:] = [True] * 3
    assert handler.weights_before(trainer) is None


def test_what_only_a_stop_has_saved_is_not_scheduled(tmp_path):
    handler = Checkpointing(tmp_path, 2)
    handler.catalogue = Catalogue(
        (Entry(6, "a", "run", for_a_stop=True), Entry(4, "b", "run", for_a_stop=False))
    )
    assert [handler.is_scheduled(step) for step in (6, 5, 4)] == [False, False, True]


def test_keeps_as_many_as_it_is_told(tmp_path):
    scored_run(tmp_path, [None] * 7, n_saved=4)
    assert kept(tmp_path) == [3, 4, 5, 6]


def test_saves_after_each_validation_and_at_both_ends(tmp_path):
    trainer = make_trainer(Evaluation(), Checkpointing(tmp_path, 9), total_steps=13, eval_steps=4)
    trainer.run()
    assert kept(tmp_path) == [0, 4, 8, 10, 12, 13]
    assert trainer.state.checkpoints == 6


def test_saves_at_its_own_pace(tmp_path):
    make_trainer(
        Evaluation(), Checkpointing(tmp_path, 9), total_steps=8, eval_steps=2, checkpoint_steps=3
    ).run()
    assert kept(tmp_path) == [0, 3, 6, 8]


def test_the_best_is_the_one_of_the_lowest_validation_loss(tmp_path):
    trainer = make_trainer(
        Evaluation(), Checkpointing(tmp_path), total_steps=12, eval_steps=3, learning_rate=0.1
    )
    trainer.run()
    losses = {entry["step"]: entry["val_loss"] for entry in trainer.history.validations}
    assert pointer(tmp_path, "best") == min(losses, key=losses.__getitem__)


def test_a_validation_of_an_earlier_step_is_no_score(tmp_path):
    # Steps 3 and 6 are saved, 4 is measured: no checkpoint has a loss of its own but the last.
    trainer = make_trainer(
        Evaluation(), Checkpointing(tmp_path, 9), total_steps=7, eval_steps=4, checkpoint_steps=3
    )
    best = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_CHECKPOINT_SAVED,
        lambda engine: best.append((engine.state.iteration, pointer(tmp_path, "best"))),
    )
    trainer.run()
    assert best == [(0, None), (3, None), (6, None), (7, None)]
    assert pointer(tmp_path, "best") == 7


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_a_resumed_run_is_bitwise_the_run_that_was_not_cut(tmp_path):
    whole = make_trainer(Evaluation(), Checkpointing(tmp_path / "whole"), total_steps=13)
    whole.run()

    options = {"total_steps": 13, "checkpoint_steps": 5}
    first = make_trainer(Evaluation(), Checkpointing(tmp_path / "cut"), **options)
    first.add_event_handler(
        TrainingEvents.FLLM_OPTIMIZER_STEPPED(once=7), lambda engine: engine.interrupt_run(15)
    )
    first.run()
    assert first.state.iteration == 7
    assert kept(tmp_path / "cut") == [0, 5, 7]

    resumed = make_trainer(Evaluation(), Checkpointing(tmp_path / "cut"), **options)
    torch.rand(5)  # the generators are restored, not left alone
    resumed.resume(tmp_path / "cut" / "step-00000007")
    resumed.run()
    assert resumed.run_id == first.run_id
    assert first.history.train_loss + resumed.history.train_loss == whole.history.train_loss
    assert resumed.history.validations == whole.history.validations
    for a, b in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(a, b)


def test_the_best_survives_a_resume(tmp_path):
    def scored(scores: dict[int, float], total_steps: int) -> Trainer:
        handler = Checkpointing(
            tmp_path, 2, score_function=lambda engine: scores.get(engine.state.iteration)
        )
        return make_trainer(handler, checkpoint_steps=1, total_steps=total_steps)

    scored({1: 5.0, 2: 1.0, 3: 1.0}, 3).run()
    resumed = scored({4: 4.0, 5: 4.5}, 5)
    resumed.resume(tmp_path / "step-00000003")
    resumed.run()
    assert pointer(tmp_path, "best") == 1
    assert kept(tmp_path) == [1, 4, 5]


def test_refuses_the_directory_of_another_run(tmp_path):
    make_trainer(Checkpointing(tmp_path), total_steps=2).run()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = make_trainer(Checkpointing(tmp_path), total_steps=2)
    with pytest.raises(CheckpointError, match="belong to another run"):
        other.run()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_refuses_to_keep_one_alone(tmp_path):
    with pytest.raises(ValueError, match="n_saved must be at least 2"):
        Checkpointing(tmp_path, n_saved=1)


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


def test_saves_further_objects(tmp_path):
    counter = Counter()
    trainer = make_trainer(Checkpointing(tmp_path, to_save={"mine": counter}), checkpoint_steps=2)
    trainer.add_event_handler(
        TrainingEvents.FLLM_METRICS_READY,
        lambda engine: setattr(counter, "value", 10 * engine.state.iteration),
    )
    trainer.run()
    other = Counter()
    resumed = make_trainer(Checkpointing(tmp_path, to_save={"mine": other}))
    resumed.resume(tmp_path / "step-00000004")
    assert other.value == 40


def test_the_manifest_describes_the_run(tmp_path):
    handler = Checkpointing(tmp_path)
    trainer = make_trainer(Evaluation(), handler, total_steps=3)
    trainer.description = {"corpus": "tiny"}
    trainer.run()
    zero = handler.store.manifest(tmp_path / "step-00000000").metadata
    last = handler.store.manifest(tmp_path / "step-00000003").metadata
    assert zero["val_loss"] is last["val_loss"] is None
    assert (zero["awaits_evaluation"], last["awaits_evaluation"]) == (False, True)
    assert zero["finished"] == ""
    assert last["finished"] == "the last step is done"
    assert zero["run_id"] == last["run_id"] == trainer.run_id
    assert zero["corpus"] == last["corpus"] == "tiny"


def test_a_failed_save_ends_the_run_and_leaves_the_earlier_ones_whole(tmp_path, monkeypatch):
    handler = Checkpointing(tmp_path)
    trainer = make_trainer(handler, checkpoint_steps=2)
    write = handler.store.write

    def full(name: str, *args: Any, **kwargs: Any) -> Path:
        if name == "step-00000004":
            raise CheckpointError("the disk is full")
        return write(name, *args, **kwargs)

    monkeypatch.setattr(handler.store, "write", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        trainer.run()
    assert [manifest.step for manifest in handler.store.list()] == [2, 0]
    assert trainer.state.checkpoints == 2


def damage(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")


class Telling(Ranks):
    """The writing rank; notes each text that it tells the others."""

    told: ClassVar[list[Any]] = []

    def first_decides(self, decide: Any) -> Any:
        self.told.append(super().first_decides(decide))
        return self.told[-1]


def test_the_other_ranks_are_told_what_the_directory_has(tmp_path):
    """After each save, after each score, and where a run continues."""

    def told_all() -> bool:
        texts = [text for text in Telling.told if isinstance(text, str)]
        return bool(texts) and texts[-1] == handler.catalogue.to_json()

    seen: list[bool] = []
    for total_steps in (6, 9):
        Telling.told.clear()
        handler = Checkpointing(tmp_path, 2)
        trainer = make_trainer(Evaluation(), handler, eval_steps=3, total_steps=total_steps)
        trainer.ranks = Telling()
        if total_steps == 9:
            trainer.resume(tmp_path / "step-00000006")
            assert told_all()
        trainer.add_event_handler(
            TrainingEvents.FLLM_CHECKPOINT_SAVED, lambda: seen.append(told_all())
        )
        trainer.run()
        assert told_all()
        newest = handler.catalogue.newest
        assert newest is not None
        assert newest.ended == trainer.finished != ""
        assert sorted(entry.step for entry in handler.catalogue.entries) == kept(tmp_path)
    assert seen == [True] * 4  # of steps 0, 3, 6 and 9


def test_without_an_evaluation_nothing_is_said_of_a_checkpoint_but_in_itself(tmp_path):
    handler = Checkpointing(tmp_path)
    make_trainer(handler, total_steps=2).run()
    assert not handler.scores.path.exists()
    manifest = handler.store.manifest(tmp_path / "step-00000002")
    assert handler.scores.end_of(manifest) == "the last step is done"


def test_a_state_is_on_the_disk_where_it_is_equal_or_only_its_evaluation_is_newer(tmp_path):
    handler = Checkpointing(tmp_path)
    trainer = make_trainer(handler, total_steps=2)
    trainer.run()
    known = handler.catalogue.get(2)
    assert known is not None
    state = handler.store.read(tmp_path / "step-00000002")
    other = {**state, "objects": {"mine": 1}}
    for awaits, evaluated, expected in (
        (True, 2, True),
        (True, 1, False),
        (False, 2, False),
        (False, 1, False),
    ):
        trainer.state.evaluated_step = evaluated
        entry = replace(known, awaits_evaluation=awaits)
        assert handler._is_on_disk(trainer, entry, other) is expected
        assert handler._is_on_disk(trainer, entry, state) is True
    damage(tmp_path / "step-00000002")
    assert handler._is_on_disk(trainer, replace(known, awaits_evaluation=False), state) is False


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("for_a_stop", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_an_end_with_a_state_on_the_disk_makes_it_one_of_the_schedule(
    tmp_path, pending, for_a_stop, before
):
    handler, reported = Checkpointing(tmp_path), []
    run = SimpleNamespace(
        ranks=Ranks(),
        finished="enough",
        evaluation_pending=lambda: pending,
        report_saved=reported.append,
    )
    known = Entry(4, "hash", "run", for_a_stop, awaits_evaluation=before, uncounted=before)
    handler.catalogue = Catalogue((known,))
    handler._note_end_due(run, known)  # type: ignore[arg-type]
    assert handler.catalogue.get(4) == replace(
        known,
        for_a_stop=False,
        awaits_evaluation=pending or before,
        uncounted=for_a_stop or before,
    )
    assert reported == [tmp_path / "step-00000004"] * for_a_stop
    due = [Score(4, "hash", measured=False, due="enough")]
    assert handler.scores.all() == due * pending


def test_an_origin_counts_only_for_its_step(tmp_path):
    handler = Checkpointing(tmp_path)
    assert (handler.has_ended_at(4), handler.end_due_at(4)) == (False, "")
    handler._origin = 4, True, "enough"
    assert [handler.has_ended_at(step) for step in (3, 4, 5)] == [False, True, False]
    assert [handler.end_due_at(step) for step in (3, 4, 5)] == ["", "enough", ""]
    handler._origin = 4, False, ""
    assert (handler.has_ended_at(4), handler.end_due_at(4)) == (False, "")


def test_nothing_is_written_where_the_state_of_another_rank_is_damaged(tmp_path, monkeypatch):
    handler = Checkpointing(tmp_path)
    trainer = make_trainer(handler, checkpoint_steps=2)
    error = DamagedStateError("the state of another rank is not finite")
    monkeypatch.setattr(
        snapshot,
        "damage_on_any_rank",
        lambda trainer, state: error if trainer.state.iteration == 4 else None,
    )
    with pytest.raises(DamagedStateError, match="another rank"):
        trainer.run()
    assert trainer.state.iteration == 4
    assert kept(tmp_path) == [0, 2]
    assert [entry.step for entry in handler.catalogue.entries] == [2, 0]


def test_a_save_whose_old_ones_stay_is_a_save(tmp_path, monkeypatch, caplog):
    handler = Checkpointing(tmp_path, 2, on_error="continue")
    assert not handler.asynchronous
    assert handler.directory == tmp_path
    trainer = make_trainer(handler, checkpoint_steps=2)

    def fails(*_: Any) -> None:
        raise CheckpointError("it cannot be removed")

    monkeypatch.setattr(handler.store, "prune", fails)
    trainer.run()
    assert [entry.step for entry in handler.catalogue.entries] == [6, 4, 2, 0]
    assert trainer.state.last_checkpoint == tmp_path / "step-00000006"
    assert "step 6: saved, but old checkpoints are not removed" in caplog.text


def test_a_save_of_a_stop_takes_the_place_of_no_other(tmp_path):
    def make(total_steps: int = 10) -> Trainer:
        return make_trainer(Checkpointing(tmp_path, 2), checkpoint_steps=4, total_steps=total_steps)

    stopped = make()
    stopped.add_event_handler(
        TrainingEvents.FLLM_OPTIMIZER_STEPPED(once=6), lambda engine: engine.interrupt_run(15)
    )
    stopped.run()
    assert kept(tmp_path) == [0, 4, 6]
    resumed, seen = make(), []
    resumed.resume(tmp_path / "step-00000006")
    resumed.add_event_handler(
        TrainingEvents.FLLM_CHECKPOINT_SAVED, lambda: seen.append(kept(tmp_path))
    )
    resumed.run()
    assert seen == [[4, 8], [8, 10]]


def test_the_way_back_leads_to_the_step_or_to_the_oldest(tmp_path):
    handler = Checkpointing(tmp_path, 3)
    trainer = make_trainer(handler, checkpoint_steps=2)
    trainer.run()
    model = handler.store.read(tmp_path / "step-00000004")["model"]
    found = handler.weights_before(trainer, 4)
    assert found is not None
    assert all(torch.equal(found[name], model[name]) for name in model)
    assert handler.weights_before(trainer, 1) is None
    for before, step in ((4, 4), (1, 2)):
        handler.restore_before(trainer, before)
        assert trainer.state.iteration == step
        assert trainer.state.last_checkpoint == tmp_path / f"step-{step:08d}"
        assert pointer(tmp_path, "last") == step


def test_where_a_step_cannot_be_saved_again_its_earlier_checkpoint_counts(tmp_path, monkeypatch):
    counter = Counter()
    handler = Checkpointing(tmp_path, 9, to_save={"mine": counter}, on_error="continue")
    trainer = make_trainer(handler, checkpoint_steps=2)
    write, names = handler.store.write, []

    def once(name: str, *args: Any, **kwargs: Any) -> Path:
        names.append(name)
        if names.count(name) > 1:
            raise CheckpointError("the disk is full")
        return write(name, *args, **kwargs)

    def change_and_end(engine: Trainer) -> None:
        if engine.state.iteration == 4:
            counter.value = 7
            engine.terminate()

    monkeypatch.setattr(handler.store, "write", once)
    trainer.add_event_handler(TrainingEvents.FLLM_CHECKPOINT_SAVED, change_and_end)
    trainer.run()
    assert names == [f"step-{step:08d}" for step in (0, 2, 4, 4)]
    entry = handler.catalogue.get(4)
    assert entry is not None
    assert entry.hash == handler.store.manifest(tmp_path / "step-00000004").hash
    assert handler.step_to_restore() == 4
    assert handler.store.read(tmp_path / "step-00000004")["objects"]["mine"]["value"] == 0


def test_only_a_loss_that_was_measured_at_its_step_is_in_a_manifest(tmp_path):
    handler = Checkpointing(tmp_path, 9)
    trainer = make_trainer(
        Evaluation(), handler, total_steps=7, eval_steps=4, eval_epochs=False, checkpoint_steps=6
    )
    metadata = handler._metadata
    trainer.run()
    assert math.isfinite(trainer.state.metrics["val/loss"])
    assert handler.store.manifest(tmp_path / "step-00000006").metadata["val_loss"] is None
    assert metadata(trainer)["val_loss"] == trainer.state.metrics["val/loss"]


def test_the_log_names_the_best(tmp_path, caplog):
    with caplog.at_level("DEBUG"):
        scored_run(tmp_path, [None, 1.0, 0.5])
    said = [record.getMessage() for record in caplog.records if ": saved" in record.getMessage()]
    assert said == ["step 0: saved", "step 1: saved, the best so far", "step 2: saved"]


def test_the_log_names_the_best_of_the_evaluations(tmp_path, caplog):
    trainer = make_trainer(Evaluation(), Checkpointing(tmp_path), eval_steps=2, learning_rate=3.0)
    with caplog.at_level("INFO"):
        trainer.run()
    lowest, expected = math.inf, []
    for entry in trainer.history.validations:
        if entry["val_loss"] < lowest:
            lowest = entry["val_loss"]
            expected.append(f"step {entry['step']}: the best so far")
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "the best so far" in line] == expected
    assert 0 < len(expected) < len(trainer.history.validations)


def test_there_is_no_way_back_where_every_checkpoint_is_damaged(tmp_path):
    handler = Checkpointing(tmp_path)
    trainer = make_trainer(handler, checkpoint_steps=2)
    trainer.run()
    names = [path.name for path in sorted(tmp_path.glob("step-*"))]
    assert len(names) == 3
    for name in names:
        damage(tmp_path / name)
    with pytest.raises(CheckpointError, match="no checkpoint left to go back to"):
        handler.restore_before(trainer)
    assert trainer.state.iteration == 6
    assert sorted(path.name for path in (tmp_path / "corrupt").iterdir()) == names
    assert handler.last_checkpoint is None
    assert handler.step_to_restore() is None


def test_the_way_back_passes_a_damaged_checkpoint_over(tmp_path):
    handler = Checkpointing(tmp_path)
    trainer = make_trainer(handler, checkpoint_steps=2)
    trainer.run()
    assert handler.step_to_restore() == 6
    for path in (tmp_path / "step-00000006").iterdir():
        if path.suffix != ".json":
            path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    handler.restore_before(trainer)
    assert trainer.state.iteration == handler.step_to_restore() == 4
