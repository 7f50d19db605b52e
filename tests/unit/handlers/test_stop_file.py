from __future__ import annotations

from pathlib import Path

from ignite.engine import Events

from fundamentallm.config import TrainingConfig
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.handlers import StopFile
from fundamentallm.training.trainer import Trainer


def make_trainer(place: Path, eval_steps: int = 100) -> Trainer:
    train, val = tiny_loaders()
    config = TrainingConfig(checkpoint_dir=str(place / "checkpoints"), eval_steps=eval_steps)
    return Trainer(
        tiny_model(), train, val, device="cpu", config=config, handlers=(StopFile(place),)
    )


def test_a_file_called_stop_saves_and_stops_and_is_taken_away(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda: (tmp_path / "STOP").touch())
    trainer.train(num_epochs=1)
    assert trainer.state.iteration == 3
    assert not trainer.finished
    assert trainer.interrupted_by is None
    assert not (tmp_path / "STOP").exists()
    newest = CheckpointStore(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.step == 3

    again = make_trainer(tmp_path)
    again.resume(tmp_path / "checkpoints" / newest.name)
    again.train(num_epochs=1)
    assert again.finished


def test_it_is_seen_in_an_evaluation_which_then_runs_again(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_steps=2)
    seen: list[int] = []
    batches = list(trainer.val_loader)

    class Watched:
        def __len__(self) -> int:
            return len(batches)

        def __iter__(self):  # type: ignore[no-untyped-def]
            for number, batch in enumerate(batches):
                seen.append(number)
                if number == 0:
                    (tmp_path / "STOP").touch()
                yield batch

    assert len(batches) > 1
    trainer.val_loader = Watched()
    trainer.train(num_epochs=1)
    assert seen == [0]
    assert trainer.state.iteration == 2
    assert trainer.evaluation_pending()
