"""A trained model from a run or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fundamentallm.config import RunConfig
from fundamentallm.data.tokenizer import Tokenizer, tokenizer_from_dict
from fundamentallm.errors import CheckpointError
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.checkpoint import check_model_state
from fundamentallm.training.manifest import Manifest
from fundamentallm.training.store import CheckpointStore


@dataclass(frozen=True)
class Trained:
    """A model that was trained, ready to be used.

    Attributes:
        model: in evaluation mode, on the device asked for.
        tokenizer: the run's.
        config: the run's, resolved.
        checkpoint: the checkpoint's directory.
        manifest: the checkpoint's.
        averaged: whether the weights are the averaged ones (weight EMA).
    """

    model: nn.Module
    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Path
    manifest: Manifest
    averaged: bool

    @property
    def stop(self) -> list[str]:
        """The stop strings that it learnt: what ended the responses that it was fine-tuned on."""
        end = self.manifest.metadata.get("data", {}).get("response_end")
        return [] if end is None else [end]

    @property
    def stop_ids(self) -> list[int]:
        """The token behind each document, where the tokenizer has one."""
        end = self.tokenizer.end_id
        return [] if end is None else [end]

    @property
    def run_dir(self) -> Path:
        """The run that the checkpoint lies in."""
        return self.config.run_of(self.checkpoint.parent)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a run or checkpoint directory stands for.

    A run stands for its best checkpoint, else for its newest whole one.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    refuse_foreign_files(path)
    if path.is_file() and path.name in ("best", "last"):
        found = CheckpointStore(path.parent).resolve(path.name)
    elif (path / "MANIFEST.json").exists():
        found = path
    else:
        found = CheckpointStore(checkpoints_in(path)).resolve("best")
    if found is None:
        raise CheckpointError(
            "there is no checkpoint here",
            where=str(path),
            fix="name a run directory, as runs/quickstart",
        )
    return found


def refuse_foreign_files(path: Path) -> None:
    """Refuse a path that is nothing of ours before anything is opened.

    Raises:
        CheckpointError: there is nothing, or a file that torch.save wrote.
    """
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise CheckpointError(
            "files that torch.save wrote are not opened here, for they can run code",
            where=str(path),
            fix="name the run or its checkpoint directory; CheckpointManager.load in Python reads"
            " a .pt of this package",
        )
    if not path.exists():
        raise CheckpointError(
            "there is no run or checkpoint here",
            where=str(path),
            fix="name a directory like runs/quickstart or runs/quickstart/checkpoints/best",
        )


def checkpoints_in(run: Path) -> Path:
    """Return where a run keeps its checkpoints; the directory itself if it is no run."""
    if (run / "config.yaml").is_file():
        return RunConfig.from_yaml(run / "config.yaml").checkpoints_in(run)
    return run


def load_trained(path: Path, device: torch.device) -> Trained:
    """Load the model, tokenizer and configuration of a run or checkpoint.

    Every byte is verified before anything is built from it.

    Raises:
        CheckpointError: nothing whole is there, or it is no run's checkpoint.
        ConfigError: it names parts that are not registered (a plugin's).
    """
    checkpoint = find_checkpoint(path)
    store = CheckpointStore(checkpoint.parent)
    manifest = store.verify(checkpoint)
    state = store.read(checkpoint)
    try:
        config = RunConfig.model_validate(manifest.metadata["config"])
        tokenizer = tokenizer_from_dict(manifest.metadata["tokenizer"])
    except KeyError as error:
        raise CheckpointError(
            "the checkpoint does not say what it was trained with",
            where=str(checkpoint),
            got=f"no {error.args[0]} in its manifest",
            fix="name a checkpoint that `run` wrote",
        ) from error
    model = Transformer(config.model)
    weights, averaged = weights_of(state)
    check_model_state(model, weights, str(checkpoint))
    model.load_state_dict(weights)
    return Trained(model.to(device).eval(), tokenizer, config, checkpoint, manifest, averaged)


def weights_of(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], bool]:
    """Return the weights to use, and whether they are averages."""
    weights = dict(state["model"])
    averages = state.get("handlers", {}).get("weight_ema", {}).get("averages", {})
    # A tied weight stands in the state under each of its names and in the averages under one.
    for name, average in averages.items():
        for other, weight in state["model"].items():
            if other == name or (
                weight.shape == average.shape
                and weight.data_ptr() == state["model"][name].data_ptr()
            ):
                weights[other] = average
    return weights, bool(averages)
