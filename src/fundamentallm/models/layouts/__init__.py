"""Layouts: the forms in which other tools store a model, one file each."""

from __future__ import annotations

from fundamentallm.models.layouts.base import (
    LAYOUTS,
    Layout,
    Obstacle,
    layout_for,
    require_transformer,
)
from fundamentallm.models.layouts.gpt2 import GPT2Layout
from fundamentallm.models.layouts.llama import LlamaLayout

__all__ = [
    "LAYOUTS",
    "GPT2Layout",
    "Layout",
    "LlamaLayout",
    "Obstacle",
    "layout_for",
    "require_transformer",
]
