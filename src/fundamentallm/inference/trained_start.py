"""A run to start from: its best checkpoint, or the one that is named, with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fundamentallm.config.component import Component
from fundamentallm.config.model import TransformerConfig
from fundamentallm.data.tokenizer import Tokenizer, tokenizer_from_dict
from fundamentallm.data.tokenizer.tokenizer_json import tokenizer_json
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.files.run_layout import BEST, CONFIG, LAST, MANIFEST, starting_path
from fundamentallm.inference.load import find_checkpoint, weights_of
from fundamentallm.inference.stored_model import stored_config, stored_shapes
from fundamentallm.models.layouts.pretrained import ModelToStartFrom
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.checkpoint.scores import Scores
from fundamentallm.training.checkpoint.store import CheckpointStore

_NOT_OF_THE_WEIGHTS = {"family", "init_from", "dropout", "adapter", "zero_init"}


@dataclass(frozen=True)
class TrainedStart(ModelToStartFrom):
    """A checkpoint whose manifest has been read.

    Attributes:
        manifest: the checkpoint's.
        model: the configuration of its model, with every size.
        tokenizer: of its run.
    """

    manifest: Manifest
    model: TransformerConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, path: Path) -> TrainedStart:
        """Read what the checkpoint of RUN_OR_CHECKPOINT describes; its weights are not touched.

        Raises:
            CheckpointError: there is no undamaged checkpoint, or `run` did not write it.
            ConfigError: its model is no plain transformer.
        """
        checkpoint = find_checkpoint(path)
        manifest = CheckpointStore(checkpoint.parent).manifest(checkpoint)
        metadata, where = manifest.metadata, str(checkpoint)
        if not {"config", "tokenizer"} <= metadata.keys():
            raise CheckpointError(
                "the checkpoint does not say how it was trained",
                where=where,
                fix="name a run, or a checkpoint that `run` wrote",
            )
        model = stored_config(metadata["config"], where).model
        if not isinstance(model, TransformerConfig) or model.adapter is not None:
            kind = "an adapter" if isinstance(model, TransformerConfig) else "another family"
            raise ConfigError(
                "a run can start only from a plain transformer",
                where=where,
                got=f"a model with {kind}",
                fix="name a run of a transformer without an adapter",
            )
        fields = {
            name: getattr(model, name)
            for name in TransformerConfig.model_fields
            if name not in _NOT_OF_THE_WEIGHTS
        }
        fields |= {"num_kv_heads": model.kv_heads, "d_ff": model.hidden_width}
        tokenizer = tokenizer_from_dict(metadata["tokenizer"], where)
        return cls(checkpoint, fields, manifest, model, tokenizer)

    @property
    def in_words(self) -> str:
        """Return which checkpoint it is."""
        loss = Scores(self.folder.parent).val_loss(self.manifest)
        best = CheckpointStore(self.folder.parent).pointed(BEST) == self.folder.name
        measured = "" if loss is None else f", validation loss {loss:.4f}"
        return f"{self.folder} (step {self.manifest.step}{measured}{', the best' if best else ''})"

    def adopt(self, config: TransformerConfig) -> TransformerConfig:
        """Return a configuration with the run's sizes and parts filled in.

        Raises:
            ConfigError: it says something else than the run does.
        """
        for field, theirs in self.fields.items():
            ours = getattr(config, field)
            if field in config.model_fields_set and isinstance(theirs, Component):
                for name, value in ours.options.items():
                    self._check(f"{field}.{name}", value, theirs.options.get(name))
        return super().adopt(config)

    def state(self, config: TransformerConfig) -> Mapping[str, Tensor]:
        """Read the weights, averaged ones where the run has them.

        A position table longer than the context length is cut to its first rows.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        _, state = CheckpointStore(self.folder.parent).load(self.folder)
        stored_shapes(self.model, state.get("model"), str(self.folder))
        weights, _ = weights_of(state, str(self.folder))
        table = weights.get("positions.table.weight")
        if table is not None:
            weights["positions.table.weight"] = table[: config.sequence_length]
        return weights

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Check that a tokenizer gives the ids that the weights know.

        Raises:
            ConfigError: it is another one; `key` is "tokenizer".
        """
        if tokenizer_json(tokenizer) != tokenizer_json(self.tokenizer):
            raise ConfigError(
                f"the tokenizer differs from that of the model to start from, {self.folder}",
                key="tokenizer",
                got=_in_words(tokenizer),
                expected=_in_words(self.tokenizer),
                fix="remove data.tokenizer: the run's own is then used; for another one, start"
                " without model.init_from",
            )


def find_run(text: str) -> Path | None:
    """Return the run or checkpoint that `model.init_from` names; None for a folder."""
    path = starting_path(text)
    if path.is_file():
        return path if path.name in (BEST, LAST) else None
    if (path / "config.json").exists():
        return None
    return path if (path / MANIFEST).exists() or (path / CONFIG).exists() else None


def _in_words(tokenizer: Tokenizer) -> str:
    kind: Any = tokenizer.to_dict().get("type")
    return f"{kind}, {tokenizer.vocab_size:,} tokens, {tokenizer.fingerprint()[:16]}"
