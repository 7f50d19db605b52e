"""One run: everything that a YAML file says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field, PrivateAttr, field_validator, model_validator

from fundamentallm.config.base import BaseConfig, Seed, directory_name, name_pattern
from fundamentallm.config.component import plain_options
from fundamentallm.config.data import DataConfig
from fundamentallm.config.evaluation import EvaluationConfig
from fundamentallm.config.model import ModelConfig, TransformerConfig, model_class
from fundamentallm.config.parallel import ParallelConfig
from fundamentallm.config.training import TrainingConfig
from fundamentallm.config.yaml.problems import problem
from fundamentallm.config.yaml.source import YamlDocument
from fundamentallm.errors import ConfigError
from fundamentallm.files.run_layout import RUNS

if TYPE_CHECKING:
    from typing_extensions import Self

LONGEST_NAME = 100

Section = TypeVar("Section", bound=BaseConfig)


class RunConfig(BaseConfig):
    """A complete run.

    `seed` and `data.sequence_length` hold for every section: `data.seed`, `training.seed` and
    `model.sequence_length` may repeat them and must then agree; left unset, they take the value.
    `to_dict` and `to_yaml` write each value once, and none that follows from `data.global_batch`.
    """

    name: Annotated[
        str, Field(json_schema_extra={"pattern": f"^{name_pattern(LONGEST_NAME)}$"})
    ] = "run"
    """Name of the run and of its directory under runs/: letters, digits, ., _ and -."""

    seed: Seed = 42
    """The run's one seed: initial weights, order of the data, dropout, samples."""

    data: DataConfig = DataConfig()
    """The text, its tokens and its batches."""

    model: ModelConfig = TransformerConfig()
    """The model: a transformer, or the family that `family` names."""

    training: TrainingConfig = TrainingConfig()
    """How the model is trained."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """What an evaluation measures."""

    parallel: ParallelConfig = ParallelConfig()
    """How several ranks work together."""

    handlers: dict[str, bool | dict[str, Any]] = Field(default_factory=dict)
    """Handlers by name, merged over the default set: their options, true for the default options,
    false to switch one off."""

    plugins: list[str] = Field(default_factory=list)
    """Modules that are imported so that the names they register resolve."""

    _document: YamlDocument | None = PrivateAttr(default=None)

    @classmethod
    def from_document(cls, document: YamlDocument) -> Self:
        """Validate a document and remember where each of its keys was written.

        Raises:
            ConfigError: as in `from_yaml`.
        """
        config = super().from_document(document)
        config._document = document
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; values shared by all sections once."""
        plain = super().to_dict()
        del plain["data"]["seed"], plain["training"]["seed"]
        if self.data.global_batch is not None:
            del plain["training"]["accumulation_steps"]  # another on other ranks
        plain["model"].pop("sequence_length", None)
        for field in self.left_to_init_from:
            del plain["data"][field]
        return plain

    @property
    def left_to_init_from(self) -> frozenset[str]:
        """The fields of `data` that were left unset and that the folder of `init_from` decides."""
        if self.model.init_from is None:
            return frozenset()
        written = set(self.data.model_fields_set)
        if "sequence_length" in self.model.model_fields_set:
            written.add("sequence_length")
        return frozenset({"sequence_length", "tokenizer"} - written)

    def locate(self, key: str) -> str:
        """Return where a dotted key was written, as `train.yaml:12: training.optimizer`.

        A key that was not written has its nearest parent's line; an override on the command line
        is shown instead; a configuration made in Python has only the key.
        """
        return self._document.locate(tuple(key.split("."))) if self._document else key

    def checkpoints_in(self, run: Path) -> Path:
        """Return where the run in a directory keeps its checkpoints."""
        return run / self.training.checkpoint_dir

    def run_of(self, checkpoints: Path) -> Path:
        """Return the directory of the run whose checkpoints lie in `checkpoints`.

        If the checkpoints have a separate place, return the run's default directory.
        """
        inside = PurePath(self.training.checkpoint_dir)
        if inside.is_absolute():
            return RUNS / self.name
        # `run/../x/checkpoints` is recognized by its end, even if the run was renamed.
        return checkpoints.parents[len(inside.parts) - 1] if inside.parts else checkpoints

    @contextmanager
    def locating_errors(self, key: str) -> Iterator[None]:
        """Give each ConfigError raised inside the file and line of `key`.

        An error's own `key` is taken as relative to this one; an error that has a `where` already
        passes unchanged.
        """
        try:
            yield
        except ConfigError as error:
            if not error.where:
                error.key = ".".join(part for part in (key, error.key) if part)
                error.where = self.locate(error.key)
            raise

    @field_validator("name")
    @classmethod
    def _path_component(cls, name: str) -> str:
        return directory_name(name, "run", LONGEST_NAME)

    @field_validator("model", mode="before")
    @classmethod
    def _of_its_family(cls, value: Any) -> Any:
        return value if isinstance(value, BaseConfig) else model_class(value).model_validate(value)

    @field_validator("handlers")
    @classmethod
    def _plain_handlers(cls, handlers: dict[str, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = plain_options(handlers)
        return plain

    @field_validator("plugins")
    @classmethod
    def _module_names(cls, plugins: list[str]) -> list[str]:
        for index, name in enumerate(plugins):
            if not all(part.isidentifier() for part in name.split(".")):
                raise problem(
                    str(index),
                    "this is not a module name",
                    got=name,
                    expected="a dotted name, for example my_package.handlers",
                    fix="write the name as in an import statement, without .py or slashes",
                )
        return plugins

    @model_validator(mode="after")
    def _one_seed(self) -> RunConfig:
        places: dict[str, BaseConfig] = {
            "seed": self,
            "data.seed": self.data,
            "training.seed": self.training,
        }
        value = self._agreed("seed", places, default=self.seed)
        self._settle(
            seed=value,
            data=_with(self.data, seed=value),
            training=_with(self.training, seed=value),
        )
        return self

    @model_validator(mode="after")
    def _one_sequence_length(self) -> RunConfig:
        places = {"data.sequence_length": self.data, "model.sequence_length": self.model}
        value = self._agreed("sequence_length", places, default=self.data.sequence_length)
        self._settle(
            data=_with(self.data, sequence_length=value),
            model=_with(self.model, sequence_length=value),
        )
        return self

    @staticmethod
    def _agreed(field: str, places: dict[str, Any], default: int) -> int:
        """Return the one value that is set explicitly in some places, else the default."""
        given = {
            key: getattr(config, field)
            for key, config in places.items()
            if field in config.model_fields_set and getattr(config, field) is not None
        }
        if len(set(given.values())) > 1:
            said = " and ".join(f"{key} {value}" for key, value in given.items())
            *_, last = given
            raise problem(last, f"{said} disagree", fix="keep one of them, or make them equal")
        return next(iter(given.values()), default)


def _with(config: Section, **values: Any) -> Section:
    """Return a copy with values that count as unset; the original may belong to the caller."""
    copy = config.model_copy()
    copy._settle(**values)
    return copy
