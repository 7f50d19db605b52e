"""Names in a configuration -> factories in code.

A registry is the only list of what exists. Registering is one decorator:

```python
@OPTIMIZERS.register("lion")
def lion(params, lr: float, *, betas: tuple[float, float] = (0.9, 0.99)) -> Optimizer: ...
```

and `optimizer: {name: lion, betas: [0.95, 0.98]}` works. The options that a configuration may
write are the factory's own parameters, checked against their annotations. Two kinds of parameters
cannot be written: those whose names the registry lists as *supplied*, which the program fills in,
and those of a type that no YAML value has (a function, a stream, an object): they are for callers
in Python. A parameter without an annotation takes any YAML value.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import json
import math
import re
import typing
from collections.abc import Callable, Collection, Mapping
from types import NoneType, UnionType
from typing import Any, Generic, NamedTuple, TypeVar, Union

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from fundamentallm.errors import ConfigError, did_you_mean

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


_NAMES: dict[Callable[..., Any], str] = {}  # of everything that is registered anywhere


def registered_name(factory: Callable[..., Any]) -> str | None:
    """Return the name that a class or function is registered under, None if it is not."""
    return _NAMES.get(factory)


def num_registered() -> int:
    """Return how many classes and functions are registered anywhere; it only grows."""
    return len(_NAMES)


class Registry(Generic[T]):
    """A table of named factories of one kind.

    Args:
        kind: what the factories make, as users call it ("optimizer"); used in messages.
        supplied: parameter names that the program fills in.
    """

    def __init__(self, kind: str, *, supplied: Collection[str] = ()) -> None:
        self.kind = kind
        self.supplied = frozenset(supplied)
        self._factories: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Enter the decorated class or function under `name`.

        Raises:
            ValueError: another factory has the name.
        """

        def decorator(factory: F) -> F:
            existing = self._factories.get(name)
            if existing is not None and _identity(existing) != _identity(factory):
                raise ValueError(f"the {self.kind} name '{name}' is taken by {_identity(existing)}")
            self._factories[name] = factory
            _NAMES.setdefault(factory, name)
            return factory

        return decorator

    def names(self) -> list[str]:
        """Return the known names, sorted."""
        return sorted(self._factories)

    def __contains__(self, name: object) -> bool:
        return name in self._factories

    def get(self, name: str) -> Callable[..., T]:
        """Return the factory called `name`.

        Raises:
            ConfigError: the name is unknown; the message lists the known names and the nearest.
        """
        if name not in self._factories:
            hint = did_you_mean(name, self._factories)
            raise ConfigError(
                f"unknown {self.kind} '{name}'",
                expected="one of " + ", ".join(self.names()),
                fix=hint or f"choose one of these, or register your own {self.kind} in a plugin",
            )
        return self._factories[name]

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the parameters of the factory that a configuration may write."""
        return {key: option.parameter for key, option in self._options(name).items()}

    def schemas(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the JSON schema of each option, with its default where a YAML file can hold it."""
        return {
            key: _with_default(_inlined(option.adapter.json_schema()), option.parameter)
            for key, option in self._options(name).items()
        }

    def _options(self, name: str) -> dict[str, _Option]:
        options = _plain_parameters(self.get(name))
        return {key: option for key, option in options.items() if key not in self.supplied}

    def check(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Check options against the factory's typed signature and return them converted.

        Lists become tuples where the annotation says so, integers become floats; nothing else is
        coerced.

        Raises:
            ConfigError: an unknown name or option, a wrong type, a non-finite number, or a
                missing option; `key` holds the option's name.
        """
        allowed = self._options(name)
        checked = {}
        for key, value in options.items():
            if key not in allowed:
                raise ConfigError(
                    f"{self.kind} '{name}' has no option '{key}'",
                    key=key,
                    expected=(
                        "one of " + ", ".join(sorted(allowed)) if allowed else "no options at all"
                    ),
                    fix=did_you_mean(key, allowed) or "remove it",
                )
            checked[key] = allowed[key].checked(f"{self.kind} '{name}'", key, value)
        for key, option in allowed.items():
            if option.parameter.default is option.parameter.empty and key not in checked:
                raise ConfigError(
                    f"{self.kind} '{name}' needs the option '{key}'", key=key, fix=f"add {key}: ..."
                )
        return checked

    def build(
        self, name: str, options: Mapping[str, Any] | None = None, /, *args: Any, **supplied: Any
    ) -> T:
        """Check the options and call the factory.

        Args:
            name: the registered name.
            options: what the configuration wrote.
            args: positional arguments for the factory.
            supplied: values from the program; each is passed if the factory has a parameter with
                that name and no option sets it.

        Raises:
            ConfigError: as `check`, or an option is out of the factory's range.
        """
        factory = self.get(name)
        checked = self.check(name, options or {})
        parameters = inspect.signature(factory).parameters
        context = {key: value for key, value in supplied.items() if key in parameters}
        try:
            return factory(*args, **{**context, **checked})
        except ValueError as error:
            # A factory raises ValueError for its ranges; in a file that is a user's mistake.
            raise ConfigError(f"{self.kind} '{name}': {error}") from error


def _identity(factory: Callable[..., Any]) -> str:
    """Name a factory by where it is defined, so that a re-imported module may register again."""
    return f"{factory.__module__}.{factory.__qualname__}"


class _Option(NamedTuple):
    """A parameter that takes a plain value, and the type that checks it."""

    parameter: inspect.Parameter
    adapter: TypeAdapter[Any]

    def checked(self, owner: str, key: str, value: Any) -> Any:
        """Return the value converted to the factory's type.

        Raises:
            ConfigError: it is of another type, or not finite.
        """
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(
                f"option '{key}' of {owner} is not finite",
                key=key,
                got=repr(value),
                expected="a number",
            )
        try:
            # Strict JSON: a list may become a tuple and an integer a float, but "3" stays text.
            return self.adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            bounds = ("greater_than", "less_than")
            reason = "out of range" if first["type"].startswith(bounds) else first["msg"].lower()
        except TypeError:  # an object, from a caller in Python
            reason = "a configuration cannot hold this value"
        raise ConfigError(
            f"option '{key}' of {owner}: {reason}",
            key=key,
            got=_written(value),
            expected=in_words(self.adapter.json_schema()),
        )


def _written(value: Any) -> str:
    """Return a value as a file has it: null and true, as JSON and YAML."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        return repr(value)


@functools.cache
def _plain_parameters(factory: Callable[..., Any]) -> dict[str, _Option]:
    """Return the parameters of a factory that a plain value can be given to."""
    hints = _type_hints(factory)
    found = {}
    for key, parameter in inspect.signature(factory).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        annotation = _plain_part(hints.get(key, Any))
        if annotation is not None:
            found[key] = _Option(parameter, TypeAdapter(annotation))
    return found


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with its definitions written where they are used."""
    definitions = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inline(definitions[value["$ref"].rpartition("/")[2]])
        return {key: inline(item) for key, item in value.items()}

    whole: dict[str, Any] = inline(schema)
    return whole


def _with_default(schema: dict[str, Any], parameter: inspect.Parameter) -> dict[str, Any]:
    if parameter.default is parameter.empty:
        return schema
    try:
        return {**schema, "default": json.loads(json.dumps(parameter.default, allow_nan=False))}
    except (TypeError, ValueError):  # an object, or infinity: no value of a YAML file
        return schema


def _plain_part(annotation: Any) -> Any:
    """Return the plain part of a type: the plain members of a union; None if no part is plain.

    A type is plain if JSON can hold its values.
    """
    if typing.get_origin(annotation) in (Union, UnionType):
        plain = [_plain_part(member) for member in typing.get_args(annotation)]
        members = tuple(member for member in plain if member is not None)
        if all(member is NoneType for member in members):
            return None
        return Union[members]  # noqa: UP007 (made while the program runs)
    try:
        TypeAdapter(annotation).json_schema()
    except PydanticUserError:
        return None
    return annotation


class _TypeOfTheProgram:
    """Stands for a type whose name only a type checker can resolve."""

    def __class_getitem__(cls, item: Any) -> type[_TypeOfTheProgram]:
        return cls


def _type_hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a factory's parameters.

    Names that only a type checker imports are looked up in the standard library's abstract types.
    """
    known: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(
                factory.__init__ if inspect.isclass(factory) else factory,
                localns=known,
                include_extras=True,  # the range of a number, an example
            )
        except NameError as error:
            if error.name is None or error.name in known:
                raise
            general = getattr(typing, error.name, _TypeOfTheProgram)
            known[error.name] = getattr(collections.abc, error.name, general)


def in_words(schema: dict[str, Any]) -> str:
    """Describe the values that a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(in_words(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type", "object" if "$ref" in schema else "")
    if kind in ("integer", "number"):
        return ("an integer" if kind == "integer" else "a number") + _range_in_words(schema)
    if kind == "array" and "prefixItems" in schema:
        items = [in_words(item) for item in schema["prefixItems"]]
        if len(set(items)) == 1:
            return f"a list of {len(items)} values, each {items[0]}"
        return "a list of " + " and ".join(items)
    if kind == "array":
        item = in_words(schema.get("items", {})) or "values"
        return "a list of " + re.sub("^a list", "lists", item)
    return {
        "boolean": "true or false",
        "null": "null",
        "object": "a mapping of keys",
        "string": "text",
    }.get(kind, "")


def _range_in_words(schema: dict[str, Any]) -> str:
    lower = {"exclusiveMinimum": " above {:,}", "minimum": " from {:,}"}
    upper = {"exclusiveMaximum": " below {:,}", "maximum": " at most {:,}"}
    bounds = [
        " and".join(words.format(schema[key]) for key, words in side.items() if key in schema)
        for side in (lower, upper)
    ]
    if "minimum" in schema and "maximum" in schema:
        return f"{bounds[0]} to {schema['maximum']:,}"
    return " and".join(filter(None, bounds))
