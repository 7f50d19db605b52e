"""Plugins that installed packages offer by entry points."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fundamentallm.engine.catalogue import catalogue_with
from fundamentallm.engine.plugins import GROUP, load_plugins, offered_plugins
from fundamentallm.errors import ConfigError


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a function that installs a package with one module and a short name for it."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package: str, short: str, text: str = "") -> None:
        (tmp_path / f"{package}_module.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"{package}_module", raising=False)
        about = tmp_path / f"{package}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[{GROUP}]\n{short} = {package}_module\n")

    return install


def test_a_short_name_imports_the_module_that_it_stands_for(installed, caplog):
    installed("sophia", "sophia_short")
    with caplog.at_level("INFO", "fundamentallm"):
        load_plugins(["sophia_short"], "a.yaml:1")

    assert "sophia_module" in sys.modules
    assert "importing the plugin sophia_short (sophia_module)" in caplog.text


def test_a_plugin_that_is_not_named_is_not_imported(installed):
    installed("quiet", "quiet_short", "raise RuntimeError('imported')")
    installed("wanted", "wanted_short")

    load_plugins(["wanted_short"], "a.yaml:1")

    assert "quiet_short" in offered_plugins()
    assert "quiet_module" not in sys.modules


def test_to_show_plugins_without_a_name_imports_all_of_them(installed, monkeypatch):
    monkeypatch.setattr("fundamentallm.engine.catalogue.registered_catalogue", dict)
    installed("first", "first_short")
    installed("second", "second_short")

    catalogue_with([])

    assert {"first_module", "second_module"} <= sys.modules.keys()


def test_the_same_name_of_two_packages_is_refused(installed):
    installed("one", "same")
    installed("two", "same")

    with pytest.raises(ConfigError, match="two installed packages offer a plugin 'same'") as caught:
        load_plugins(["same"], "a.yaml:1")
    assert caught.value.got == "one_module and two_module"


def test_a_plugin_that_fails_is_named(installed):
    installed("broken", "broken_short", "1 / 0")

    with pytest.raises(ConfigError, match="'broken_short' failed while it was imported"):
        load_plugins(["broken_short"], "a.yaml:1")


def test_a_module_by_its_own_name_still_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plain_module.py").touch()

    load_plugins(["plain_module"], "a.yaml:1")

    assert "plain_module" in sys.modules
