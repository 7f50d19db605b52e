"""Sources of text, read: one class for each kind, behind one interface (`Source`)."""

from fundamentallm.data.built_in import SOURCES
from fundamentallm.data.sources.base import (
    Loaders,
    SequenceSource,
    Source,
    split_bounds,
    split_tokens,
)
from fundamentallm.data.sources.examples import ExampleSource
from fundamentallm.data.sources.mixture import MixtureSource
from fundamentallm.data.sources.read import read_source
from fundamentallm.data.sources.text import TextSource
from fundamentallm.data.sources.tokens import SplitTokenSource, TokenSource

__all__ = [
    "SOURCES",
    "ExampleSource",
    "Loaders",
    "MixtureSource",
    "SequenceSource",
    "Source",
    "SplitTokenSource",
    "TextSource",
    "TokenSource",
    "read_source",
    "split_bounds",
    "split_tokens",
]
