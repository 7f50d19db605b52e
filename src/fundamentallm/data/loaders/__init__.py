"""Loaders: the step batches of every kind of source, in an order that is computed."""

from fundamentallm.data.batch import (
    IGNORED,
    Batch,
    Window,
    add_documents,
    as_batch,
    as_window,
    count_valid,
)
from fundamentallm.data.loaders.epoch import Batching, EpochLoader, ValidationBatches
from fundamentallm.data.loaders.examples import ExampleLoader, ExampleValidationLoader
from fundamentallm.data.loaders.mixture import (
    MixtureLoader,
    MixtureValidationLoader,
    split_evenly,
)
from fundamentallm.data.loaders.plain import WindowLoader, as_window_loader, batch_shape_of
from fundamentallm.data.loaders.tokens import TokenWindowLoader, ValidationLoader, as_tokens

__all__ = [
    "IGNORED",
    "Batch",
    "Batching",
    "EpochLoader",
    "ExampleLoader",
    "ExampleValidationLoader",
    "MixtureLoader",
    "MixtureValidationLoader",
    "TokenWindowLoader",
    "ValidationBatches",
    "ValidationLoader",
    "Window",
    "WindowLoader",
    "add_documents",
    "as_batch",
    "as_tokens",
    "as_window",
    "as_window_loader",
    "batch_shape_of",
    "count_valid",
    "split_evenly",
]
