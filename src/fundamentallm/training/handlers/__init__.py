"""Handlers: one file each, everything that listens to the training loop.

`events.py` draws the loop; `base.py` says what a handler is and how to add one.
"""

from fundamentallm.training.handlers.adaptive_clip import AdaptiveClip
from fundamentallm.training.handlers.background import BackgroundWriter
from fundamentallm.training.handlers.base import HANDLERS, Handler
from fundamentallm.training.handlers.checkpointing import Checkpointing
from fundamentallm.training.handlers.early_stopping import EarlyStopping
from fundamentallm.training.handlers.evaluation import Evaluation
from fundamentallm.training.handlers.hooks import Hooks
from fundamentallm.training.handlers.logs import MetricsLog
from fundamentallm.training.handlers.loss_ema import LossEMA
from fundamentallm.training.handlers.metrics_writer import MetricsWriter, Record
from fundamentallm.training.handlers.mfu import ModelFlopsUtilization
from fundamentallm.training.handlers.nan_rollback import NaNRollback
from fundamentallm.training.handlers.overfitting import Overfitting
from fundamentallm.training.handlers.perplexity import Perplexity
from fundamentallm.training.handlers.phases import Phases
from fundamentallm.training.handlers.progress import Progress
from fundamentallm.training.handlers.pruning import Pruning
from fundamentallm.training.handlers.samples import Samples
from fundamentallm.training.handlers.schedule import Schedule
from fundamentallm.training.handlers.services import (
    ClearML,
    MLflow,
    Neptune,
    Polyaxon,
    Trackio,
    Visdom,
    WandB,
)
from fundamentallm.training.handlers.signals import Signals
from fundamentallm.training.handlers.spikes import Spikes
from fundamentallm.training.handlers.stop_file import StopFile
from fundamentallm.training.handlers.tensorboard import TensorBoard
from fundamentallm.training.handlers.throughput import Throughput
from fundamentallm.training.handlers.usage import Usage
from fundamentallm.training.handlers.weight_ema import WeightEMA

__all__ = [
    "HANDLERS",
    "AdaptiveClip",
    "BackgroundWriter",
    "Checkpointing",
    "ClearML",
    "EarlyStopping",
    "Evaluation",
    "Handler",
    "Hooks",
    "LossEMA",
    "MLflow",
    "MetricsLog",
    "MetricsWriter",
    "ModelFlopsUtilization",
    "NaNRollback",
    "Neptune",
    "Overfitting",
    "Perplexity",
    "Phases",
    "Polyaxon",
    "Progress",
    "Pruning",
    "Record",
    "Samples",
    "Schedule",
    "Signals",
    "Spikes",
    "StopFile",
    "TensorBoard",
    "Throughput",
    "Trackio",
    "Usage",
    "Visdom",
    "WandB",
    "WeightEMA",
]
