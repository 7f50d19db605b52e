"""Several ranks: how long they wait for each other."""

from __future__ import annotations

from fundamentallm.config.base import BaseConfig, Positive


class PatienceConfig(BaseConfig):
    """Seconds without progress before a run on several ranks is ended."""

    step: Positive = 300.0
    """In a step, and anywhere for a rank that is not heard from at all."""

    save: Positive = 3600.0
    """Where a rank may take long: the start, compilation and the first step, evaluation, samples,
    saving and loading."""


class ParallelConfig(BaseConfig):
    """A run on several ranks; without effect on one process."""

    patience: PatienceConfig = PatienceConfig()
    """When a rank counts as standing still."""
