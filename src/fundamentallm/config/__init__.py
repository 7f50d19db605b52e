"""Describes a run; checked before anything is read or computed. Imports no torch."""

from fundamentallm.config.base import BaseConfig
from fundamentallm.config.component import Component
from fundamentallm.config.data import DataConfig
from fundamentallm.config.load import load_config
from fundamentallm.config.model import FamilyConfig, TransformerConfig
from fundamentallm.config.run import RunConfig
from fundamentallm.config.training import TrainingConfig, resolve_warmup
from fundamentallm.config.yaml.difference import (
    RESUME_MAY_DIFFER,
    config_differences,
    may_differ_on_resume,
)

__all__ = [
    "RESUME_MAY_DIFFER",
    "BaseConfig",
    "Component",
    "DataConfig",
    "FamilyConfig",
    "RunConfig",
    "TrainingConfig",
    "TransformerConfig",
    "config_differences",
    "load_config",
    "may_differ_on_resume",
    "resolve_warmup",
]
