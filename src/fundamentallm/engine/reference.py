"""The reference pages of the documentation, generated from the code. Imports no torch.

`python -m fundamentallm.engine.reference docs` writes three pages: every key of a YAML file, every
registered component with its options, and every command with its arguments. A test holds the pages
against the code, and each cell of a table has a text: a key without a unit or an example, or an
argument without a help text, is an error here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from fundamentallm.config import RunConfig
from fundamentallm.config.base import LARGEST_COUNT, BaseConfig
from fundamentallm.config.component import Component
from fundamentallm.config.data import DataConfig, SourceConfig
from fundamentallm.config.evaluation import EvaluationConfig
from fundamentallm.config.model import FamilyConfig, TransformerConfig
from fundamentallm.config.parallel import ParallelConfig, PatienceConfig
from fundamentallm.config.training import TrainingConfig
from fundamentallm.config.yaml.problems import schema_of
from fundamentallm.engine.catalogue import KINDS, Catalogue, stored_catalogue
from fundamentallm.engine.cli import build_parser
from fundamentallm.markdown import code_cell
from fundamentallm.registry import in_words

SECTIONS: dict[str, type[BaseConfig]] = {
    "": RunConfig,
    "data": DataConfig,
    "data.sources": SourceConfig,
    "model": TransformerConfig,
    "model (another family)": FamilyConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
    "parallel": ParallelConfig,
    "parallel.patience": PatienceConfig,
}
"""Where a section stands in a YAML file -> its class."""

NO_UNIT = "none"

_STEPS = "optimizer steps"
_UNITS = {
    "accumulation_steps": "micro-batches",
    "adamw_lr": "change per update",
    "alpha": "share",
    "base": "ratio",
    "betas": "shares",
    "batch_size": "sequences",
    "call_seconds": "seconds",
    "checkpoint_steps": _STEPS,
    "chunk_tokens": "tokens",
    "d_ff": "features",
    "d_model": "features",
    "decay": "share",
    "decay_fraction": "share",
    "decay_rate": "ratio",
    "dropout": "share",
    "embedding_lr": "change per update",
    "eval_steps": _STEPS,
    "every": "evaluations",
    "flush_seconds": "seconds",
    "global_batch": "sequences",
    "head_lr": "change per update",
    "healthy_after": _STEPS,
    "k": "tokens",
    "keep_last": "checkpoints",
    "label_smoothing": "share",
    "learning_rate": "change per update",
    "log_steps": _STEPS,
    "logit_softcap": "logits",
    "max_grad_norm": "gradient norm",
    "max_grad_value": "gradient element",
    "max_overflows": _STEPS,
    "max_per_region": "rollbacks",
    "max_rollbacks": "incidents",
    "max_seconds": "seconds",
    "max_spikes": _STEPS,
    "max_tokens": "tokens",
    "max_transients": _STEPS,
    "min_delta": "nats per token",
    "min_interval": "seconds",
    "min_learning_rate": "change per update",
    "momentum": "share",
    "n_saved": "checkpoints",
    "needed": _STEPS,
    "neighbours": "step batches",
    "num_epochs": "epochs",
    "num_heads": "heads",
    "num_kv_heads": "heads",
    "num_layers": "blocks",
    "num_steps": "iterations",
    "num_tokens": "tokens",
    "patience": "evaluations",
    "peak_tflops": "10^12 FLOP/s",
    "rate_factor": "ratio",
    "rate_steps": _STEPS,
    "rise": "standard deviations",
    "row_beta": "share",
    "save": "seconds",
    "scale": "standard deviation",
    "sequence_length": "tokens",
    "split": "shares",
    "step": "seconds",
    "stop_after_seconds": "seconds",
    "threads": "threads",
    "threshold": "standard deviations",
    "total_steps": _STEPS,
    "vector_lr": "change per update",
    "vocab_size": "tokens",
    "warmup": _STEPS,
    "warmup_steps": _STEPS,
    "window": _STEPS,
    # Numbers that are pure numbers.
    "eps": NO_UNIT,
    "optimizer_eps": NO_UNIT,
    "optimizer_weight_decay": NO_UNIT,
    "seed": NO_UNIT,
    "temperature": NO_UNIT,
    "weight": NO_UNIT,
    "weight_decay": NO_UNIT,
    "z_loss": NO_UNIT,
}
"""Units of numbers by the name of the key. Text and switches have none."""
_OTHER_UNITS = {
    ("spikes", "patience"): _STEPS,
    ("visdom", "port"): NO_UNIT,
    ("pruning", "limits"): "optimizer steps, nats per token",
}
_MAPPINGS = ("handlers", "metrics")  # kinds that are written as `name: {option: value}`

EXAMPLES: dict[str, Any] = {
    "handlers": {"samples": {"num_tokens": 200}, "tensorboard": False},
    "plugins": ["my_package.handlers"],
    "data.sources": [{"path": "books/", "weight": 3}, {"name": "python-docs", "weight": 1}],
    "name": "my-model",
    "data": {"source": "my_texts/"},
    "model": {"num_layers": 6},
    "training": {"learning_rate": 0.001},
    "evaluation": {"metrics": {"accuracy": {}}},
    "parallel": {"patience": {"step": 600}},
    "parallel.patience": {"step": 600},
    "data.source": "my_texts/",
    "data.tokenizer": {"name": "bpe", "vocab_size": 2048},
    "data.global_batch": 64,
    "data.sources.path": "books/",
    "data.sources.url": "https://example.org/books.txt",
    "data.sources.name": "python-docs",
    "data.sources.weight": 3,
    "data.sources.sha256": "9f86d081884c7d65" * 4,
    "model.init_from": "runs/mine",
    "model.size": "auto",
    "model.vocab_size": 4096,
    "model.num_kv_heads": 2,
    "model.d_ff": 512,
    "model.sequence_length": 256,
    "model.normalization": "layernorm",
    "model.positions": {"name": "rotary", "base": 500000},
    "model.feedforward": "gelu",
    "model.dropout": 0.1,
    "model.logit_softcap": 15,
    "model.adapter": "my_adapter",
    "model (another family).family": "my_family",
    "model (another family).vocab_size": 4096,
    "model (another family).sequence_length": 256,
    "model (another family).adapter": "my_adapter",
    "training.learning_rate": 0.001,
    "training.optimizer": {"name": "adamw", "betas": [0.9, 0.95]},
    "training.optimizer_weight_decay": 0.1,
    "training.scheduler": "cosine",
    "training.min_learning_rate": 0.0001,
    "training.loss": {"name": "cross_entropy", "label_smoothing": 0.1},
    "training.bf16_weights": False,
    "training.compile": "native",
    "training.device": "cuda",
    "training.max_grad_value": 1.0,
    "training.threads": 4,
    "training.total_steps": 2000,
    "training.max_tokens": 10_000_000,
    "training.max_seconds": 3600,
    "training.stop_after_seconds": 3000,
    "training.checkpoint_steps": 500,
    "evaluation.metrics": {"accuracy": {}, "top_k": {"k": 5}},
}
"""Values of keys as one would write them, where the default says little."""


def pages() -> dict[str, str]:
    """Return the text of each generated page by its file name."""
    return {
        "configuration.md": configuration_page(),
        "components.md": components_page(stored_catalogue()),
        "commands.md": commands_page(build_parser()),
    }


def configuration_page() -> str:
    """Return the page of every key of a YAML file."""
    parts = [
        "# Every key of a configuration",
        "A run is a YAML file. Each key can also be set on the command line, with dots: "
        "`training.learning_rate=3e-4`. What a component can be stands in "
        "[Components](components.md). `fundamentallm check FILE` tells what the keys say "
        "together.",
    ]
    for place, section in SECTIONS.items():
        parts += [f"## {place or 'Top level'}", _first_line(section.__doc__ or "")]
        parts.append(
            _table(
                ("key", "values", "default", "unit", "example", "description"),
                (_key_row(section, place, key) for key in section.model_fields),
            )
        )
    return _page(parts)


def components_page(catalogue: Catalogue) -> str:
    """Return the page of every component and its options.

    Args:
        catalogue: the components that exist.
    """
    parts = [
        "# Components",
        "What a YAML file can name. A component without options is written as its name, one with "
        "options as `{name: cosine, ...}`; handlers and metrics are mappings of a name to its "
        "options. `fundamentallm list` prints the same, with `--plugins` those of plugins too.",
    ]
    for kind, entries in catalogue.items():
        parts += [f"## {kind}", f"Key: `{KINDS[kind]}`."]
        if not entries:
            parts.append("The package has none; plugins can add some.")
        for name, entry in entries.items():
            parts += [f"### {kind}: {name}", _sentence(entry["summary"])]
            if kind == "families" and name == TransformerConfig.model_fields["family"].default:
                parts.append("Its options are the keys of [model](configuration.md#model).")
            elif entry["options"]:
                parts.append(
                    _table(
                        ("option", "values", "default", "unit", "example", "description"),
                        (_option_row(name, key, entry) for key in entry["options"]),
                    )
                )
            else:
                parts.append("It has no options.")
            parts.append(f"In a file: `{_yaml(written(kind, name, entry))}`.")
    return _page(parts)


def commands_page(parser: argparse.ArgumentParser) -> str:
    """Return the page of every command and its arguments.

    Args:
        parser: the parser of all commands.
    """
    parts = [
        "# Every command",
        "`fundamentallm COMMAND`, or `python -m fundamentallm COMMAND`. `--help` after a command "
        "prints its arguments. With `--debug` an error comes with its traceback.",
    ]
    for name, command in _subparsers(parser).items():
        usage = command.format_usage().removeprefix("usage: ").split()
        parts += [f"## {name}", _sentence(command.description or ""), f"`{' '.join(usage)}`"]
        rows = [
            (code_cell(_argument(action)), _default(action), _cell(_help(action)))
            for action in command._actions
            if action.dest not in ("help", "debug")
        ]
        parts.append(_table(("argument", "default", "description"), rows))
    return _page(parts)


def written(kind: str, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that names a component, with up to two of its options.

    Args:
        kind: a key of `KINDS`.
        name: the component's name.
        entry: what the catalogue knows of it.
    """
    chosen = [
        *entry["required"],
        *(key for key in entry["options"] if key not in entry["required"]),
    ]
    options = {key: option_example(entry["options"][key]) for key in chosen[:2]}
    value: Any = {"name": name, **options} if options else name
    if kind in _MAPPINGS:
        value = {name: options or (True if kind == "handlers" else {})}
    for key in reversed(KINDS[kind].split(".")):
        value = {key: value}
    return dict(value)


def option_example(schema: dict[str, Any]) -> Any:
    """Return a value of an option as one would write it.

    Its own example; else another value than the default where there are few; else the default.

    Args:
        schema: the JSON schema of the option.

    Raises:
        KeyError: the schema has neither example nor default.
    """
    if "examples" in schema:
        return schema["examples"][0]
    default = schema["default"]
    if isinstance(default, bool):
        return not default
    return next((one for one in schema.get("enum", ()) if one != default), default)


def example_of(section: type[BaseConfig], place: str, key: str) -> Any:
    """Return a value of a key as one would write it: of `EXAMPLES`, else as `option_example`.

    Args:
        section: the class of the section.
        place: where the section stands, as in `SECTIONS`.
        key: the name of the field.

    Raises:
        KeyError: `EXAMPLES` lacks a key that has no default of its own.
    """
    path = f"{place}.{key}" if place else key
    if path in EXAMPLES:
        return EXAMPLES[path]
    default = _plain(section.model_fields[key].get_default(call_default_factory=True))
    if default is None or default is PydanticUndefined:
        raise KeyError(path)
    return option_example({**schema_of(section)["properties"][key], "default": default})


def _key_row(section: type[BaseConfig], place: str, key: str) -> tuple[str, ...]:
    field = section.model_fields[key]
    schema = schema_of(section)["properties"][key]
    default = _plain(field.get_default(call_default_factory=True))
    described = _cell(field.description or "")
    if isinstance(default, BaseConfig):
        example = code_cell(f"{key}: {_yaml(example_of(section, place, key))}")
        return (code_cell(key), "a section", "its defaults", NO_UNIT, example, described)
    return (
        code_cell(key),
        _cell(_values(schema)),
        "required" if default is PydanticUndefined else code_cell(_yaml(default)),
        _unit(key, schema),
        code_cell(f"{key}: {_yaml(example_of(section, place, key))}"),
        described,
    )


def _option_row(component: str, key: str, entry: dict[str, Any]) -> tuple[str, ...]:
    schema = entry["options"][key]
    required = key in entry["required"]
    return (
        code_cell(key),
        _cell(_values(schema)),
        "required" if required else code_cell(_yaml(schema["default"])),
        _OTHER_UNITS.get((component, key)) or _unit(key, schema),
        code_cell(f"{key}: {_yaml(option_example(schema))}"),
        _cell(schema.get("description", "")),
    )


def _values(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if schema.get("$ref", "").endswith("/Component"):
        return "a component"
    if "oneOf" in schema:
        return " or ".join(map(_values, schema["oneOf"]))
    if schema.get("type") == "array" and "$ref" in schema.get("items", {}):
        return "a list of sources"
    return in_words(schema).replace(f"{LARGEST_COUNT:,}", "10^15")


def _unit(key: str, schema: dict[str, Any]) -> str:
    kinds = {schema.get("type")} | {choice.get("type") for choice in schema.get("anyOf", ())}
    counted = kinds & {"integer", "number"} or "prefixItems" in schema
    return _UNITS[key] if counted else NO_UNIT


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def _argument(action: argparse.Action) -> str:
    metavar = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    value = metavar if isinstance(metavar, str) else " ".join(metavar)
    if not action.option_strings:
        return value
    flags = ", ".join(action.option_strings)
    return flags if action.nargs == 0 else f"{flags} {value}"


def _default(action: argparse.Action) -> str:
    if action.required and action.nargs not in ("*", "?"):
        return "required"
    if action.nargs == 0 or action.default in (None, [], argparse.SUPPRESS):
        return "not given"
    return code_cell(str(action.default))


def _help(action: argparse.Action) -> str:
    return (action.help or "").replace("%%", "%").replace("%(default)s", str(action.default))


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return value.name if not value.options else {"name": value.name, **value.options}
    return list(value) if isinstance(value, tuple) else value


def _yaml(value: Any) -> str:
    """Return a value in YAML's flow style on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str) and value and value.isprintable() and value == value.strip():
        return value
    return json.dumps(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head)]
    for row in rows:
        if not all(cell.strip("` ") for cell in row):
            raise ValueError(f"a cell is empty: {row}")
        lines.append(list(row))
    if len(lines) == 2:
        return "It takes no arguments."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Return a text that fits a cell: one line, no bar, no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _sentence(text: str) -> str:
    return _cell(text).rstrip(".") + "."


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the pages into the folder that is named."""
    (folder,) = sys.argv[1:] or ["docs"]
    for name, text in pages().items():
        Path(folder, name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
