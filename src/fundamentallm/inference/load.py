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
from fundamentallm.files.private import check_file
from fundamentallm.files.run_layout import BEST, CONFIG, RunOrCheckpoint
from fundamentallm.inference.stored_model import stored_config, stored_model
from fundamentallm.training.checkpoint.catalogue import Scores
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.checkpoint.store import CheckpointStore


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
    def data_sha256(self) -> str:
        """The hash of the text that it was trained on; empty if nobody knows."""
        return self.manifest.metadata.get("data", {}).get("sha256") or ""

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
    def origin(self) -> str:
        """The checkpoint in words, for whoever looks at what the model does."""
        weights = ", averaged weights" if self.averaged else ""
        return f"{self.checkpoint} (step {self.manifest.step}{weights})"

    @property
    def val_loss(self) -> float | None:
        """The validation loss of the checkpoint in nats per token, None without one."""
        return Scores(self.checkpoint.parent).val_loss(self.manifest)

    @property
    def run_dir(self) -> Path:
        """The run that the checkpoint lies in."""
        return self.config.run_of(self.checkpoint.parent)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that RUN_OR_CHECKPOINT stands for.

    A run stands for its best checkpoint, else for its newest whole one.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    named = RunOrCheckpoint.parse(path, checkpoints_in)
    found = named_checkpoint(named) or CheckpointStore(named.checkpoints).resolve(BEST)
    if found is None:
        raise CheckpointError(
            "there is no checkpoint here",
            where=str(path),
            fix="name a run directory, as runs/quickstart",
        )
    return found


def named_checkpoint(named: RunOrCheckpoint) -> Path | None:
    """Return the checkpoint that was named itself or by a pointer; None for a run.

    A pointer to a damaged checkpoint stands for the newest whole one.

    Raises:
        CheckpointError: there are checkpoints and none of them is whole.
    """
    if named.pointer:
        return CheckpointStore(named.checkpoints).resolve(named.pointer)
    return named.checkpoints / named.checkpoint if named.checkpoint else None


def checkpoints_in(run: Path) -> Path:
    """Return where a run keeps its checkpoints; the directory itself if it is no run."""
    check_file(run / CONFIG, writing=False)
    if (run / CONFIG).exists():
        return RunConfig.from_yaml(run / CONFIG).checkpoints_in(run)
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
    manifest, state = store.load(checkpoint)
    where = str(checkpoint)
    for part in ("config", "tokenizer"):
        if part not in manifest.metadata:
            raise CheckpointError(
                "the checkpoint does not say what it was trained with",
                where=where,
                got=f"no {part} in its manifest",
                fix="name a checkpoint that `run` wrote",
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


def weights_of(state: dict[str, Any], where: str = "") -> tuple[dict[str, torch.Tensor], bool]:
    """Return the weights to use, and whether they are averages.

    Raises:
        CheckpointError: the averages are not those of these weights; `where` names the checkpoint.
    """
    weights = dict(state["model"])
    averages = _averages(state, where)
    # A tied weight stands in the state under each of its names and in the averages under one.
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
    """Return the averaged weights of a state by name, none where weight EMA was off."""
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
            "the averaged weights in the checkpoint are not those of its model",
            where=f"{where}: handlers.weight_ema.averages",
            fix="use another checkpoint",
        )
    return found
