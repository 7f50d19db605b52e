"""Checkpoints for scripts: save and load a model, an optimizer and a scheduler by path.

```python
CheckpointManager.save("out/first", model, optimizer, metrics={"val_loss": 1.9}, step=200)
model, optimizer, _, metrics, epoch, step = CheckpointManager.load("out/first", model, optimizer)
```

A run's own checkpoints hold more (every handler, the random generators, the data position). They
have the same layout (`store.CheckpointStore`), so `load` reads these parts of them too.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fundamentallm.errors import CheckpointError
from fundamentallm.files.run_layout import LAST
from fundamentallm.training.checkpoint.store import CheckpointStore, step_name, step_of
from fundamentallm.training.checkpoint.tree import Stateful

# What torch's optimizers and ours keep of each parameter, in its shape.
OF_A_PARAMETERS_SHAPE = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "momentum",
    "sum",
}
KERNELS = {"fused", "foreign", "capturable", "differentiable"}
MAX_NAMED_DIFFERENCES = 6


class CheckpointManager:
    """Saves and loads by path: a directory, or one portable file where the path ends in `.pt`.

    All methods work on the class; an instance only sets how many `save_last` keeps.

    Args:
        keep_last: how many checkpoints `save_last` keeps, at least 2.
    """

    def __init__(self, keep_last: int = 3) -> None:
        if keep_last < 2:
            raise ValueError(f"keep_last must be at least 2, got {keep_last}")
        self.save_last = functools.partial(  # type: ignore[method-assign]  # see the docstring
            CheckpointManager.save_last, keep_last=keep_last
        )

    @staticmethod
    def save(
        path: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Stateful | None = None,
        metrics: Mapping[str, Any] | None = None,
        *,
        epoch: int = 0,
        step: int = 0,
    ) -> Path:
        """Save durably, replacing an earlier checkpoint at the path.

        Args:
            path: a directory to make, or a file that ends in `.pt`.
            model, optimizer, scheduler: what to save the state of.
            metrics: numbers to keep with it, such as `val_loss` (nats per token).
            epoch, step: the position of training; steps are optimizer steps.

        Returns:
            The path.

        Raises:
            CheckpointError: the disk is full or refuses, something else is at the path, or a state
                cannot be saved. What was at the path before is unchanged.
        """
        path = Path(path)
        tree = {
            "model": model.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "metrics": dict(metrics or {}),
            "epoch": epoch,
            "step": step,
        }
        if path.suffix == ".pt":
            from fundamentallm.training.checkpoint.portable import save_portable

            save_portable(path, tree)
        else:
            score = validation_loss(metrics or {})
            metadata = {"epoch": epoch, "val_loss": score if _is_number(score) else None}
            CheckpointStore(path.parent).write(path.name, tree, metadata, step=step)
        return path

    @staticmethod
    def load(
        path: str | Path,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Stateful | None = None,
    ) -> tuple[Any, Any, Any, dict[str, Any], int, int]:
        """Load a checkpoint, all of it or nothing.

        Args:
            path: a checkpoint directory, a pointer file (`checkpoints/best`), or a `.pt` file.
            model, optimizer, scheduler: the objects to restore, in place.

        Returns:
            model, optimizer, scheduler, metrics, epoch, step. For an object that was not given, its
            saved state (tensors on the CPU); None if none was saved.

        Raises:
            CheckpointError: it is missing, damaged or of another model or optimizer. The objects
                are unchanged.
        """
        path = Path(path)
        tree = _read(path)
        _check_form(tree, path)
        if model is not None:
            check_model_state(model, tree["model"], str(path))
        optimizer_state = tree["optimizer"]
        if optimizer is not None:
            check_optimizer_state(optimizer, optimizer_state, str(path))
            optimizer_state = on_own_kernels(optimizer, optimizer_state)
        if scheduler is not None and not isinstance(tree["scheduler"], dict):
            raise CheckpointError("the checkpoint holds no scheduler", where=str(path))
        _restore_all(
            [
                (model, tree["model"]),
                (optimizer, optimizer_state),
                (scheduler, tree["scheduler"]),
            ],
            str(path),
        )
        return (
            tree["model"] if model is None else model,
            tree["optimizer"] if optimizer is None else optimizer,
            tree["scheduler"] if scheduler is None else scheduler,
            tree["metrics"],
            tree["epoch"],
            tree["step"],
        )

    @staticmethod
    def save_best(
        path: str | Path,
        model: nn.Module,
        metrics: Mapping[str, Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Stateful | None = None,
        epoch: int = 0,
        step: int = 0,
    ) -> bool:
        """Save if the validation loss is finite and lower than that of the checkpoint at the path.

        Args:
            path, model, optimizer, scheduler, epoch, step: as for `save`.
            metrics: with `val_loss` or `val/loss`, in nats per token.

        Returns:
            Whether it was saved. Of two equal losses the first stays.

        Raises:
            CheckpointError: as `save`, or the checkpoint at the path is damaged.
            ValueError: no validation loss among the metrics.
        """
        path = Path(path)
        score = validation_loss(metrics)
        if score is None:
            raise ValueError(f"metrics has no 'val_loss' or 'val/loss', only {sorted(metrics)}")
        best = _saved_validation_loss(path)
        if not math.isfinite(score) or (best is not None and score >= best):
            return False
        CheckpointManager.save(path, model, optimizer, scheduler, metrics, epoch=epoch, step=step)
        return True

    @staticmethod
    def save_last(
        path: str | Path,
        model: nn.Module,
        metrics: Mapping[str, Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Stateful | None = None,
        epoch: int = 0,
        step: int | None = None,
        keep_last: int = 3,
    ) -> Path:
        """Save under a directory, point its `last` at the new checkpoint, and delete old ones.

        Args:
            path: the directory that holds the checkpoints.
            model, optimizer, scheduler, epoch: as for `save`.
            metrics: as for `save`; a `step` in it is used where the argument is None.
            step: names the checkpoint; without any, one more than the newest there.
            keep_last: how many to keep, at least 2; one that a pointer names stays besides.

        Returns:
            The path of the new checkpoint.

        Raises:
            CheckpointError: as `save`.
            ValueError: `keep_last` is less than 2, or the path ends in `.pt`.
        """
        path = Path(path)
        if path.suffix == ".pt" or keep_last < 2:
            raise ValueError(f"save_last needs a directory and keep_last >= 2: {path}, {keep_last}")
        store = CheckpointStore(path)
        if step is None and isinstance(metrics.get("step"), int):
            step = metrics["step"]
        if step is None:
            step = 1 + max(map(step_of, store.step_names()), default=0)
        saved = CheckpointManager.save(
            path / step_name(step), model, optimizer, scheduler, metrics, epoch=epoch, step=step
        )
        store.point(LAST, saved.name)
        store.prune(keep_last)
        return saved


def save_weights(path: Path, weights: Mapping[str, Tensor], **facts: Any) -> None:
    """Write one portable file of weights and plain facts, for `torch.load(weights_only=True)`.

    Args:
        path: the file; missing parents are made.
        weights: a `state_dict`, under the key `model`.
        facts: plain values under their own names. `CheckpointManager.load` knows `metrics`,
            `epoch` and `step`.

    Raises:
        CheckpointError: the disk is full or refuses; what was at the path is unchanged.
    """
    from fundamentallm.training.checkpoint.portable import save_portable

    save_portable(path, {"model": dict(weights), **facts})


def validation_loss(metrics: Mapping[str, Any]) -> float | None:
    """Return `val_loss` or `val/loss` of some metrics as a float, or None without either.

    Raises:
        CheckpointError: it is not a number.
    """
    for key in ("val_loss", "val/loss"):
        if key in metrics:
            try:
                return float(metrics[key])
            except (TypeError, ValueError) as error:
                raise CheckpointError(
                    f"the validation loss '{key}' is not a number",
                    got=repr(metrics[key])[:80],
                    expected="nats per token",
                ) from error
    return None


def check_model_state(model: nn.Module, state: Any, where: str = "") -> None:
    """Check that a saved model state fits a model: names, shapes and dtypes.

    Raises:
        CheckpointError: it does not; the message names the first differences.
    """
    own = model.state_dict()
    if not isinstance(state, Mapping):
        raise CheckpointError("the checkpoint holds no model", where=where)
    faults = [f"'{name}' is not in the checkpoint" for name in own if name not in state]
    faults += [f"'{name}' is not in the model" for name in state if name not in own]
    for name in own:
        if name in state and _form(own[name]) != _form(state[name]):
            faults.append(f"'{name}' is {_form(state[name])}, in the model {_form(own[name])}")
    if faults:
        more = len(faults) - MAX_NAMED_DIFFERENCES
        raise CheckpointError(
            "the checkpoint is of another model",
            where=where,
            got="; ".join(faults[:MAX_NAMED_DIFFERENCES]) + (f"; {more} more" if more > 0 else ""),
            fix="build the model from the configuration that the checkpoint was saved with",
        )


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: Any, where: str = "") -> None:
    """Check that a saved optimizer state fits an optimizer: groups, options, shapes of moments.

    Raises:
        CheckpointError: it does not; the message says where.
    """
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise CheckpointError("the checkpoint holds no optimizer", where=where)
    saved, own = state["param_groups"], optimizer.param_groups
    if not isinstance(state["state"], Mapping) or not all(
        isinstance(kept, Mapping) for kept in state["state"].values()
    ):
        raise CheckpointError("the checkpoint's optimizer has no table of states", where=where)
    if not isinstance(saved, list) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in saved
    ):
        raise CheckpointError(
            "the checkpoint's optimizer has no list of parameter groups",
            where=where,
            got=repr(saved)[:80],
        )
    saved_sizes = [len(group["params"]) for group in saved]
    own_sizes = [len(group["params"]) for group in own]
    if saved_sizes != own_sizes:
        raise CheckpointError(
            "the checkpoint's optimizer has other parameter groups",
            where=where,
            got=f"groups of {saved_sizes} parameters",
            expected=f"groups of {own_sizes} parameters",
        )
    # A group of another kind of optimizer lacks options, as AdamW's lacks SGD's momentum.
    missing = {key for ours, theirs in zip(own, saved, strict=True) for key in ours.keys() - theirs}
    if missing:
        raise CheckpointError(
            "the checkpoint is of another optimizer",
            where=where,
            got=f"options {', '.join(sorted(map(str, set(saved[0]) - {'params'})))}",
            expected=f"also {', '.join(sorted(missing))}, as {type(optimizer).__name__} has",
        )
    for ours, theirs in zip(own, saved, strict=True):
        for key in sorted(ours.keys() - {"params"}):
            if not _is_of_one_kind(ours[key], theirs[key]):
                raise CheckpointError(
                    f"the checkpoint's optimizer has an option '{key}' of another kind",
                    where=where,
                    got=repr(theirs[key])[:80],
                    expected=f"a value like {ours[key]!r}",
                )
    numbers = [number for group in saved for number in group["params"]]
    parameters = [parameter for group in own for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in state["state"].get(number, {}).items():
            if not _fits(name, value, parameter):
                raise CheckpointError(
                    f"the checkpoint's optimizer keeps '{name}' of another shape",
                    where=where,
                    got=_form(value),
                    expected="one number" if name == "step" else str([*parameter.shape]),
                )


def on_own_kernels(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked optimizer state with the optimizer's own choice of kernels.

    How an update is computed is decided for this machine when the optimizer is built.
    """
    groups = [
        {**theirs, **{key: ours[key] for key in KERNELS & ours.keys()}}
        for ours, theirs in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    return {**state, "param_groups": groups}


def _fits(name: str, value: Any, parameter: Tensor) -> bool:
    """Return whether an optimizer may keep this of a parameter.

    The fused kernels of torch take shapes for granted: they would write behind a smaller tensor.
    """
    if name == "step":
        return (isinstance(value, Tensor) and value.numel() == 1) or _is_of_one_kind(0, value)
    if name in OF_A_PARAMETERS_SHAPE:
        return isinstance(value, Tensor) and value.shape == parameter.shape
    # What is kept under another name, in another form, is the optimizer's. One number may stand for
    # all along a dimension, as the mean of a row does.
    return (
        not isinstance(value, Tensor)
        or value.ndim != parameter.ndim
        or value.numel() <= 1
        or all(kept in (1, own) for kept, own in zip(value.shape, parameter.shape, strict=True))
    )


def _is_of_one_kind(own: Any, saved: Any) -> bool:
    """Return whether an option may be replaced by a saved one."""
    if own is None or isinstance(own, bool):
        return isinstance(saved, bool | None) or own is None
    if isinstance(own, int | float) or (isinstance(own, Tensor) and own.numel() == 1):
        is_number = isinstance(saved, int | float) and not isinstance(saved, bool)
        return is_number or (isinstance(saved, Tensor) and saved.numel() == 1)
    if isinstance(own, tuple | list):
        return (
            isinstance(saved, tuple | list)
            and len(saved) == len(own)
            and all(map(_is_of_one_kind, own, saved))
        )
    return isinstance(saved, type(own))


def _form(value: Any) -> str:
    """Return shape and dtype as text; a module's extra state may be anything."""
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else "not a tensor"


def _is_number(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".pt":
        from fundamentallm.training.checkpoint.portable import load_portable

        return load_portable(path)
    if path.is_file():
        target = CheckpointStore(path.parent).resolve(path.name)
        if target is None:
            raise CheckpointError("this is neither a checkpoint nor a pointer", where=str(path))
        path = target
    path = path.resolve()  # a link that the caller names is followed
    manifest, tree = CheckpointStore(path.parent).load(path)
    tree.setdefault("step", manifest.step)
    return tree


def _check_form(tree: dict[str, Any], path: Path) -> None:
    """Add the fields that a run's checkpoint lacks; refuse what is not a checkpoint."""
    for key, default in (("optimizer", None), ("scheduler", None), ("metrics", {})):
        tree.setdefault(key, default)
    for key in ("epoch", "step"):
        tree.setdefault(key, 0)
    if not isinstance(tree.get("model"), dict) or not isinstance(tree["metrics"], dict):
        raise CheckpointError("the file does not hold a checkpoint", where=str(path))


def _saved_validation_loss(path: Path) -> float | None:
    """Return the validation loss of the checkpoint at the path; None without one."""
    if path.suffix == ".pt":
        return validation_loss(_read(path).get("metrics", {})) if path.exists() else None
    store = CheckpointStore(path.parent)
    if not store.holds(path.name):
        return None
    score = store.manifest(path).metadata.get("val_loss")
    return None if score is None else float(score)


def _restore_all(targets: Sequence[tuple[Stateful | None, Any]], where: str) -> None:
    """Load every state into its target; if one refuses, restore all of them."""
    # While a checkpoint loads there are no gradients or activations yet: a second copy fits.
    before = [
        (target, copy.deepcopy(target.state_dict())) for target, _ in targets if target is not None
    ]
    try:
        for target, state in targets:
            if target is not None:
                target.load_state_dict(state)
    except Exception as error:  # a user's own load_state_dict may raise anything
        for target, state in before:
            target.load_state_dict(state)
        raise CheckpointError(
            "the checkpoint was refused; everything is as it was",
            where=where,
            got=f"{type(error).__name__}: {error}",
        ) from error
