"""Text written by the model as it learns."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fundamentallm.config.base import Count, NonNegative
from fundamentallm.data.copying import SEARCHED, CopyingFigures
from fundamentallm.data.permutation import derive_key
from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.errors import DataError, FundamentaLLMError
from fundamentallm.events import TrainingEvents
from fundamentallm.files.json_lines import JsonLines
from fundamentallm.files.run_layout import SAMPLES
from fundamentallm.models.generation.batch import generate_tokens
from fundamentallm.models.generation.sampling import SamplingRules
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.saved import saved_count
from fundamentallm.training.state import Sample
from fundamentallm.training.step import undisturbed

logger = logging.getLogger(__name__)

_MEASURED = 10  # tokens from which the time of a sample is estimated


@HANDLERS.register("samples")
class Samples:
    """Observes: writes a sample of generated text to `samples.jsonl` after an evaluation.

    The random numbers of a sample depend only on the seed and the step, so that
    sampling never changes the training.

    Args:
        tokenizer: turns token ids into text.
        run_dir: the run's directory.
        seed: the run's seed.
        prompt: the text to continue.
        num_tokens: length of a sample in tokens; it ends earlier with the document.
        temperature: 1 samples from the model's distribution, 0 takes the likeliest token.
        every: evaluations between two samples.
        check_copying: whether each sample is searched for spans that also stand in the training
            text, of which the first two million characters are searched (a fifth of a second).
        split_texts: returns name and text of the documents of a part ("train", "val"), up to so
            many characters of them; None: nothing is searched.
    """

    role = "sampling"

    def __init__(
        self,
        tokenizer: Tokenizer,
        run_dir: Path,
        seed: int = 0,
        prompt: str = "\n",
        num_tokens: Count = 100,
        temperature: NonNegative = 0.8,
        every: Count = 1,
        check_copying: bool = True,
        split_texts: Callable[[str, int], Iterable[tuple[str, str]]] | None = None,
    ) -> None:
        for name, number in (("num_tokens", num_tokens), ("every", every)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.tokenizer = tokenizer
        self.file = JsonLines(run_dir / SAMPLES, lambda record: True)
        self.seed = seed
        self.prompt = prompt
        self.num_tokens = num_tokens
        self.rules = SamplingRules(temperature=temperature)
        self.every = every
        self.split_texts = split_texts if check_copying else None
        self._figures: CopyingFigures | None = None
        self.owed: int | None = None

    def attach(self, trainer: TrainingLoop) -> None:
        """Sample at FLLM_EVALUATION_COMPLETED; only the rank that writes does any work."""
        trainer.budget.estimate_end(partial(self.seconds, trainer))
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_STARTED, self.begin)
        trainer.add_event_handler(TrainingEvents.FLLM_ROLLED_BACK, self.begin)
        trainer.add_event_handler(
            TrainingEvents.FLLM_EVALUATION_COMPLETED(every=self.every), self.sample
        )

    def begin(self, trainer: TrainingLoop) -> None:
        """Remove later samples, and write the sample that a stop skipped before this state."""
        self.cut_back(trainer)
        if self.owed == trainer.state.iteration:
            self.sample(trainer)

    def cut_back(self, trainer: TrainingLoop) -> None:
        """Drop samples of steps that the restored state has not taken."""
        if trainer.ranks.is_writer:
            step = trainer.state.iteration
            # A process killed after writing a pending sample has left it in the file.
            owed = self.owed == step
            self.file.cut_back(step, trainer.evaluation_pending() or owed)

    def sample(self, trainer: TrainingLoop) -> None:
        """Generate with the evaluation weights; write the text and fire FLLM_TEXT_SAMPLED."""
        if not trainer.ranks.is_writer:
            return
        step = trainer.state.iteration
        ids = []
        with trainer.evaluation_weights(), undisturbed(trainer.model):
            for token in self._tokens(trainer, self.num_tokens):
                if trainer.interrupted_by is not None:
                    self.owed = step
                    return
                if int(token) == self.tokenizer.end_id:
                    break
                ids.append(int(token))
        self.owed = None
        text = self.tokenizer.decode(ids)
        sample = trainer.state.sample = Sample(step, self.prompt, text)
        self.file.append({**sample._asdict(), **self._copying(text)})
        logger.debug("sample at step %d:\n%s", step, text)
        trainer.notify(TrainingEvents.FLLM_TEXT_SAMPLED)

    def seconds(self, trainer: TrainingLoop) -> float:
        """Estimate the seconds of a sample from its first tokens."""
        if not trainer.ranks.is_writer:
            return 0.0
        number = min(self.num_tokens, _MEASURED)
        started = time.perf_counter()
        with trainer.evaluation_weights(), undisturbed(trainer.model):
            for _ in self._tokens(trainer, number):
                pass
        return (time.perf_counter() - started) * self.num_tokens / number

    def _tokens(self, trainer: TrainingLoop, number: int) -> Iterator[Tensor]:
        return generate_tokens(
            trainer.model,
            [self._prompt_ids()],
            number,
            self.rules,
            [derive_key(self.seed, trainer.state.iteration) % 2**63],
            vocab_size=self.tokenizer.vocab_size,  # a model's may be padded
        )

    def _copying(self, text: str) -> dict[str, Any]:
        """Return what a text copies under the key of a record, nothing where it is not searched."""
        if self.split_texts is None:
            return {}
        try:
            if self._figures is None:
                validation = [one for _, one in self.split_texts("val", SEARCHED)]
                self._figures = CopyingFigures(self.split_texts("train", SEARCHED), validation)
            return {"copying": self._figures.of(text)}
        except FundamentaLLMError as error:
            logger.warning("samples are not searched for copies: %s", error)
            self.split_texts = None
            return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the step whose sample is pending; None without one."""
        return {"owed": self.owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the pending sample."""
        pending = state_dict["owed"] is not None
        self.owed = saved_count(state_dict, "owed") if pending else None

    def _prompt_ids(self) -> list[int]:
        try:
            return self.tokenizer.prompt_ids(self.prompt)
        except DataError:  # a vocabulary without the prompt's characters
            return self.tokenizer.prompt_ids("")
