"""`generate --check-copying`: what samples copy from the run's training text."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from fundamentallm.data.copying import WORDS, Copied, TrainingText, passages
from fundamentallm.engine.evaluate import documents_of, run_source
from fundamentallm.inference.load import Trained

logger = logging.getLogger(__name__)

SPAN_SHOWN = 80


class CopyingCheck:
    """The training and the validation text of a model's run.

    Args:
        trained: the model.

    Raises:
        CheckpointError, DataError: the text cannot be read, or is not that of the run any more.
    """

    def __init__(self, trained: Trained) -> None:
        source = run_source(trained)

        def texts(part: str) -> list[tuple[str, str]]:
            documents = documents_of(trained, source, part, True, None)
            return [
                (document.name, trained.tokenizer.decode(np.asarray(document.tokens[:]).tolist()))
                for document in documents
                if len(document.tokens)
            ]

        self.training = TrainingText(texts("train"))
        self.validation = [text for _, text in texts("val")]

    def table(self, samples: Sequence[str]) -> str:
        """Return the figures of samples, and of validation text of the same length, for people."""
        head = (
            f"{'':<16}{'longest shared':>15}{f'distinct {WORDS}-grams':>18}{'repeated':>10}  where"
        )
        lines = [head]
        for number, sample in enumerate(samples, 1):
            lines.append(_row(f"sample {number}", self.training.examine(sample)))
        longest = max(map(len, samples), default=0)
        length = min(longest, max(map(len, self.validation), default=0))
        for number, passage in enumerate(passages(self.validation, length), 1):
            lines.append(_row(f"validation {number}", self.training.examine(passage)))
        lines.append(
            "In characters: the longest span that also stands in the training text, and the longest"
            " that occurs\ntwice in the sample. Validation text of the same length shows what is"
            " usual without copying."
        )
        if length < longest:
            lines.append(f"The validation passages have {length:,} characters: there is no more.")
        return "\n".join(lines)


def _row(label: str, copied: Copied) -> str:
    distinct = "-" if copied.distinct is None else f"{copied.distinct:.3f}"
    span = copied.span if len(copied.span) <= SPAN_SHOWN else f"{copied.span[:SPAN_SHOWN]}..."
    where = f"{copied.place} {span!r}" if copied.place else "-"
    return f"{label:<16}{copied.length:>15,}{distinct:>18}{copied.repeated:>10,}  {where}"
