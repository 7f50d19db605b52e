"""What a configuration can name: the kinds of components, their names and their options.

`catalogue.json` is the catalogue of the package itself, written by `python -m
fundamentallm.engine.schema` and held against the registries by a test. It lets `list` and `schema`
answer without torch; with plugins the catalogue is read from the registries.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm.engine.console import console_output
from fundamentallm.engine.plugins import load_plugins, offered_plugins

if TYPE_CHECKING:
    from fundamentallm.registry import Registry

CATALOGUE = Path(__file__).with_name("catalogue.json")

KINDS = {
    "handlers": "handlers",
    "optimizers": "training.optimizer",
    "schedules": "training.scheduler",
    "losses": "training.loss",
    "metrics": "evaluation.metrics",
    "tokenizers": "data.tokenizer",
    "sources": "data.source",
    "families": "model.family",
    "adapters": "model.adapter",
    "normalizations": "model.normalization",
    "positions": "model.positions",
    "feedforwards": "model.feedforward",
}
"""The key of a YAML file at which a component of each kind is named."""

Catalogue = dict[str, dict[str, dict[str, Any]]]
"""Kind -> name -> `summary`, a sentence; `options`, the JSON schema of each; `required`, those
without a default."""


def stored_catalogue() -> Catalogue:
    """Return the catalogue of the package. Imports no torch."""
    catalogue: Catalogue = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    return catalogue


def catalogue_with(plugins: Sequence[str] | None) -> Catalogue:
    """Return the catalogue of the package, or of all that is registered after importing plugins.

    Args:
        plugins: names as for `load_plugins`; empty: all that installed packages offer; None: the
            stored catalogue, without importing torch.

    Raises:
        ConfigError: a plugin is not found, or it fails.
    """
    if plugins is None:
        return stored_catalogue()
    with console_output():
        load_plugins(plugins or list(offered_plugins()), "--plugins")
        return registered_catalogue()


def registered_catalogue() -> Catalogue:
    """Return the catalogue of all that is registered, plugins included. Imports torch."""
    return {
        kind: {name: _entry(registry, name) for name in registry.names()}
        for kind, registry in registries().items()
    }


def registries() -> dict[str, Registry[Any]]:
    """Return the registry of each kind. Imports torch."""
    from fundamentallm.data.built_in import SOURCES
    from fundamentallm.data.tokenizer import TOKENIZERS
    from fundamentallm.engine.wiring import assemble  # noqa: F401 (it imports every part)
    from fundamentallm.models.families import ADAPTERS, MODELS
    from fundamentallm.models.layers.feedforward import FEEDFORWARDS
    from fundamentallm.models.layers.normalization import NORMALIZATIONS
    from fundamentallm.models.layers.positions import POSITIONS
    from fundamentallm.training.handlers import HANDLERS
    from fundamentallm.training.losses import LOSSES
    from fundamentallm.training.metrics import METRICS
    from fundamentallm.training.optimizers import OPTIMIZERS
    from fundamentallm.training.schedulers import SCHEDULERS

    return {
        "handlers": HANDLERS,
        "optimizers": OPTIMIZERS,
        "schedules": SCHEDULERS,
        "losses": LOSSES,
        "metrics": METRICS,
        "tokenizers": TOKENIZERS,
        "sources": SOURCES,
        "families": MODELS,
        "adapters": ADAPTERS,
        "normalizations": NORMALIZATIONS,
        "positions": POSITIONS,
        "feedforwards": FEEDFORWARDS,
    }


def _entry(registry: Registry[Any], name: str) -> dict[str, Any]:
    factory = registry.get(name)
    said = described_arguments(factory)
    options = registry.schemas(name)
    parameters = registry.options(name)
    for key, schema in options.items():
        schema.pop("title", None)
        if key in said:
            schema["description"] = said[key]
    return {
        "summary": summary(factory),
        "options": options,
        "required": [key for key in options if parameters[key].default is inspect.Parameter.empty],
    }


def summary(factory: Callable[..., Any]) -> str:
    """Return the first paragraph of a docstring on one line, without its full stop."""
    own = factory.__doc__ if not inspect.isclass(factory) else vars(factory).get("__doc__")
    paragraph = inspect.cleandoc(own or "").split("\n\n")[0]
    return " ".join(paragraph.split()).removesuffix(".")


def described_arguments(factory: Callable[..., Any]) -> dict[str, str]:
    """Return what the section `Args:` of a docstring says of each argument, on one line.

    None is called null, as in YAML.
    """
    text = re.sub(r"\bNone\b", "null", inspect.cleandoc(factory.__doc__ or ""))
    found = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
    said: dict[str, str] = {}
    names: list[str] = []
    for line in found[1].splitlines() if found else ():
        if heading := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            names = heading[1].split(", ")
            said.update(dict.fromkeys(names, heading[2]))
        else:
            said.update({name: f"{said[name]} {line.strip()}".strip() for name in names})
    return said
