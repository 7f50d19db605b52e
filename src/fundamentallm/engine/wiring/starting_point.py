"""What a run starts from: random weights, a folder or a run (`model.init_from`), its checkpoint.

A folder is read once, when a run begins. A continued run takes the sizes, the tokenizer and the
weights from its checkpoint, so the folder may be deleted by then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fundamentallm.config import RunConfig, TransformerConfig
from fundamentallm.data.tokenizer import TOKENIZER_FILE, Tokenizer, tokenizer_from_dict
from fundamentallm.data.tokenizer.tokenizer_json import read_tokenizer_json
from fundamentallm.engine.wiring.run_directory import RunDirectory
from fundamentallm.errors import ConfigError
from fundamentallm.inference.origin import Origin
from fundamentallm.inference.stored_model import stored_config
from fundamentallm.inference.trained_start import TrainedStart, find_run
from fundamentallm.models.layouts.pretrained import ModelToStartFrom, Pretrained
from fundamentallm.training.checkpoint.manifest import Manifest


@dataclass(frozen=True)
class StartingPoint:
    """Where a run's weights come from.

    Attributes:
        config: the run's, including the folder's settings.
        written: the run's, as written.
        pretrained: the folder or the run to read; None without one.
        checkpoint: the checkpoint to continue from; None for a new run.
        notes: decisions to tell the user.
    """

    config: RunConfig
    written: RunConfig
    pretrained: ModelToStartFrom | None = None
    checkpoint: Manifest | None = None
    notes: list[str] = field(default_factory=list)

    def tokenizer(self) -> Tokenizer | None:
        """Return the folder's tokenizer; None if the configuration chooses one.

        Raises:
            ConfigError: the folder has none.
            DataError: it cannot be read.
        """
        if "tokenizer" not in self.written.left_to_init_from:
            return None
        if self.checkpoint is not None:
            return tokenizer_from_dict(self.checkpoint.metadata["tokenizer"], self.checkpoint.name)
        assert self.pretrained is not None
        if isinstance(self.pretrained, TrainedStart):
            return self.pretrained.tokenizer
        path = self.pretrained.folder / TOKENIZER_FILE
        if path.exists():
            return read_tokenizer_json(path, Origin.read(path.parent).names.get("eos_token"))
        with self.written.locating_errors("data.tokenizer"):
            raise ConfigError(
                "the init_from folder has no tokenizer, and a new one would give the ids"
                " other meanings",
                got=f"no {TOKENIZER_FILE} in {self.pretrained.folder}",
                fix="set data.tokenizer to the one that the model was trained with",
            )

    def origin(self) -> dict[str, Any]:
        """Return what the folder says about use, as `Origin.to_dict`, under the key `origin`.

        Nothing without a folder, or with another tokenizer, for which its ids mean nothing.
        """
        if "tokenizer" not in self.written.left_to_init_from:
            return {}
        if self.checkpoint is not None:
            return _origin_in(self.checkpoint)
        assert self.pretrained is not None
        if isinstance(self.pretrained, TrainedStart):
            return _origin_in(self.pretrained.manifest)
        return {"origin": Origin.read(self.pretrained.folder).to_dict()}

    def load_into(self, model: nn.Module) -> None:
        """Put the folder's weights into a new transformer; without a folder, do nothing.

        Raises:
            CheckpointError: the weights are not those that the folder describes.
            ConfigError: as `Pretrained.state`.
        """
        if self.pretrained is not None:
            assert isinstance(self.config.model, TransformerConfig)
            model.load_state_dict(self.pretrained.state(self.config.model))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Check that the tokenizer of the run gives the ids that the weights of another know.

        Raises:
            ConfigError: it does not.
        """
        if isinstance(self.pretrained, TrainedStart):
            with self.written.locating_errors("data"):
                self.pretrained.check_tokenizer(tokenizer)


def _origin_in(manifest: Manifest) -> dict[str, Any]:
    kept = manifest.metadata.get("origin")
    return {} if kept is None else {"origin": kept}


def starting_point(config: RunConfig, directory: RunDirectory) -> StartingPoint:
    """Determine what a run starts from; a folder's weights are not read yet.

    Raises:
        CheckpointError: the folder cannot be read.
        ConfigError: it is of another family, or the configuration contradicts it.
    """
    model = config.model
    if not isinstance(model, TransformerConfig) or model.init_from is None:
        return StartingPoint(config, config)
    folder = model.init_from
    if directory.checkpoint is not None:
        stored = directory.checkpoint
        began_with = stored_config(stored.metadata["config"], stored.name)
        data = {"sequence_length": began_with.data.sequence_length}
        completed = config.model_copy(
            update={"model": began_with.model, "data": config.data.model_copy(update=data)}
        )
        return StartingPoint(completed, config, checkpoint=directory.checkpoint)
    run = find_run(folder)
    pretrained: ModelToStartFrom
    with config.locating_errors("model"):
        pretrained = Pretrained.open(folder) if run is None else TrainedStart.open(run)
        model = pretrained.adopt(model)
    named = pretrained.in_words if isinstance(pretrained, TrainedStart) else folder
    notes = [f"the weights are initialized from {named}"]
    assert model.sequence_length is not None
    length = model.sequence_length
    if "sequence_length" not in config.left_to_init_from:
        length = config.data.sequence_length
        in_data = "sequence_length" in config.data.model_fields_set
        with config.locating_errors("data" if in_data else "model"):
            pretrained.check_length(length)
        if length < model.sequence_length:
            notes.append(
                f"the context length is {length} instead of the folder's {model.sequence_length}"
            )
    has_tokenizer = (pretrained.folder / TOKENIZER_FILE).exists()
    if has_tokenizer and "tokenizer" not in config.left_to_init_from:
        notes.append(f"data.tokenizer is used instead of the {TOKENIZER_FILE} in {folder}")
    completed = config.model_copy(
        update={
            "model": model.model_copy(update={"sequence_length": length}),
            "data": config.data.model_copy(update={"sequence_length": length}),
        }
    )
    return StartingPoint(completed, config, pretrained, notes=notes)
