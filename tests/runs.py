"""Runs that several tests look at: trained once, copied for each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fundamentallm.engine.cli import main

SMALLEST = """\
name: tiny
data: {source: text.txt, sequence_length: 4, batch_size: 2}
model: {d_model: 8, num_layers: 1, num_heads: 1}
training: {total_steps: 2, eval_steps: 2}
handlers: {tensorboard: false, samples: false, progress: false}
"""
"""A configuration of two steps, of a text.txt of a few hundred letters."""


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
