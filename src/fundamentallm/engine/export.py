"""The `export` command: a trained model for other tools."""

from __future__ import annotations

import argparse

import torch

from fundamentallm.engine.console import say, speaking
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.inference.export import export as write_export
from fundamentallm.inference.load import load_trained


def export(options: argparse.Namespace) -> int:
    """Write the model and say what was written."""
    with speaking():
        load_plugins(options.plugins, "--plugins")
        trained = load_trained(options.model, torch.device("cpu"))
        write_export(trained, options.format, options.out)
    weights = ", averaged weights" if trained.averaged else ""
    say(f"{trained.checkpoint} (step {trained.manifest.step}{weights})")
    say(f"written to {options.out} for {_READERS[options.format]}")
    return 0


_READERS = {
    "hf": "transformers: AutoModelForCausalLM and AutoTokenizer, from_pretrained",
    "torch": "torch.load(..., weights_only=True)",
}
