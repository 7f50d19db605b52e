"""The way back to earlier checkpoints, and whose the directory is that holds them."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ignite.handlers import Checkpoint
from torch import Tensor

from fundamentallm.errors import CheckpointError
from fundamentallm.files.run_layout import BEST, CORRUPT, LAST, SUPERSEDED
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.background_save import BackgroundSave
from fundamentallm.training.checkpoint.catalogue import Catalogue, Entry, Survey
from fundamentallm.training.checkpoint.scores import Scores
from fundamentallm.training.checkpoint.store import STEP_NAME, CheckpointStore, step_name, step_of
from fundamentallm.training.checkpoint.tree import Stateful
from fundamentallm.training.handlers.criterion import Criterion
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.saved import saved_count, saved_number

logger = logging.getLogger(__name__)


class Restoring(Checkpoint):
    """Knows the checkpoints that a run can continue from, and loads them; it saves none.

    Args:
        store: the directory of the checkpoints.
        n_saved: how many of the newest are kept; the best is kept besides.
        to_save: further objects with `state_dict` and `load_state_dict`, by name.
        criterion: what makes a checkpoint the best.

    Attributes:
        catalogue: the checkpoints that training can continue from.
        best_score: higher is better; minus infinity before the first.
        best_step: its step.
    """

    def __init__(
        self,
        store: CheckpointStore,
        n_saved: int,
        to_save: Mapping[str, Stateful],
        criterion: Criterion,
    ) -> None:
        super().__init__(to_save=dict(to_save), save_handler=store.write, n_saved=n_saved)
        self.store = store
        self.criterion = criterion
        self.best_score = -math.inf
        self.best_step: int | None = None
        self.catalogue = Catalogue()
        self._judged: int | None = None  # the step that was compared with the best
        # The step that the run continues from, whether it has ended there, why it was to end there.
        self._origin: tuple[int | None, bool, str] = None, False, ""
        self._is_ours = False
        self._background: BackgroundSave | None = None

    @property
    def directory(self) -> Path:
        """The directory of the checkpoints."""
        return self.store.directory

    @property
    def scores(self) -> Scores:
        """What became of the checkpoints."""
        return Scores(self.store.directory, self.store.filesystem)

    @property
    def last_checkpoint(self) -> Path | None:
        """The path of the newest checkpoint, None before the first."""
        newest = self.catalogue.newest
        return self.store.directory / newest.name if newest is not None else None

    # ------------------ where the run continues

    def has_ended_at(self, step: int) -> bool:
        """Return whether the run had ended with the step that it continues from."""
        return self._origin[0] == step and self._origin[1]

    def end_due_at(self, step: int) -> str:
        """Return why the run is to end with the step that it continues from; empty if it is not."""
        return self._origin[2] if self._origin[0] == step else ""

    def is_scheduled(self, step: int) -> bool:
        """Return whether the step has a checkpoint that was saved on schedule."""
        entry = self.catalogue.get(step)
        return entry is not None and not entry.for_a_stop

    # ------------------ the way back

    def step_to_restore(self, before: int | None = None) -> int | None:
        """Return the step of the newest checkpoint that is at most `before`, else of the oldest."""
        found = self._to_restore(self.catalogue, before)
        return found.step if found is not None else None

    def restore_before(self, trainer: TrainingLoop, before: int | None = None) -> None:
        """Load that checkpoint into the trainer; if it is damaged, the next older one.

        Raises:
            CheckpointError: there is none, or it is of another run.
        """
        self._finish_background(trainer)
        for entry, state, fault in self._readings(trainer, before):
            if fault is None:
                self._load(trainer, state, self.store.directory / entry.name, entry)
                self._leave_later_ones(trainer)
                return
            trainer.ranks.first_decides(functools.partial(self._set_aside, {entry.name: fault}))
            self.catalogue = self.catalogue.without([entry.name])
        raise CheckpointError(
            "there is no checkpoint left to go back to", where=str(self.store.directory)
        )

    def _finish_background(self, trainer: TrainingLoop) -> None:
        """Wait for the save under way, if the subclass makes such ones."""

    def weights_before(
        self, trainer: TrainingLoop, before: int | None = None
    ) -> Mapping[str, Tensor] | None:
        """Return the model's state in the newest checkpoint that is at most `before`, or None."""
        for _, state, fault in self._readings(trainer, before, or_oldest=False):
            if fault is None:
                model: Mapping[str, Tensor] = state["model"]
                return model
        return None

    def _to_restore(self, catalogue: Catalogue, before: int | None) -> Entry | None:
        assert self.n_saved is not None
        return catalogue.to_restore(before, self.n_saved, self.best_step)

    def _readings(
        self, trainer: TrainingLoop, before: int | None, or_oldest: bool = True
    ) -> Iterator[tuple[Entry, dict[str, Any], CheckpointError | None]]:
        """Read the checkpoint to restore, then the next older one, and so on, on every rank.

        Yields:
            The entry, the state, and its error on this or on another rank.
        """
        catalogue, save = self.catalogue, self._background
        if save is not None and trainer.ranks.any(
            save.is_lost
        ):  # otherwise this waited until it is written
            catalogue = catalogue.without([save.name])
        while (entry := self._to_restore(catalogue, before)) is not None:
            if not or_oldest and before is not None and entry.step > before:
                return
            path = self.store.directory / entry.name
            state: dict[str, Any] = {}
            fault: CheckpointError | None = None
            try:
                manifest, state = self.store.load(path)
                if manifest.hash != entry.hash and entry.hash:
                    raise CheckpointError(
                        "this is not the checkpoint that the run has saved", where=str(path)
                    )
            except CheckpointError as error:
                fault = error
            if trainer.ranks.any(fault is not None):
                fault = fault or CheckpointError("another rank cannot read it", where=str(path))
            yield entry, state, fault
            catalogue = catalogue.without([entry.name])

    def restore(self, trainer: TrainingLoop, path: Path, survey: Survey | None = None) -> None:
        """Load a checkpoint into the trainer; later ones of its run are set aside.

        Args:
            trainer: of the run.
            path: the checkpoint.
            survey: of its directory, if it was read already.

        Raises:
            CheckpointError: it is damaged or of another run; nothing was changed.
        """
        survey = survey or Survey(
            CheckpointStore(path.parent, self.store.filesystem), snapshot.check_usable
        )
        manifest, scores = survey.open(path.name), Scores(path.parent, self.store.filesystem)
        origin = manifest.step, scores.has_ended_at(manifest), scores.end_due_at(manifest)
        self._load(trainer, survey.take(path.name), path, Entry.of(manifest, scores))
        self._origin = origin
        if path.parent.resolve() == self.store.directory.resolve():
            self._is_ours = False
            self._take_over(trainer, survey)
            self._leave_later_ones(trainer)
        else:  # the best is in that directory too, where no pointer of this one leads
            self.best_score, self.best_step = -math.inf, None

    def _load(
        self, trainer: TrainingLoop, state: Mapping[str, Any], path: Path, entry: Entry
    ) -> None:
        snapshot.restore(trainer, state)
        trainer.state.checkpoints += entry.uncounted
        for name, thing in self.to_save.items():
            thing.load_state_dict(state["objects"][name])
        trainer.state.last_checkpoint = path
        self._judged = None

    def _leave_later_ones(self, trainer: TrainingLoop) -> None:
        """Make the restored state the newest, and keep the best only if it is still there."""
        step = trainer.state.iteration
        self.catalogue = self.catalogue.until(step)
        if self.catalogue.get(self.best_step) is None:
            self.best_score, self.best_step = -math.inf, None

        def set_later_ones_aside() -> None:
            superseded = self.store.supersede(step)
            self.scores.cut_back(step)
            self._point_at(step, self.best_step)
            if superseded:
                logger.info(
                    "continuing from step %d: moved %s to %s",
                    step,
                    ", ".join(superseded),
                    self.store.directory / SUPERSEDED,
                )

        trainer.ranks.first_decides(set_later_ones_aside)

    # ------------------ whose directory it is

    def _take_over(self, trainer: TrainingLoop, survey: Survey | None = None) -> None:
        """Before the first save: refuse another run's directory, and clean up after a crash.

        Args:
            trainer: of the run.
            survey: of the directory, if it was read already.

        Raises:
            CheckpointError: it holds another run's checkpoints.
        """
        if self._is_ours:
            return
        survey = survey or Survey(self.store, snapshot.check_usable)

        def look_over() -> None:
            for manifest in survey.manifests():
                self.store.trust(manifest)
            self.catalogue = Catalogue.of(
                Entry.of(manifest, self.scores) for manifest in survey.usable.values()
            )
            newest = self.catalogue.newest
            if newest is not None and newest.run_id != trainer.run_id:
                raise CheckpointError(
                    "the checkpoints here belong to another run",
                    where=str(self.store.directory),
                    fix="choose another checkpoint directory, or continue that run with"
                    " trainer.resume(path)",
                )
            if self.store.directory.exists():
                self.store.recover()  # leftovers of a killed process
            self._set_aside(
                {name: survey.faults[name] for name in survey.faults if self.store.holds(name)}
            )

        trainer.ranks.first_decides(look_over)
        self._tell_catalogue(trainer)
        self._is_ours = True

    def _set_aside(self, faults: Mapping[str, CheckpointError]) -> None:
        """Move damaged checkpoints to `corrupt/`; log the error of each."""
        for name in sorted(filter(STEP_NAME.fullmatch, faults), key=step_of, reverse=True):
            self.store.quarantine([name])
            logger.warning("moved to %s: %s", self.store.directory / CORRUPT, faults[name])

    def _tell_catalogue(self, trainer: TrainingLoop) -> None:
        told = trainer.ranks.first_decides(self.catalogue.to_json)
        self.catalogue = Catalogue.from_json(told)

    # ------------------ the best and the newest

    def _point_at(self, step: int, best_step: int | None) -> None:
        """Write both pointers, also where a crash has left wrong ones."""
        self.store.point(LAST, step_name(step))
        self._point_at_best(best_step)

    def _point_at_best(self, best_step: int | None) -> None:
        if best_step is None:
            self.store.forget(BEST)
        elif self.store.pointed(BEST) != step_name(best_step):
            self.store.point(BEST, step_name(best_step))

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the best score and its step."""
        best = {"best_score": self.best_score, "best_step": self.best_step}
        return {**best, **self.criterion.state_of()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the saved best score and its step; those of another metric do not count."""
        known = state_dict["best_step"] is not None
        self.best_score = saved_number(state_dict, "best_score")
        self.best_step = saved_count(state_dict, "best_step") if known else None
        if not self.criterion.is_of(state_dict):
            self.best_score, self.best_step = -math.inf, None
