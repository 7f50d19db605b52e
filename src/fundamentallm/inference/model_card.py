"""The model card of an export: what it is, its losses, its data, how it was made, its settings.

Names and paths are shown as they are (`markdown.py`). Secrets are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import yaml

from fundamentallm.config import TransformerConfig
from fundamentallm.config.data import SourceConfig
from fundamentallm.errors import CheckpointError
from fundamentallm.files.private import open_to_read
from fundamentallm.files.run_layout import METRICS, README
from fundamentallm.inference.load import Trained
from fundamentallm.markdown import escaped, fenced
from fundamentallm.models.layouts import layout_for
from fundamentallm.redaction import redacted, redacted_settings

CARD = README

_USE = {
    "hf": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
""",
    "gguf": """\
ollama create NAME -f Modelfile && ollama run NAME
llama-completion -m model.gguf -no-cnv -p TEXT
""",
}
_LANGUAGE = {"hf": "python", "gguf": "bash"}
_LIBRARY = {"hf": "library_name: transformers\n", "gguf": ""}


def model_card(trained: Trained, format_name: str) -> str:
    """Return a README.md in Markdown, whose head other tools read.

    Args:
        trained: the model.
        format_name: "hf" or "gguf".
    """
    config, metadata = trained.config, trained.manifest.metadata
    parameters = sum(weight.numel() for weight in trained.model.parameters())
    layout = (
        f" in {layout_for(config.model).title}" if type(config.model) is TransformerConfig else ""
    )
    settings = yaml.safe_dump(redacted_settings(config.to_dict()), sort_keys=False)
    return "\n".join(
        [
            "---",
            f"{_LIBRARY[format_name]}pipeline_tag: text-generation",
            f"tags: [fundamentallm, {format_name}]",
            "---",
            f"# {escaped(config.name)}",
            "",
            f"A language model of {parameters:,} parameters{layout}, trained with FundamentaLLM.",
            "",
            fenced(_USE[format_name], _LANGUAGE[format_name]),
            "",
            *_section("Losses", _losses(trained)),
            *_section("Data", _data(trained)),
            *_section("How it was made", _making(trained, metadata)),
            "## Settings",
            "",
            fenced(settings, "yaml"),
            "",
        ]
    )


def _section(title: str, rows: Mapping[str, Any]) -> list[str]:
    cells = [
        f"| {name} | {escaped(redacted(str(value)))} |"
        for name, value in rows.items()
        if value is not None
    ]
    return [f"## {title}", "", "| what | value |", "|---|---|", *cells, ""]


def _losses(trained: Trained) -> dict[str, str]:
    step, measured = trained.manifest.step, {}
    for name, loss in {
        "validation": trained.val_loss,
        "smoothed training": _metric(trained, "train/loss_ema"),
    }.items():
        if loss is not None:
            perplexity = f"{math.exp(loss):.2f}" if loss < 100 else "very large"
            measured[f"{name} loss at step {step:,}"] = (
                f"{loss:.4f} nats per token (perplexity {perplexity})"
            )
    return measured or {"loss": "not measured at this step"}


def _data(trained: Trained) -> dict[str, Any]:
    stored, tokenizer = trained.manifest.metadata.get("data"), trained.tokenizer
    data = stored if isinstance(stored, Mapping) else {}
    configured = trained.config.data
    sources = [one if isinstance(one, str) else _source(one) for one in configured.chosen_sources]
    return {
        "source": ", ".join(sources),
        "SHA-256": data.get("sha256"),
        "tokens, all parts of the split": _count(data.get("num_tokens")),
        "split": " / ".join(f"{part:g}" for part in configured.split),
        "context length": _count(trained.config.model.sequence_length),
        "tokenizer": f"{tokenizer.to_dict()['type']}, {tokenizer.vocab_size:,} tokens",
        "tokenizer's SHA-256": tokenizer.fingerprint(),
    }


def _source(source: SourceConfig) -> str:
    weight = "" if source.weight is None else f" (weight {source.weight:g})"
    return f"{source.text}{weight}"


def _making(trained: Trained, metadata: Mapping[str, Any]) -> dict[str, Any]:
    model = trained.config.model
    start = model.init_from if isinstance(model, TransformerConfig) else None
    return {
        "checkpoint": f"{trained.checkpoint.name}, SHA-256 {trained.manifest.hash}",
        "weights": "averaged over the steps" if trained.averaged else "of that step",
        "started from": start if start is not None else "random weights",
        "optimizer steps": _count(trained.manifest.step),
        "tokens read": _count(_metric(trained, "tokens")),
        "end": metadata.get("finished") or "not reached at this step",
        "machine": _listed(metadata.get("circumstances")),
        "versions": _listed(metadata.get("versions")),
    }


def _metric(trained: Trained, name: str) -> Any:
    """Return the last value of a metric up to the checkpoint's step; None if there is none."""
    found = None
    try:
        with open_to_read(trained.run_dir / METRICS) as file:
            lines = file.readall().splitlines()
    except (OSError, CheckpointError):
        return None
    for line in lines:
        try:
            record = json.loads(line)
            value = record.get(name) if record["step"] <= trained.manifest.step else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        if type(value) in (int, float) and math.isfinite(value or 0):
            found = value
    return found


def _count(number: Any) -> str | None:
    return f"{number:,}" if isinstance(number, (int, float)) else None


def _listed(values: Any) -> str | None:
    if not isinstance(values, Mapping):
        return None
    return ", ".join(f"{name} {value}" for name, value in values.items())
