"""What every configuration class shares: strict validation, and conversion to YAML and back."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fundamentallm.config.component import Component
from fundamentallm.config.yaml.key_path import excerpt
from fundamentallm.config.yaml.problems import problem, to_config_error
from fundamentallm.config.yaml.source import FLOAT, YamlDocument, parse_yaml, read_yaml
from fundamentallm.errors import MachineError
from fundamentallm.files.private import narrow

if TYPE_CHECKING:
    from typing_extensions import Self

# A count beyond this is a typing error; below it, products of a few counts stay finite as
# floats. It leaves room for 1e15 tokens.
LARGEST_COUNT = 10**15

Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
"""An integer of at least 1."""

CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
"""An integer of at least 0."""

Positive = Annotated[float, Field(gt=0)]
"""A number above 0."""

NonNegative = Annotated[float, Field(ge=0)]
"""A number of at least 0."""

Share = Annotated[float, Field(ge=0, lt=1)]
"""A number from 0 and below 1."""

Fraction = Annotated[float, Field(gt=0, le=1)]
"""A number above 0 and at most 1."""

Text = Annotated[str, Field(min_length=1)]
"""Text of at least one character."""

# NumPy's legacy generator takes no larger seed.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""A seed for every generator of random numbers."""


class BaseConfig(BaseModel):
    """A frozen, strict configuration that survives YAML.

    Unknown keys are refused. "3" and true are not numbers, an integer may stand
    for a float, NaN and infinity are refused everywhere.

    Raises:
        pydantic.ValidationError: (a ValueError) wrong arguments in Python. From YAML, the same
            faults are a ConfigError with file and line.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in their order as plain values: what `to_yaml` writes."""
        unwritten = self._unwritten()
        return {
            name: _plain(getattr(self, name))
            for name in type(self).model_fields
            if name not in unwritten
        }

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Return the configuration as YAML that `from_yaml` turns into an equal one.

        Args:
            path: a file to write as well, as UTF-8; its directory must exist.

        Raises:
            MachineError: the file cannot be written.
        """
        text = dump_yaml(self.to_dict())
        if path is not None:
            write_yaml(path, text)
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """Read a configuration from YAML.

        Args:
            source: a Path or text that ends in .yaml or .yml: a file; other text: the YAML itself.

        Raises:
            ConfigError: a fault of the file, the YAML, or a value; `where` holds file and line.
        """
        if isinstance(source, Path) or source.endswith((".yaml", ".yml")):
            return cls.from_document(read_yaml(source))
        return cls.from_document(parse_yaml(source))

    @classmethod
    def from_document(cls, document: YamlDocument) -> Self:
        """Validate what `read_yaml` or `parse_yaml` returned.

        Raises:
            ConfigError: as in `from_yaml`.
        """
        try:
            return cls.model_validate(document.data)
        except ValidationError as error:
            raise to_config_error(error, cls, document.data, document.locate) from None

    def __eq__(self, other: object) -> bool:
        """Two configurations of one class are equal if their fields are equal."""
        if type(self) is not type(other) or not isinstance(other, BaseConfig):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def _unwritten(self) -> Collection[str]:
        """Return the fields that `to_dict` leaves out because being unset has a meaning."""
        return ()

    def _settle(self, **values: Any) -> None:
        """Complete a frozen configuration while it is validated.

        Fields that were left unset and follow from others get their value here; they still count
        as unset. Nothing else may change a configuration.
        """
        self.__dict__.update(values)


def write_yaml(path: str | Path, text: str, mode: Literal["w", "x"] = "w") -> None:
    """Write a configuration that other users may read.

    Args:
        path: the file; its directory must exist.
        text: its content, written as UTF-8.
        mode: "x" keeps a file that exists.

    Raises:
        MachineError: the file cannot be written.
    """
    try:
        with open(path, mode, encoding="utf-8", opener=narrow) as file:
            file.write(text)
    except OSError as error:
        raise MachineError(
            f"the configuration cannot be written: {error.strerror or error}", where=str(path)
        ) from error


def dump_yaml(plain: Any, flow: bool = False) -> str:
    """Return plain values as YAML that `yaml_source` reads as the same.

    Args:
        plain: nested dicts, lists and single values.
        flow: all in brackets rather than indented.
    """
    text: str = yaml.dump(
        plain,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=flow,
        width=100,
    )
    return text


def in_yaml(value: Any) -> str:
    """Return a value of a configuration as YAML on one line, for a message: null, [1, 2], adamw."""
    text = dump_yaml(_plain(value), flow=True).removesuffix("...\n")
    return excerpt(" ".join(line.strip() for line in text.splitlines()), 200)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseConfig):
        return value.to_dict()
    if isinstance(value, Component):
        return value.to_plain()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class _Dumper(yaml.SafeDumper):
    """Writes what `yaml_source` reads as the same value."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value in full each time: the reader does not accept aliases."""
        return True

    def exact_text(self, text: str) -> yaml.Node:
        """Write text with control characters and line separators as escapes, on one line."""
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def flow_list(self, items: list[Any]) -> yaml.Node:
        """Write a list of single values on one line."""
        flow = not any(isinstance(item, (list, dict)) for item in items)
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(str, _Dumper.exact_text)
_Dumper.add_representer(list, _Dumper.flow_list)
# PyYAML takes the text "1e-4" for text and would write it without quotes; here that is a number.
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"(?:{FLOAT.pattern})$"), list("-+.0123456789")
)


def name_pattern(longest: int) -> str:
    """Return the regular expression of a name that is a directory's name too."""
    return f"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{longest - 1}}}"


def directory_name(name: str, owner: str, longest: int) -> str:
    """Return the name of a run or a sweep (`owner`) if its directory can have it.

    Raises:
        PydanticCustomError: it cannot, with the reason.
    """
    if not re.fullmatch(name_pattern(longest), name) or name.endswith("."):
        raise problem(
            "",
            f"the {owner}'s name cannot be a directory name",
            got=name,
            expected=f"at most {longest} letters, digits, ., _ and -, not beginning with . or -",
            fix=f"choose a name like 'my-{owner}'; to choose the directory, use --{owner}-dir",
        )
    return name
