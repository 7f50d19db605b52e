"""Import a user's modules: the only place where a configuration loads code."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fundamentallm.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

logger = logging.getLogger(__name__)

GROUP = "fundamentallm.plugins"
"""The entry points by which an installed package gives its module a short name."""


def offered_plugins() -> dict[str, EntryPoint]:
    """Return the plugins that installed packages offer, by their short names; imports none.

    Raises:
        ConfigError: two packages offer different modules under one name.
    """
    from importlib.metadata import entry_points

    offered: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP)):
        other = offered.setdefault(entry.name, entry)
        if other.module != entry.module:
            raise ConfigError(
                f"two installed packages offer a plugin '{entry.name}'",
                got=f"{other.module} and {entry.module}",
                fix="name one of these modules, or remove a package",
            )
    return offered


def load_plugins(modules: Sequence[str], where: str) -> None:
    """Import modules so that the names they register resolve; announce it on the terminal.

    The working directory is searched too, as `python -m` does.

    Args:
        modules: short names that installed packages offer, or dotted module names, from a
            configuration file or the command line.
        where: where they were named, for messages.

    Raises:
        ConfigError: a module cannot be found, or fails while it is imported.
    """
    here = str(Path.cwd())
    if modules and here not in sys.path:
        sys.path.insert(0, here)
    offered = offered_plugins() if modules else {}
    for name in modules:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(
                "a plugin's name must be a module name",
                where=where,
                got=name,
                expected="my_package.handlers",
                fix="remove paths and '.py'",
            )
        module = offered[name].module if name in offered else name
        logger.info("importing the plugin %s%s", name, f" ({module})" if module != name else "")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the plugin '{name}' was not found",
                where=where,
                got=str(error),
                fix="run from the folder that contains it, or install it",
            ) from error
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"the plugin '{name}' failed while it was imported",
                where=where,
                got=f"{type(error).__name__}: {error}",
                fix="add --debug to see where",
            ) from error
