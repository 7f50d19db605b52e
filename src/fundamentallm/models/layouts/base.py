"""What a layout is: one model as `config.json` and named tensors, there and back.

A layout never changes a model to make it fit. What it cannot express it refuses with the name of
the field; what it reads it reads completely or refuses.

One table ties the tensors of both sides together, and both directions follow from it:

    Entry("h.0.attn.c_attn.weight", (query, key, value), transposed=True)

Shapes: (out, in) for a linear weight of ours; V vocabulary, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fundamentallm.config.component import Component
from fundamentallm.config.model import TRANSFORMER, ModelConfig, TransformerConfig
from fundamentallm.errors import ConfigError
from fundamentallm.models.build import build_base
from fundamentallm.registry import Registry

LAYOUTS: Registry[Layout] = Registry("layout")
"""By the `model_type` of `config.json`."""


@dataclass(frozen=True)
class Obstacle:
    """A choice that a layout cannot express.

    Attributes:
        field: of `TransformerConfig`.
        got: its value as text.
        expected: what the layout has.
    """

    field: str
    got: str
    expected: str


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs and what it holds of ours.

    Attributes:
        theirs: its name in the file.
        ours: names in the model's state; several lie side by side along the last dimension.
        transposed: whether a matrix is stored as (in, out).
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


class Layout(ABC):
    """One family of models as the `transformers` library stores it.

    Attributes:
        title: as people call it.
        components: the one choice that it has for `normalization`, `positions`, `feedforward`.
        always_has_biases: whether its files hold biases even where ours has none.
        derived: ends of names of tensors that old files hold and that are not weights.
    """

    title: ClassVar[str]
    components: ClassVar[Mapping[str, str]]
    always_has_biases: ClassVar[bool] = False
    derived: ClassVar[tuple[str, ...]] = ()

    def obstacles(self, config: TransformerConfig) -> list[Obstacle]:
        """Return the choices of a model that this layout cannot express, components first."""
        found = [
            Obstacle(field, getattr(config, field).name, name)
            for field, name in self.components.items()
            if getattr(config, field).name != name
        ]
        found += [
            Obstacle(field, "true", "false")
            for field in ("qk_norm", "embedding_norm", "token_shift", "residual_mix")
            if getattr(config, field)
        ]
        if config.logit_softcap is not None:
            found.append(Obstacle("logit_softcap", f"{config.logit_softcap:g}", "null"))
        if config.adapter is not None:
            found.append(Obstacle("adapter", config.adapter.name, "null"))
        return found

    @abstractmethod
    def describe(self, config: TransformerConfig) -> dict[str, Any]:
        """Return `config.json` for a model without obstacles."""

    @abstractmethod
    def fields(self, described: Described) -> dict[str, Any]:
        """Return the fields of `TransformerConfig` that a `config.json` decides.

        Raises:
            ConfigError: this package's transformer cannot express it.
        """

    @abstractmethod
    def entries(self, config: TransformerConfig) -> Iterable[Entry]:
        """Yield the table of tensors of a model."""

    def canonical(self, name: str) -> str:
        """Return a tensor's name as `entries` spells it, from one that a file may use."""
        return name

    def to_theirs(
        self, config: TransformerConfig, state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors of a file; views where nothing must be joined.

        Args:
            config: the model's.
            state: its `state_dict`, by our names. Biases that it lacks are zeros.
        """
        shapes = self.state_shapes(config)

        def ours(name: str, transposed: bool) -> Tensor:
            tensor = state[name] if name in state else torch.zeros(shapes[name])
            return tensor.t() if transposed else tensor

        return {
            entry.theirs: _joined([ours(name, entry.transposed) for name in entry.ours])
            for entry in self.entries(config)
        }

    def to_ours(
        self, config: TransformerConfig, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return a `state_dict` from the tensors of a file, whose names and shapes were checked.

        Biases that the model does not have are left out.
        """
        shapes = self.state_shapes(config)
        state = {}
        for entry in self.entries(config):
            tensor, start = tensors[entry.theirs], 0
            for name in entry.ours:
                size = shapes[name][0] if len(entry.ours) > 1 else tensor.size(-1)
                part = tensor.narrow(-1, start, size)
                state[name] = part.t() if entry.transposed else part
                start += size
        if config.tie_embeddings:
            state["head.weight"] = state["token_embedding.weight"]
        if not config.bias:
            state = {name: part for name, part in state.items() if not name.endswith(".bias")}
        return state

    def shapes(self, config: TransformerConfig) -> dict[str, torch.Size]:
        """Return the shapes of the tensors of a file by name."""
        meta = {
            name: torch.empty(shape, device="meta")
            for name, shape in self.state_shapes(config).items()
        }
        return {name: tensor.shape for name, tensor in self.to_theirs(config, meta).items()}

    def state_shapes(self, config: TransformerConfig) -> dict[str, torch.Size]:
        """Return the shapes of our state, with the biases that the file has in any case."""
        if self.always_has_biases:
            config = config.model_copy(update={"bias": True})
        with torch.device("meta"):
            state = build_base(config).state_dict()
        return {name: tensor.shape for name, tensor in state.items()}


@dataclass(frozen=True)
class Described:
    """A `config.json`, asked for one value at a time.

    Attributes:
        values: the object.
        where: its path.
        prefix: before the keys in messages, as "rope_parameters." for those of that section.
    """

    values: Mapping[str, Any]
    where: str
    prefix: str = ""

    def count(self, key: str, default: int | None = None) -> int:
        """Return a whole number above 0; null and a missing key are the default.

        Raises:
            ConfigError: it is something else, or missing without a default.
        """
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._fault(key, "a whole number above 0")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a number above 0.

        Raises:
            ConfigError: it is something else.
        """
        value = self._value(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise self._fault(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false.

        Raises:
            ConfigError: it is something else.
        """
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._fault(key, "true or false")
        return value

    def section(self, key: str) -> Described:
        """Return an object inside; null and a missing key are an empty one.

        Raises:
            ConfigError: it is something else.
        """
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self._fault(key, "an object")
        return Described(value, self.where, f"{self.prefix}{key}.")

    def choice(self, key: str, allowed: Sequence[Any], default: Any) -> Any:
        """Return one of the values that this package can express.

        Raises:
            ConfigError: it is another.
        """
        value = self._value(key, default)
        # 1 is not true, as everywhere in a configuration.
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise self._fault(key, " or ".join(map(repr, allowed)))
        return value

    def absent(self, key: str) -> None:
        """Refuse a key whose meaning would be lost.

        Raises:
            ConfigError: it is there and not null.
        """
        if self.values.get(key) is not None:
            raise self._fault(key, "no such key")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def _fault(self, key: str, expected: str) -> ConfigError:
        got = repr(self.values[key]) if key in self.values else "no such key"
        return ConfigError(
            f"config.json describes a model that cannot be built here: {self.prefix}{key}",
            where=self.where,
            got=got if len(got) <= 200 else got[:200] + "...",
            expected=expected,
            fix="start from a model of the plain Llama or GPT-2 family",
        )


def require_transformer(config: ModelConfig) -> TransformerConfig:
    """Return the configuration of a model if it is of the one family that has layouts.

    Raises:
        ConfigError: it is of another.
    """
    if isinstance(config, TransformerConfig):
        return config
    raise ConfigError(
        "no layout of other tools can express a model of this family",
        key="model.family",
        got=config.family,
        expected=TRANSFORMER,
        fix="use --format torch; a script has its model's own ways (save_pretrained)",
    )


def layout_for(config: TransformerConfig) -> Layout:
    """Return the layout that expresses a model.

    Raises:
        ConfigError: none does; `key` is the first field that stands in the way of the layout
            that comes nearest.
    """
    candidates = [LAYOUTS.build(name) for name in LAYOUTS.names()]
    # The kind of the components decides which family a person meant; the rest is what to change.
    nearest = min(
        candidates,
        key=lambda layout: (
            sum(getattr(config, field).name != name for field, name in layout.components.items()),
            len(layout.obstacles(config)),
        ),
    )
    obstacles = nearest.obstacles(config)
    if not obstacles:
        return nearest
    raise ConfigError(
        f"no layout of other tools can express this model; the nearest is {nearest.title}",
        key=f"model.{obstacles[0].field}",
        got=", ".join(f"model.{one.field} {one.got}" for one in obstacles),
        expected=", ".join(f"model.{one.field} {one.expected}" for one in obstacles),
        fix="train a model of these choices, or use --format torch",
    )


def option(registry: Registry[Any], chosen: Component, key: str) -> Any:
    """Return an option of a component, or its default where it was not written."""
    default = registry.options(chosen.name)[key].default
    return registry.check(chosen.name, chosen.options).get(key, default)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
