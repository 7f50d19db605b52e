"""Pydantic's findings -> one ConfigError that says what is wrong, where, and how to fix it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import typing
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Union

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from fundamentallm.config.yaml.key_path import KeyPath, dotted, excerpt
from fundamentallm.config.yaml.other_names import OTHER_NAMES
from fundamentallm.errors import ConfigError, did_you_mean
from fundamentallm.registry import in_words

_PROBLEM = "config_problem"
_MOST_MENTIONED = 3


def problem(
    key: str, what: str, *, got: Any = None, expected: str = "", fix: str = ""
) -> PydanticCustomError:
    """Return an error for a validator to raise.

    Args:
        key: the offending key, dotted, below the field or class that is validated; an index of a
            list is a number.
        what, expected, fix: as in `FundamentaLLMError`.
        got: the offending value itself; None where `what` names it.
    """
    context = {
        "text": "; ".join(
            part for part in (what, expected and f"expected {expected}", fix) if part
        ),
        "key": key,
        "what": what,
        "got": "" if got is None else shown(got),
        "expected": expected,
        "fix": fix,
    }
    return PydanticCustomError(_PROBLEM, "{text}", context)


def shown(value: Any) -> str:
    """Return a value in YAML, cut to fit one line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # an object, or an integer of thousands of digits
        text = f"a value of type {type(value).__name__}"
    return excerpt(text)


def quoting_hint(value: Any) -> str:
    """Return the advice to write a value as text; for a float without an example."""
    return "put it in quotes" + (f': "{shown(value)}"' if type(value) is not float else "")


def to_config_error(
    error: ValidationError,
    root: type[BaseModel],
    data: Any,
    locate: Callable[[KeyPath], str],
) -> ConfigError:
    """Turn a failed validation into one error about the first problem; it lists the others.

    Args:
        error: what pydantic found.
        root: the class that was validated.
        data: the plain values that were validated.
        locate: path -> where it was written.
    """
    findings: dict[KeyPath, ErrorDetails] = {}
    for finding in error.errors(include_url=False):
        findings.setdefault(_path(finding, data), finding)
    first, *others = sorted(findings, key=lambda path: _place(path, data))
    result = _explained(first, findings[first], root)
    result.key = dotted(first)
    result.where = locate(first)
    if others:
        mentioned = [locate(path) for path in others[:_MOST_MENTIONED]]
        if len(others) > _MOST_MENTIONED:
            mentioned.append(f"{len(others) - _MOST_MENTIONED} more")
        then = "then see " + "; ".join(mentioned)
        result.fix = f"{result.fix}; {then}" if result.fix else then
    return result


def _path(finding: ErrorDetails, data: Any) -> KeyPath:
    """Return the part of a finding's location that the data has, and the key within it.

    Pydantic adds the names of a union's members to a location.
    """
    path: KeyPath = ()
    for part in finding["loc"]:
        in_mapping = isinstance(data, dict) and part in data
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if not (in_mapping or in_list):
            break
        data = data[part]
        path = (*path, part)
    key = finding["ctx"]["key"] if finding["type"] == _PROBLEM else ""
    return path + tuple(int(part) if part.isdigit() else part for part in key.split(".") if part)


def _place(path: KeyPath, data: Any) -> tuple[int, ...]:
    """Return where a path stands in the text, for sorting; paths that are not there come first."""
    place: tuple[int, ...] = ()
    for part in path:
        if isinstance(data, dict) and part in data:
            place = (*place, list(data).index(part))
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            place = (*place, part)
            data = data[part]
    return place


def _explained(path: KeyPath, finding: ErrorDetails, root: type[BaseModel]) -> ConfigError:
    kind, value = finding["type"], finding["input"]
    if kind == _PROBLEM:
        details = finding["ctx"]
        return ConfigError(
            details["what"], got=details["got"], expected=details["expected"], fix=details["fix"]
        )
    if kind == "extra_forbidden":
        return _unknown_key(path, root)
    schema = _schema_at(path, root)
    fix = ""
    if value is None:
        what, fix = "the key has no value", "write a value, or remove the key for the default"
    elif value in ("", []):
        what = "the value is empty"
    elif kind == "finite_number":
        what = "the number is not finite"
    elif kind == "literal_error":
        what, fix = "unknown value", did_you_mean(str(value), schema.get("enum", ()))
    elif kind in _OUT_OF_RANGE or (kind == "float_type" and type(value) is int):
        what = "out of range"  # the latter: an integer too large for a float
    else:
        what, fix = f"wrong type: {_type_in_words(value)}", _spelling(value, schema)
    return ConfigError(what, got=shown(value), expected=in_words(schema), fix=fix)


_OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}


def _unknown_key(path: KeyPath, root: type[BaseModel]) -> ConfigError:
    key = str(path[-1])
    own = class_at(path[:-1], root)
    known = list(own.model_fields) if own else []
    fix = (
        _elsewhere(key, own, root)
        or _of_another_tool(key, path[:-1], root)
        or did_you_mean(key, known)
        or _near_elsewhere(key, root)
    )
    return ConfigError(
        f"unknown key '{excerpt(key)}'",
        expected="" if fix else "one of " + ", ".join(known),
        fix=fix or "remove it, or choose one of these",
    )


def _elsewhere(key: str, own: type[BaseModel] | None, root: type[BaseModel]) -> str:
    """Return where a key belongs that another section knows, or an empty string."""
    if own is not root and key in root.model_fields:
        return "this key belongs at the top level"
    for section, known in _sections(root).items():
        if key in known:
            return f"this key belongs under {section}:"
    return ""


def _of_another_tool(key: str, path: KeyPath, root: type[BaseModel]) -> str:
    """Return what a key of another tool is called here; only for the sections of a run."""
    ours = OTHER_NAMES.get(key.lower())
    if ours is None or len(path) > 1 or "training" not in root.model_fields:
        return ""
    return f"did you mean {ours}?"


def _near_elsewhere(key: str, root: type[BaseModel]) -> str:
    for section, known in _sections(root).items():
        if hint := did_you_mean(key, known):
            return f"{hint.removesuffix('?')} under {section}:?"
    return ""


def _sections(root: type[BaseModel]) -> dict[str, list[str]]:
    """Return the keys that each section of a configuration knows."""
    classes = {name: class_at((name,), root) for name in root.model_fields}
    return {name: list(found.model_fields) for name, found in classes.items() if found}


def class_at(path: KeyPath, root: type[BaseModel]) -> type[BaseModel] | None:
    """Return the class of the section or component at a path, None for any other value."""
    found = root
    annotation: Any = None
    for part in path:
        if isinstance(part, int):
            annotation = _item_of(annotation)
        else:
            field = found.model_fields.get(str(part))
            annotation = _section_of(field.annotation) if field else None
        if path[-1] != part and _item_of(annotation) is not None:
            continue  # a list: the next part is a number in it
        if not (inspect.isclass(annotation) and issubclass(annotation, BaseModel)):
            return None
        found = annotation
    return found


def _section_of(annotation: Any) -> Any:
    """Return the first section or component of a union, else the annotation."""
    if typing.get_origin(annotation) not in (Union, UnionType):
        return annotation
    kinds = (kind for kind in typing.get_args(annotation) if typing.get_origin(kind) is None)
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), annotation)


def _item_of(annotation: Any) -> Any:
    """Return the class of the items of a list or optional list; None for anything else."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    choices = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return choices[0]
    if typing.get_origin(annotation) not in (Union, UnionType):
        return None
    return next((item for choice in choices if (item := _item_of(choice)) is not None), None)


@functools.cache
def schema_of(section: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a section, to read: it is made once, in some ten milliseconds."""
    return section.model_json_schema()


def _schema_at(path: KeyPath, root: type[BaseModel]) -> dict[str, Any]:
    schema = schema_of(root)
    definitions = schema.get("$defs", {})
    for part in path:
        if "$ref" in schema:
            schema = definitions[schema["$ref"].rpartition("/")[2]]
        if isinstance(part, int):
            prefix = schema.get("prefixItems", [])
            schema = prefix[part] if part < len(prefix) else schema.get("items", {})
        else:
            properties = schema.get("properties", {})
            schema = properties.get(part) or schema.get("additionalProperties") or {}
        schema = next((kind for kind in schema.get("anyOf", ()) if "$ref" in kind), schema)
    return schema


def takes_text_only(path: KeyPath, root: type[BaseModel]) -> bool:
    """Return whether the field at a path takes text, but not numbers, true or false."""
    schema = _schema_at(path, root)
    kinds = {choice.get("type") for choice in schema.get("anyOf", [schema])}
    return "string" in kinds and not kinds & {"integer", "number", "boolean"}


def _type_in_words(value: Any) -> str:
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return {**words, list: "a list", dict: "a mapping of keys"}.get(
        type(value), type(value).__name__
    )


def _spelling(value: Any, schema: dict[str, Any]) -> str:
    """Return a hint for a value of the wrong type if the right spelling is obvious."""
    kinds = {choice.get("type") for choice in schema.get("anyOf", [schema])}
    if "boolean" in kinds:
        return _boolean_hint(value)
    if kinds & {"integer", "number"}:
        return _number_hint(value, integer="integer" in kinds)
    if kinds == {"array"} and isinstance(value, str):
        return f"write a list: [{excerpt(value)}]"
    if "string" in kinds and isinstance(value, (bool, int, float)):
        return quoting_hint(value)
    return ""


def _boolean_hint(value: Any) -> str:
    word = str(value).lower() if isinstance(value, (str, int)) else ""
    if word in ("yes", "on", "y", "true", "1"):
        return "write true"
    return "write false" if word in ("no", "off", "n", "false", "0") else ""


def _number_hint(value: Any, *, integer: bool) -> str:
    """Return the plain decimal for 1_000, 0o17, "3" in quotes, or 1e5 where a count belongs."""
    if isinstance(value, bool):
        return "true and false are not numbers"
    number = _lenient_number(value) if isinstance(value, str) else value
    if not isinstance(number, (int, float)) or not abs(number) < 1e18:
        return ""
    if integer and number != int(number):
        return ""
    return f"write {shown(int(number) if integer else number)}"


def _lenient_number(text: str) -> float | None:
    digits = text.replace("_", "")
    for convert in (lambda: int(digits, 0), lambda: float(digits)):
        with contextlib.suppress(ValueError):
            return convert()
    return None
