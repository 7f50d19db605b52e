"""The whole state of a training run as one tree of plain values and tensors, and back.

```
trainer     position, counters, interventions                 random      every generator, per rank
model       weights and buffers                        handlers    by name: what each declares
optimizer   moments and group values                   foreign     the same for Ignite's own
precision   the loss scale                             buffers     names of the model's buffers
```

`foreign` is there only where handlers of Ignite are. What they average may be infinite.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.rng import capture_rng, restore_rng
from fundamentallm.data.permutation import derive_key
from fundamentallm.errors import CheckpointError
from fundamentallm.training.checkpoint.finite import DamagedStateError, bit_sum, check_finite
from fundamentallm.training.checkpoint.manager import (
    check_model_state,
    check_optimizer_state,
    on_own_kernels,
)
from fundamentallm.training.checkpoint.tree import copied, equal
from fundamentallm.training.foreign import is_foreign, load_state, state_of
from fundamentallm.training.loop import TrainingLoop

logger = logging.getLogger(__name__)


class RandomState:
    """The random generators of all ranks.

    Dropout differs over the ranks, so each rank's torch generators are kept. Of Python's and
    NumPy's only the writer's are: nothing in training draws from them. On more ranks than the state
    is of, a new rank's torch generators follow from rank 0's state and its own number, so that a
    second resume or a rollback gives it the same numbers, and it draws none that it has drawn.

    Args:
        ranks: this process among the others.
        device: where it computes. A rank's GPU may have another number each time; None: the states
            of all GPUs, by their numbers.
    """

    def __init__(self, ranks: Ranks, device: torch.device | None = None) -> None:
        self.ranks, self.device = ranks, device

    def state_dict(self) -> dict[str, Any]:
        """Collect the states; every rank must call it."""
        own = capture_rng(self.device)
        state: dict[str, Any] = {"rank 0": own}
        gathered = {
            name: self.ranks.gather_bytes(tensor)
            for name, tensor in _torch_states(own).items()
            if not self.ranks.alone
        }
        for rank in range(1, self.ranks.world_size):
            state[f"rank {rank}"] = {name: parts[rank] for name, parts in gathered.items()}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore this rank's generators; say so if the state is of another number of ranks."""
        saved, now = len(state_dict), self.ranks.world_size
        if saved != now and self.ranks.is_writer:
            logger.info(
                "the random numbers were those of %d rank%s and are now of %d: dropout differs",
                saved,
                "s" * (saved > 1),
                now,
            )
        first, own = state_dict["rank 0"], state_dict.get(f"rank {self.ranks.rank}")
        restore_rng({**first, **(own or {})}, self.device)
        if own is None:
            drawn = hashlib.sha256(first["torch"].numpy().tobytes()).digest()
            key = derive_key(int.from_bytes(drawn[:8], "little"), self.ranks.rank)
            torch.manual_seed(key % 2**63)


def capture(trainer: TrainingLoop) -> dict[str, Any]:
    """Return the trainer's whole state; every rank must call it."""
    handlers = {name: state_of(handler) for name, handler in trainer.attached.items()}
    foreign = {
        name: handlers.pop(name) for name, owner in trainer.attached.items() if is_foreign(owner)
    }
    return {
        "trainer": trainer.state_dict(),
        "model": trainer.model.state_dict(),
        "buffers": [name for name, _ in trainer.model.named_buffers()],
        "optimizer": trainer.optimizer.state_dict(),
        "precision": trainer.precision.state_dict(),
        "random": RandomState(trainer.ranks, trainer.device).state_dict(),
        "handlers": handlers,
        **({"foreign": foreign} if foreign else {}),
    }


def check_usable(state: Mapping[str, Any], where: str = "") -> None:
    """Refuse a state that training must not continue from.

    Raises:
        CheckpointError: its weights, moments or averages are not finite. (A buffer, such as a mask,
            may be infinite.)
    """
    check_finite(state, where, state.get("buffers", ()))


def damage_on_any_rank(trainer: TrainingLoop, state: Mapping[str, Any]) -> DamagedStateError | None:
    """Check the state of every rank before one of them writes; all get an error or none.

    A moment that is infinite on one rank stops the updates of its weight there, and the ranks
    drift apart without a sign in the loss. A single process checks where it writes.
    """
    ranks, found = trainer.ranks, None
    if ranks.alone:
        return None
    where = f"step {trainer.state.iteration}, rank {ranks.rank}"
    try:
        check_usable(state, where)
    except DamagedStateError as error:
        found = error
    if ranks.any(found is not None):
        return found or DamagedStateError("the state of another rank is not finite")
    if ranks.all_equal(bit_sum(trainer.model.parameters())):
        return None
    return DamagedStateError(
        "the ranks no longer have the same weights",
        where=where,
        fix="use an earlier checkpoint; if it happens again, check the machines for faults",
    )


def are_equal(state: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Return whether two states are equal, except in what differs between saves of one state."""
    marks = ("checkpoints", "elapsed_before", "finished", "end_of_epoch")
    first, second = (
        {**each, "trainer": {k: v for k, v in each["trainer"].items() if k not in marks}}
        for each in (state, saved)
    )
    return equal(first, second)


def restore(trainer: TrainingLoop, state: Mapping[str, Any]) -> None:
    """Put the trainer into a captured state; every rank must call it.

    Raises:
        CheckpointError: the state is of another model, optimizer or data, or a part of the trainer
            refuses its share. Nothing was changed.
    """
    check_usable(state)
    before, elapsed = copied(capture(trainer)), trainer.state.elapsed_before
    try:
        check_model_state(trainer.model, state["model"])
        check_optimizer_state(trainer.optimizer, state["optimizer"])
        saved_handlers = _handlers_in(state).keys()
        _load(trainer, state)
    except Exception as error:  # a handler's own load_state_dict may raise anything
        _load(trainer, before)
        trainer.state.elapsed_before = elapsed  # the captured one has this process's time in it
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            "the checkpoint was refused; everything is as it was",
            got=f"{type(error).__name__}: {error}",
        ) from error
    for name in trainer.attached.keys() - saved_handlers:
        logger.warning("the checkpoint has no state of the handler '%s', which starts fresh", name)
    for name in saved_handlers - trainer.attached.keys():
        logger.warning(
            "the checkpoint's handler '%s' is not attached: its state is not loaded", name
        )


def _load(trainer: TrainingLoop, state: Mapping[str, Any]) -> None:
    trainer.load_state_dict(state["trainer"])
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(on_own_kernels(trainer.optimizer, state["optimizer"]))
    trainer.precision.load_state_dict(state["precision"])
    handlers = _handlers_in(state)
    for name, handler in trainer.attached.items():
        if name in handlers:
            load_state(handler, handlers[name])
    RandomState(trainer.ranks, trainer.device).load_state_dict(state["random"])


def _handlers_in(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**state["handlers"], **state.get("foreign", {})}


def _torch_states(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
