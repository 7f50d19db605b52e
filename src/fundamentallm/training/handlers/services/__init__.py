"""Loggers of services: one file each."""

from fundamentallm.training.handlers.services.base import RunDescription, ServiceLogger
from fundamentallm.training.handlers.services.mlflow import MLflow

__all__ = ["MLflow", "RunDescription", "ServiceLogger"]
