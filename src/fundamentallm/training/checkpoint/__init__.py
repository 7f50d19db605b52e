"""Checkpoints: durable, verified, without pickle."""

from __future__ import annotations

from fundamentallm.training.checkpoint.manager import CheckpointManager

__all__ = ["CheckpointManager"]
