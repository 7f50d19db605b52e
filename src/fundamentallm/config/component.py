"""The choice of a component by its name."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from fundamentallm.config.yaml.problems import problem, quoting_hint
from fundamentallm.config.yaml.source import DEEPEST_NESTING
from fundamentallm.errors import did_you_mean


class Component(BaseModel):
    """A choice by name, with options for the factory of that name.

    In YAML: `adamw`, or `{name: adamw, betas: [0.9, 0.95]}`; it is written back in the shortest of
    these forms. The registry, not the configuration, knows which names and options exist.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    name: Annotated[str, Field(min_length=1)]
    """The registered name."""

    options: dict[str, Any] = {}
    """Options by name: text, finite numbers, true, false, null, and lists and mappings of them;
    never called name or options."""

    @model_validator(mode="before")
    @classmethod
    def _from_short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, dict):
            raise problem(
                "", "a component is chosen by its name", got=value, expected=_COMPONENT_FORMS
            )
        if "name" not in value:
            near = next((key for key in value if did_you_mean(str(key), ["name"])), None)
            raise problem(
                "",
                "a component needs a name",
                got=value,
                expected=_COMPONENT_FORMS,
                fix=f"write name: in place of {near}:" if near else "add name: ...",
            )
        if not isinstance(value["name"], str) or not value["name"]:
            raise problem(
                "name",
                "a component is chosen by its name",
                got=value["name"],
                expected="text",
                fix=quoting_hint(value["name"]) if value["name"] else "",
            )
        if value.keys() <= {"name", "options"} and isinstance(value.get("options", {}), dict):
            return value
        return {
            "name": value["name"],
            "options": {key: item for key, item in value.items() if key != "name"},
        }

    @field_validator("options")
    @classmethod
    def _plain_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for reserved in ("name", "options"):
            if reserved in options:
                raise problem("", f"an option cannot be called '{reserved}'")
        plain: dict[str, Any] = plain_options(options)
        return plain

    @model_serializer
    def _shortest_form(self) -> str | dict[str, Any]:
        return self.to_plain()

    def to_plain(self) -> str | dict[str, Any]:
        """Return the name, or a mapping of the name and the options if there are options."""
        return {"name": self.name, **self.options} if self.options else self.name


_COMPONENT_FORMS = "a name, or {name: ..., option: ...}"


def plain_options(value: Any, key: str = "", depth: int = 0) -> Any:
    """Return a value with every tuple as a list, if YAML can hold it and it is finite.

    Args:
        value: what an option was given.
        key: the dotted way to it, for messages.
        depth: its depth in the nesting.

    Raises:
        PydanticCustomError: a value of another type, a number that is not finite, a key that is
            not text, or nesting deeper than a YAML file may have.
    """
    if depth > DEEPEST_NESTING // 2:
        raise problem(key, f"options nested deeper than {DEEPEST_NESTING // 2} levels")
    if isinstance(value, dict):
        result = {}
        for name, item in value.items():
            if not isinstance(name, str):
                raise problem(key, "an option's name must be text", got=name)
            result[name] = plain_options(item, f"{key}.{name}".removeprefix("."), depth + 1)
        return result
    if isinstance(value, (list, tuple)):
        return [plain_options(item, key, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise problem(key, "the number is not finite", got=value, expected="a finite number")
    if type(value) is int and abs(value) >= 2**63:
        raise problem(key, "out of range", got=value, expected="an integer of 64 bits")
    if value is None or type(value) in (str, bool, int, float):
        return value
    raise problem(
        key,
        f"an option cannot be of type {type(value).__name__}",
        expected="text, a number, true, false, null, a list or a mapping",
    )
