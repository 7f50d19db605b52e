"""The JSON schemas of a run's YAML, with every component and its options, and of a sweep's.

It imports no torch.

It takes the schema of `RunConfig` and puts, in place of each component, what the catalogue knows of
its kind. A component's options depend on its name, so they are written as if/then for each name: an
editor, or jsonschema's `best_match`, then names the one key that is wrong. What several fields say
together is left to the configuration itself (`check`).

`python -m fundamentallm.engine.schema` writes the two files that the package carries: the catalogue
and the schema without plugins.
"""

from __future__ import annotations

import json
from typing import Any

from fundamentallm.config import RunConfig
from fundamentallm.config.evaluation import TAKEN_NAMES
from fundamentallm.config.model import TRANSFORMER
from fundamentallm.config.sweep import OF_THE_SWEEP, Range, SweepConfig
from fundamentallm.config.yaml.file import SCHEMA, TITLE
from fundamentallm.engine.catalogue import CATALOGUE, KINDS, Catalogue, registered_catalogue

_COMPONENT = {"$ref": "#/$defs/Component"}
_SECTIONS = {"training": "TrainingConfig", "data": "DataConfig", "model": "TransformerConfig"}

_DIALECT = "https://json-schema.org/draft/2020-12/schema"

JSON = dict[str, Any]


def run_schema(catalogue: Catalogue) -> JSON:
    """Return the schema (draft 2020-12) of a run's YAML.

    Args:
        catalogue: the components that exist.
    """
    schema: JSON = _tidied(RunConfig.model_json_schema())
    definitions = schema["$defs"]
    for kind, place in KINDS.items():
        section, _, field = place.partition(".")
        properties = definitions[_SECTIONS[section]]["properties"] if section in _SECTIONS else {}
        for model in ("TransformerConfig", "FamilyConfig") if kind == "adapters" else ():
            _choose(definitions[model]["properties"], field, kind)
        if _uses_component(properties.get(field, {})):
            _choose(properties, field, kind)
    del definitions["Component"]
    for kind in KINDS:
        if kind not in ("handlers", "families", "sources"):
            definitions[kind] = _component(catalogue[kind])
    definitions["DataConfig"]["properties"]["source"]["examples"] = list(catalogue["sources"])
    definitions["EvaluationConfig"]["properties"]["metrics"].update(_metrics(catalogue["metrics"]))
    schema["properties"]["handlers"].update(_handlers(catalogue["handlers"]))
    _put_families(schema, catalogue["families"])
    return {
        "$schema": _DIALECT,
        "title": TITLE,
        **{key: value for key, value in schema.items() if key != "title"},
    }


def sweep_schema(catalogue: Catalogue) -> JSON:
    """Return the schema (draft 2020-12) of SWEEP.yaml.

    The keys of a run in sections that are the same for every model are known, with their values.
    Deeper keys (options of components) and keys of the model are left to `sweep` itself, which
    checks all before it trains.

    Args:
        catalogue: the components that exist.
    """
    run = run_schema(catalogue)
    schema: JSON = _tidied(SweepConfig.model_json_schema())
    definitions = {**run["$defs"], **schema["$defs"], "Range": _tidied(Range.model_json_schema())}
    sections = {name: definitions[of] for name, of in _SECTIONS.items() if name != "model"}
    known = {
        f"{section}.{field}": value
        for section, of in sections.items()
        for field, value in of["properties"].items()
        if f"{section}.{field}" not in OF_THE_SWEEP
    }
    names: JSON = {
        "if": {"pattern": f"^({'|'.join(sections)})(\\.[^.]*)?$"},
        "then": {"enum": list(known)},
        "else": {"not": {"pattern": "^(name|seed|handlers\\.pruning)(\\.|$)"}},
    }
    properties = schema["properties"]
    properties["fixed"].update(properties=known, propertyNames=names)
    properties["keys"].update(
        properties={key: _values(value) for key, value in known.items()},
        additionalProperties=_values(True),
        propertyNames=names,
    )
    drawn: JSON = {"properties": {"method": {"enum": ["random", "optuna"]}}, "required": ["method"]}
    lists: JSON = {"additionalProperties": {"type": "array"}}
    return {
        "$schema": _DIALECT,
        "title": "FundamentaLLM sweep",
        **{key: value for key, value in schema.items() if key != "title"},
        "$defs": definitions,
        "if": drawn,
        "then": {"required": ["trials"], "properties": {"trials": {"type": "integer"}}},
        "else": {"properties": {"trials": {"type": "null"}, "keys": lists}},
    }


def _values(schema: JSON | bool) -> JSON:
    """Return the schema of the values of a key: a list of them, or a range."""
    return {
        "type": ["array", "object"],
        "if": {"type": "array"},
        "then": {"items": schema, "minItems": 1},
        "else": {"$ref": "#/$defs/Range"},
    }


def schema_text(catalogue: Catalogue, of_sweep: bool = False) -> str:
    """Return the schema of a run's YAML, or of a sweep's, as JSON text."""
    schema = sweep_schema(catalogue) if of_sweep else run_schema(catalogue)
    return json.dumps(schema, indent=1) + "\n"


def _tidied(schema: Any, named: bool = False) -> Any:
    """Return a schema without pydantic's titles, each description on one line.

    Args:
        schema: a part of a schema.
        named: its keys are names of fields and not keywords.
    """
    if isinstance(schema, list):
        return [_tidied(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {
        key: _tidied(value, named=not named and key in ("properties", "$defs"))
        for key, value in schema.items()
        if named or key != "title"
    }
    if not named and isinstance(result.get("description"), str):
        result["description"] = " ".join(result["description"].split())
    return result


def _uses_component(schema: JSON) -> bool:
    return _COMPONENT["$ref"] in (
        schema.get("$ref"),
        *(c.get("$ref") for c in schema.get("anyOf", ())),
    )


def _choose(properties: JSON, field: str, kind: str) -> None:
    """Let a field choose a component of a kind."""
    schema = properties[field]
    own = {key: value for key, value in schema.items() if key not in ("$ref", "anyOf")}
    chosen: JSON = {"$ref": f"#/$defs/{kind}"}
    if "anyOf" in schema:  # None is allowed
        chosen = {"if": {"type": ["string", "object"]}, "then": chosen, "else": {"type": "null"}}
    properties[field] = {**own, **chosen}


def _component(entries: dict[str, JSON]) -> JSON:
    """Return the schema of `name` or `{name: ..., option: ...}`."""
    return {
        "type": ["string", "object"],
        "examples": list(entries),  # what an editor offers before a form is chosen
        "if": {"type": "string"},
        "then": _name([name for name, entry in entries.items() if not entry["required"]], entries),
        "else": {
            "properties": {"name": _name(list(entries), entries)},
            "required": ["name"],
            **_each("name", entries),
        },
    }


def _name(names: list[str], entries: dict[str, JSON]) -> JSON:
    """Return the schema of a name; editors show the descriptions."""
    return {
        "type": "string",
        "enum": names,
        "markdownEnumDescriptions": [entries[name]["summary"] for name in names],
    }


def _each(key: str, entries: dict[str, JSON], beside: JSON | None = None) -> JSON:
    """Return the conditions of all names; a list of none is not allowed in a schema."""
    conditions = [_if_named(key, name, entry, beside) for name, entry in entries.items()]
    return {"allOf": conditions} if conditions else {}


def _if_named(key: str, name: str, entry: JSON, beside: JSON | None = None) -> JSON:
    """Return: if `key` is this name, then only these options."""
    options = _options(entry)
    return {
        "if": {"properties": {key: {"const": name}}, "required": [key]},
        "then": {**options, "properties": {key: True, **(beside or {}), **options["properties"]}},
    }


def _options(entry: JSON) -> JSON:
    """Return the schema of a mapping of options."""
    return {
        "description": entry["summary"],
        "properties": entry["options"],
        "required": entry["required"],
        "additionalProperties": False,
    }


def _handlers(entries: dict[str, JSON]) -> JSON:
    """Return the schema of handlers by name: their options, true or false."""
    return {
        "properties": {
            name: {
                "type": ["boolean", "object"],
                "if": {"type": "object"},
                "then": _options(entry),
                "else": {"enum": [False] if entry["required"] else [True, False]},
                "description": entry["summary"],
            }
            for name, entry in entries.items()
        },
        "additionalProperties": False,
    }


def _metrics(entries: dict[str, JSON]) -> JSON:
    """Return the schema of metrics by name; a mapping without `name` has the options of its key."""
    chosen: JSON = {"$ref": "#/$defs/metrics"}
    off: JSON = {"const": False}
    return {
        "properties": {
            name: {
                "if": {"type": "object", "not": {"required": ["name"]}},
                "then": _options(entry),
                "else": {"if": {"type": ["boolean", "null"]}, "else": chosen},
                "description": entry["summary"],
            }
            for name, entry in entries.items()
        },
        "additionalProperties": {"if": {"type": "boolean"}, "then": off, "else": chosen},
        "propertyNames": {
            "pattern": "^[A-Za-z0-9_-]{1,100}$",
            "not": {"enum": list(TAKEN_NAMES)},
        },
    }


def _put_families(schema: JSON, entries: dict[str, JSON]) -> None:
    """Let `model` be a transformer, or another family with its options."""
    definitions = schema["$defs"]
    shared = definitions.pop("FamilyConfig")["properties"]
    del shared["family"]
    family = _name(list(entries), entries)
    definitions["TransformerConfig"]["properties"]["family"].update({"const": TRANSFORMER})
    others = {name: entry for name, entry in entries.items() if name != TRANSFORMER}
    model = schema["properties"]["model"]
    del model["anyOf"]
    model.update(
        {
            "type": "object",
            "if": {"properties": {"family": {"const": TRANSFORMER}}},
            "then": {"$ref": "#/$defs/TransformerConfig"},
            "else": {
                "properties": {"family": family},
                **_each("family", others, shared),
            },
        }
    )


def main() -> None:
    """Write the catalogue and the schema that the package carries."""
    catalogue = registered_catalogue()
    CATALOGUE.write_text(json.dumps(catalogue, indent=1) + "\n", encoding="utf-8")
    SCHEMA.write_text(schema_text(catalogue), encoding="utf-8")


if __name__ == "__main__":
    main()
