"""A model to start from: a folder of the `transformers` library.

`config.json` says what it is and safetensors files hold its weights, one `model.safetensors` or
several with `model.safetensors.index.json`. No other kind of file is opened: a pickle can run
code. A tensor that is missing or too much, or of another shape, refuses the whole.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fundamentallm.config.base import in_yaml
from fundamentallm.config.component import Component
from fundamentallm.config.model import TransformerConfig
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.files.run_layout import no_start
from fundamentallm.models.layouts import LAYOUTS, Layout
from fundamentallm.models.layouts.base import Described

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_NAMED = 6


@dataclass(frozen=True)
class ModelToStartFrom(ABC):
    """A trained model whose description has been read; its weights have not.

    Attributes:
        folder: where it lies.
        fields: what it decides of `TransformerConfig`; `sequence_length` is the longest.
    """

    folder: Path
    fields: Mapping[str, Any]

    def adopt(self, config: TransformerConfig) -> TransformerConfig:
        """Return a configuration with everything that the folder decides filled in.

        Args:
            config: as written; what it says must be what the folder says. Only biases may be
                switched off, if they turn out to be zero, and the context length is the folder's
                in any case (`check_length`).

        Raises:
            ConfigError: the two differ; `key` is the field, without `model.`.
        """
        written = config.model_fields_set
        adopted = dict(self.fields)
        for field, theirs in self.fields.items():
            ours = getattr(config, field)
            if field == "sequence_length" or field not in written or ours is None:
                continue
            if isinstance(theirs, Component):
                self._check(field, ours.name, theirs.name)
                for name, value in ours.options.items():
                    self._check(f"{field}.{name}", value, theirs.options.get(name, value))
            elif field == "bias" and self.biases_can_go:
                adopted["bias"] = ours
            else:
                self._check(field, ours, theirs)
        plain = {name: getattr(config, name) for name in type(config).model_fields}
        try:
            return TransformerConfig(**{**plain, **adopted})
        except ValidationError as error:
            raise ConfigError(
                f"{self.described_in.name} describes a model that cannot be built here",
                where=str(self.described_in),
                got=error.errors()[0]["msg"],
            ) from error

    def check_length(self, sequence_length: int) -> None:
        """Check that a context length of one's own is not longer than the folder's.

        Raises:
            ConfigError: it is; `key` is "sequence_length".
        """
        longest = self.fields["sequence_length"]
        if sequence_length > longest:
            raise self._differs("sequence_length", sequence_length, f"at most {longest}")

    @abstractmethod
    def state(self, config: TransformerConfig) -> Mapping[str, Tensor]:
        """Read the weights for a model of an adopted configuration.

        Raises:
            CheckpointError, ConfigError: they cannot be read, or do not fit.
        """

    @property
    def biases_can_go(self) -> bool:
        """Whether biases may be switched off."""
        return False

    @property
    def described_in(self) -> Path:
        """What describes it."""
        return self.folder

    def _check(self, field: str, ours: Any, theirs: Any) -> None:
        if ours != theirs:
            raise self._differs(field, ours, in_yaml(theirs))

    def _differs(self, field: str, ours: Any, expected: str) -> ConfigError:
        return ConfigError(
            f"{field} differs from the model to start from, {self.folder}",
            key=field,
            got=in_yaml(ours),
            expected=expected,
            fix=f"remove {field}, or start without model.init_from",
        )


@dataclass(frozen=True)
class Pretrained(ModelToStartFrom):
    """A folder of the `transformers` library whose `config.json` has been read.

    Attributes:
        layout: the family's.
    """

    layout: Layout

    @classmethod
    def open(cls, folder: str | Path) -> Pretrained:
        """Read what a folder describes; its weights are not touched.

        Raises:
            CheckpointError: the folder does not exist, or it cannot be read.
            ConfigError: it describes a model that cannot be built here.
        """
        path = Path(folder)
        with contextlib.suppress(RuntimeError):  # "~models" looks like the home of a user
            path = path.expanduser()
        if not path.is_dir():
            raise no_start(path)
        where = path / "config.json"
        described = Described(_read_object(where), str(where))
        kind = described.choice("model_type", LAYOUTS.names(), None)
        layout = LAYOUTS.build(kind)
        return cls(path, layout.fields(described), layout)

    @property
    def biases_can_go(self) -> bool:
        """Whether biases may be switched off: the layout has them in any case."""
        return self.layout.always_has_biases

    @property
    def described_in(self) -> Path:
        """What describes it."""
        return self.folder / "config.json"

    def state(self, config: TransformerConfig) -> dict[str, Tensor]:
        """Read the weights, as float32, for a model of an adopted configuration.

        A position table longer than the context length is cut to its first rows.

        Raises:
            CheckpointError: a file is missing or damaged; a tensor is missing, too much, of
                another shape or type, or not finite.
            ConfigError: biases were switched off, and the folder's are not zero.
        """
        # A table of positions has the folder's length, not the run's context length.
        whole = config.model_copy(update={"sequence_length": self.fields["sequence_length"]})
        tensors = self._read(whole)
        if self.layout.always_has_biases and not config.bias:
            self._check_zero_biases(tensors)
        state = self.layout.to_ours(whole, tensors)
        table = state.get("positions.table.weight")
        if table is not None:
            state["positions.table.weight"] = table[: config.sequence_length]
        return state

    def _read(self, config: TransformerConfig) -> dict[str, Tensor]:
        """Read exactly the tensors that the layout has for a model."""
        expected = self.layout.shapes(config)
        files = self._files()
        found: dict[str, tuple[Path, str]] = {}
        faults = []
        for path, names in files.items():
            with _opened(path) as file:
                present = set(file.keys())
            faults += [f"'{name}' is not in {path.name}" for name in sorted(names - present)]
            for name in sorted(present):
                canonical = self.layout.canonical(name)
                if canonical in found:
                    faults.append(f"'{name}' is there twice")
                elif not name.endswith(self.layout.derived):
                    found[canonical] = (path, name)
        copy = found.pop("lm_head.weight", None) if config.tie_embeddings else None
        faults += [f"'{name}' is missing" for name in expected if name not in found]
        faults += [f"'{name}' is too much" for name in found if name not in expected]
        self._refuse(faults)
        tensors = {}
        for path in files:
            with _opened(path) as file:
                for name, (holder, their_name) in found.items():
                    if holder == path:
                        tensors[name] = _tensor(file, their_name, path)
        for name, shape in expected.items():
            tensor = tensors[name]
            if tensor.shape != shape:
                faults.append(f"'{name}' is {tuple(tensor.shape)}, expected {tuple(shape)}")
            elif tensor.dtype not in _DTYPES:
                faults.append(f"'{name}' is {tensor.dtype}, expected float32, float16 or bfloat16")
            elif not torch.isfinite(tensor).all():
                faults.append(f"'{name}' is not finite")
        if copy is not None:
            with _opened(copy[0]) as file:
                head = _tensor(file, copy[1], copy[0])
            # Some files spell the shared matrix out twice.
            if not torch.equal(head, tensors[self._embedding(config)]):
                faults.append("'lm_head.weight' differs from the embedding that it is tied to")
        self._refuse(faults)
        return {name: tensor.float() for name, tensor in tensors.items()}

    def _embedding(self, config: TransformerConfig) -> str:
        return next(
            entry.theirs
            for entry in self.layout.entries(config)
            if entry.ours == ("token_embedding.weight",)
        )

    def _files(self) -> dict[Path, set[str]]:
        """Return the weight files, each with the names that an index promises in it."""
        if (self.folder / WEIGHTS).is_file():
            return {self.folder / WEIGHTS: set()}
        index = self.folder / INDEX
        if not index.is_file():
            others = sorted(
                path.name for path in self.folder.iterdir() if path.suffix in (".bin", ".pt", ".h5")
            )
            raise CheckpointError(
                "there are no weights to start from",
                where=str(self.folder),
                got=", ".join(others) or "no weight file",
                expected=f"{WEIGHTS} or {INDEX}",
                fix="save the model again with transformers, which writes safetensors; other kinds"
                " of weight files can run code and are never opened",
            )
        weight_map = _read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("the index names no weights", where=str(index))
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            # A name with a slash could leave the folder.
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(
                    "the index names a file outside the folder", where=str(index), got=repr(file)
                )
            files.setdefault(self.folder / file, set()).add(name)
        return files

    def _check_zero_biases(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(".bias") and tensor.any():
                raise self._differs("bias", False, "true, for its biases are not zero")

    def _refuse(self, faults: list[str]) -> None:
        if faults:
            more = len(faults) - _MAX_NAMED
            raise CheckpointError(
                "the weights are not those that config.json describes",
                where=str(self.folder),
                got="; ".join(faults[:_MAX_NAMED]) + (f"; {more} more" if more > 0 else ""),
                fix="download or export the folder again",
            )


def _opened(path: Path) -> Any:
    _refuse_what_is_no_file(path)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "this is not a readable safetensors file", where=str(path), got=str(error)
        ) from error


def _tensor(file: Any, name: str, path: Path) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that it lacks
        raise CheckpointError(
            f"tensor '{name}' cannot be read", where=str(path), got=str(error)
        ) from error
    return tensor


def _refuse_what_is_no_file(path: Path) -> None:
    # A pipe would never end.
    if not path.is_file():
        raise CheckpointError("there is no such file", where=str(path))


def _read_object(path: Path) -> dict[str, Any]:
    _refuse_what_is_no_file(path)
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("this cannot be read", where=str(path), got=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError("it is not a JSON object", where=str(path), got=type(value).__name__)
    return value
