"""Import a user's modules: the only place where a configuration loads code."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.errors import ConfigError

logger = logging.getLogger(__name__)


def load_plugins(modules: Sequence[str], where: str) -> None:
    """Import modules so that the names they register resolve; announce it on the terminal.

    The working directory is searched too, as `python -m` does.

    Args:
        modules: dotted module names, from a configuration file or the command line.
        where: where they were named, for messages.

    Raises:
        ConfigError: a module cannot be found, or fails while it is imported.
    """
    here = str(Path.cwd())
    if modules and here not in sys.path:
        sys.path.insert(0, here)
    for name in modules:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(
                "a plugin's name must be a module name",
                where=where,
                got=name,
                expected="my_package.handlers",
                fix="remove paths and '.py'",
            )
        logger.info("importing the plugin %s", name)
        try:
            importlib.import_module(name)
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
