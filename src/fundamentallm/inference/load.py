"""Load a trained model from a run or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fundamentallm.compute.plan import Machine
from fundamentallm.config import RunConfig
from fundamentallm.data.tokenizer import Tokenizer, tokenizer_from_dict
from fundamentallm.errors import CheckpointError
from fundamentallm.files.private import check_file
from fundamentallm.files.run_layout import BEST, CONFIG, RunOrCheckpoint, no_checkpoint
from fundamentallm.inference.origin import Origin
from fundamentallm.inference.stored_model import stored_config, stored_model
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.checkpoint.scores import Scores
from fundamentallm.training.checkpoint.store import CheckpointStore


@dataclass(frozen=True)
class Trained:
    """A trained model, ready for use.

    Attributes:
        model: in evaluation mode, on the requested device.
        tokenizer: of the run.
        config: of the run, resolved.
        checkpoint: directory of the checkpoint.
        manifest: of the checkpoint.
        averaged: whether the weights are the averaged ones (weight EMA).
    """

    model: nn.Module
    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Path
    manifest: Manifest
    averaged: bool

    @property
    def data_sha256(self) -> str:
        """The SHA-256 of the training text; empty if it is not recorded."""
        return self.manifest.metadata.get("data", {}).get("sha256") or ""

    @property
    def stop(self) -> list[str]:
        """The stop strings: the end of the responses in fine-tuning."""
        end = self.manifest.metadata.get("data", {}).get("response_end")
        return [] if end is None else [end]

    @property
    def stop_ids(self) -> list[int]:
        """The token that ends a document, if the tokenizer has one."""
        end = self.tokenizer.end_id
        return [] if end is None else [end]

    @property
    def came_from(self) -> Origin:
        """What the folder that the run started from says about use; empty without one."""
        return Origin.of(self.manifest.metadata.get("origin"))

    @property
    def origin(self) -> str:
        """The checkpoint, its step, and whether its weights are averages, as text."""
        weights = ", averaged weights" if self.averaged else ""
        return f"{self.checkpoint} (step {self.manifest.step}{weights})"

    @property
    def val_loss(self) -> float | None:
        """The validation loss of the checkpoint in nats per token; None if it has none."""
        return Scores(self.checkpoint.parent).val_loss(self.manifest)

    @property
    def run_dir(self) -> Path:
        """The run directory of the checkpoint."""
        return self.config.run_of(self.checkpoint.parent)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that RUN_OR_CHECKPOINT names.

    A run means its best checkpoint, else its newest undamaged one.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    named = RunOrCheckpoint.parse(path, checkpoints_in)
    found = named_checkpoint(named) or CheckpointStore(named.checkpoints).resolve(BEST)
    if found is None:
        raise no_checkpoint(path)
    return found


def named_checkpoint(named: RunOrCheckpoint) -> Path | None:
    """Return the checkpoint that was named by its directory or by a pointer; None for a run.

    A pointer to a damaged checkpoint means the newest undamaged one.

    Raises:
        CheckpointError: there are checkpoints and all of them are damaged.
    """
    if named.pointer:
        return CheckpointStore(named.checkpoints).resolve(named.pointer)
    return named.checkpoints / named.checkpoint if named.checkpoint else None


def checkpoints_in(run: Path) -> Path:
    """Return the checkpoint directory of a run; the path itself if it is not a run."""
    check_file(run / CONFIG, writing=False)
    if (run / CONFIG).exists():
        return RunConfig.from_yaml(run / CONFIG).checkpoints_in(run)
    return run


def load_trained(path: Path, device: torch.device) -> Trained:
    """Load the model, tokenizer and configuration of a run or checkpoint.

    All hashes are verified before anything is built.

    Raises:
        CheckpointError: there is no undamaged checkpoint, or `run` did not write it.
        ConfigError: a part of the model is not registered (it is from a plugin).
    """
    checkpoint = find_checkpoint(path)
    store = CheckpointStore(checkpoint.parent)
    manifest, state = store.load(checkpoint)
    where = str(checkpoint)
    for part in ("config", "tokenizer"):
        if part not in manifest.metadata:
            raise CheckpointError(
                "the checkpoint does not say how it was trained",
                where=where,
                got=f"no {part} in its manifest",
                fix="name a checkpoint written by `run`; for one of a script, resume it there and"
                " use its model (generate, save_pretrained)",
            )
    config = stored_config(manifest.metadata["config"], where)
    tokenizer = tokenizer_from_dict(manifest.metadata["tokenizer"], where)
    weights, averaged = weights_of(state, where)
    model = stored_model(config.model, weights, where)
    if tokenizer.vocab_size > (config.model.vocab_size or 0):
        raise CheckpointError(
            "the checkpoint's tokenizer has more tokens than its model",
            where=where,
            got=f"a tokenizer of {tokenizer.vocab_size:,} tokens",
            expected=f"at most {config.model.vocab_size:,}",
            fix="use another checkpoint",
        )
    return Trained(model.to(device).eval(), tokenizer, config, checkpoint, manifest, averaged)


def load_on_device(path: Path, device: str) -> tuple[Trained, Machine]:
    """Load a trained model onto a device, and set the number of threads that its run used.

    Raises:
        CheckpointError, ConfigError: as `load_trained`.
        ConfigError, MachineError: as `Machine.open`.
    """
    trained = load_trained(path, torch.device("cpu"))
    machine = Machine.open(device, trained.config.training.threads)
    trained.model.to(machine.device)
    return trained, machine


def weights_of(state: dict[str, Any], where: str = "") -> tuple[dict[str, torch.Tensor], bool]:
    """Return the weights to use, and whether they are averages (weight EMA).

    Raises:
        CheckpointError: the averages do not fit the weights; `where` names the checkpoint.
    """
    weights = dict(state["model"])
    averages = _averages(state, where)
    # A tied weight has several names in the state and one in the averages.
    for name, average in averages.items():
        for other, weight in state["model"].items():
            if other == name or (
                isinstance(weight, torch.Tensor)
                and weight.shape == average.shape
                and weight.data_ptr() == state["model"][name].data_ptr()
            ):
                weights[other] = average
    return weights, bool(averages)


def _averages(state: dict[str, Any], where: str) -> dict[str, torch.Tensor]:
    """Return the averaged weights of a state by name; empty without weight EMA."""
    found: Any = state
    for key in ("handlers", "weight_ema", "averages"):
        if not isinstance(found, dict):
            break
        found = found.get(key, {})
    if not isinstance(found, dict) or not all(
        isinstance(average, torch.Tensor) and isinstance(state["model"].get(name), torch.Tensor)
        for name, average in found.items()
    ):
        raise CheckpointError(
            "the averaged weights in the checkpoint do not fit its model",
            where=f"{where}: handlers.weight_ema.averages",
            fix="use another checkpoint",
        )
    return found
