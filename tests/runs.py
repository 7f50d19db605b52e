"""Runs that several tests look at: trained once, copied for each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fundamentallm.engine.cli import main


def trained(folder: Path, config: str) -> Path:
    """Run a configuration as tiny.yaml in a folder, to its end; return the folder."""
    (folder / "tiny.yaml").write_text(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "tiny.yaml"]) == 0
    return folder


def copied(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy such a folder, work in the copy, and return the run's directory."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    monkeypatch.chdir(target)
    return Path("runs/tiny")
