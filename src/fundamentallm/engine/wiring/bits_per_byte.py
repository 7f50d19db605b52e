"""`val/bits_per_byte`: the validation loss in a unit that tokenizers share."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ignite.engine import Events

from fundamentallm.data.loaders import (
    ExampleValidationLoader,
    MixtureValidationLoader,
    ValidationBatches,
    ValidationLoader,
)
from fundamentallm.data.sources import ExampleSource, Source
from fundamentallm.data.tokenizer import Tokenizer, changes_texts
from fundamentallm.inference.evaluate import (
    Document,
    example_documents,
    predicted_size,
)
from fundamentallm.training.evaluator import Evaluator
from fundamentallm.training.step import bits_per

logger = logging.getLogger(__name__)


class BitsPerByte:
    """Observes: adds `bits_per_byte` to each pass over the validation data, as `evaluate` has it.

    The text is decoded once, at the first pass. If it cannot be, that is a warning.

    Args:
        validation: the batches that count; a pass over others has no such figure.
        documents: the text behind their targets.
        tokenizer: of the run.
    """

    measures = ("bits_per_byte",)

    def __init__(
        self, validation: ValidationBatches, documents: Sequence[Document], tokenizer: Tokenizer
    ) -> None:
        self.validation = validation
        self.documents = documents
        self.tokenizer = tokenizer
        self._num_bytes: int | None = None

    def attach(self, evaluator: Evaluator) -> None:
        """Listen at the end of a pass; not for a tokenizer that changes texts of unknown size."""
        if all(one.size is not None for one in self.documents) or not changes_texts(self.tokenizer):
            evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def write(self, evaluator: Evaluator) -> None:
        """Write the figure of the pass."""
        if evaluator.data is not self.validation:
            return
        if self._num_bytes is None:
            self._num_bytes = int(evaluator.ranks.first_decides(self._count))
        if self._num_bytes:
            figure = bits_per(evaluator.nll, self._num_bytes)
            evaluator.state.metrics["bits_per_byte"] = figure

    def _count(self) -> int:
        """Return the UTF-8 bytes of the text behind the targets; 0: unknown."""
        try:
            return sum(predicted_size(self.tokenizer, one)[1] for one in self.documents)
        except Exception as error:  # the tokenizer may be a plugin's; the loss is measured
            logger.warning("val/bits_per_byte is left out: %s: %s", type(error).__name__, error)
            return 0


def validation_documents(
    source: Source,
    validation: ValidationBatches,
    tokenizer: Tokenizer,
    fractions: Sequence[float],
) -> list[Document]:
    """Return the text behind the targets of a run's validation loader.

    Args:
        source: of the run.
        validation: its validation loader.
        tokenizer: of the run.
        fractions: of train, val and test.
    """
    if isinstance(source, ExampleSource) and isinstance(validation, ExampleValidationLoader):
        examples = [source.examples[number] for number in source.numbers(fractions, "val")]
        return example_documents(validation.examples, examples, tokenizer)
    members: Sequence[ValidationBatches] = [validation]
    if isinstance(validation, MixtureValidationLoader):
        members = validation.members
    rows = (member.tokens for member in members if isinstance(member, ValidationLoader))
    return [Document(source.name, tokens) for tokens in rows]
