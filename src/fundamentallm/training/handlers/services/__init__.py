"""Loggers of services: one file each."""

from fundamentallm.training.handlers.services.base import RunDescription, ServiceLogger
from fundamentallm.training.handlers.services.clearml import ClearML
from fundamentallm.training.handlers.services.mlflow import MLflow
from fundamentallm.training.handlers.services.neptune import Neptune
from fundamentallm.training.handlers.services.polyaxon import Polyaxon
from fundamentallm.training.handlers.services.trackio import Trackio
from fundamentallm.training.handlers.services.visdom import Visdom
from fundamentallm.training.handlers.services.wandb import WandB

__all__ = [
    "ClearML",
    "MLflow",
    "Neptune",
    "Polyaxon",
    "RunDescription",
    "ServiceLogger",
    "Trackio",
    "Visdom",
    "WandB",
]
