"""Import a user's modules: the one place where a configuration reaches code."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.errors import ConfigError

logger = logging.getLogger(__name__)


def load_plugins(modules: Sequence[str], where: str) -> None:
    """Import modules so that the names they register resolve; say so on the terminal.

    The working directory is searched too, as `python -m` does for a module of the user's own.

    Args:
        modules: dotted module names, from a file or command line that a person named.
        where: the place they were named at, for messages.

    Raises:
        ConfigError: a module cannot be found, or fails while it is imported.
    """
    here = str(Path.cwd())
    if modules and here not in sys.path:
        sys.path.insert(0, here)
    for name in modules:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(
                "a plugin is named like a Python module",
                where=where,
                got=name,
                expected="my_package.handlers",
                fix="leave out paths and '.py'",
            )
        logger.info("importing the plugin %s", name)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the plugin '{name}' was not found",
                where=where,
                got=str(error),
                fix="run from the folder that holds it, or install it",
            ) from error
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"the plugin '{name}' failed while it was imported",
                where=where,
                got=f"{type(error).__name__}: {error}",
                fix="--debug shows where",
            ) from error
