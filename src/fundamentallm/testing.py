"""Fakes for tests of your own parts: a uniform model, a tiny text, a recording handler."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from fundamentallm.config import TransformerConfig
from fundamentallm.data.loaders import Batching, TokenWindowLoader, ValidationLoader
from fundamentallm.events import TrainingEvents
from fundamentallm.models.transformer import Transformer

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

TINY_TEXT = (
    "a quick event fires and a handler hears it; the handler writes what it heard, and the next"
    " event fires. so a loop of small steps becomes a run, and a run becomes a model.\n"
)


class UniformModel(nn.Module):
    """Predicts every token with the same probability: its loss is log(vocabulary) exactly.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits (B, T, V) that do not depend on `input_ids` (B, T)."""
        return self.bias.expand(*input_ids.shape, -1)


class RecordingHandler:
    """Writes down every event in the order in which it fires.

    Attributes:
        events: pairs of an event's name and the step at which it fired.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def attach(self, trainer: Trainer) -> None:
        """Listen to all events of the loop."""
        for event in (*Events, *TrainingEvents):
            # EXCEPTION_RAISED passes the error as well.
            if event not in (Events.EXCEPTION_RAISED, Events.TERMINATE_SINGLE_EPOCH):
                trainer.add_event_handler(event, self._record, event.name)

    def names(self) -> list[str]:
        """Return the events' names in order."""
        return [name for name, _ in self.events]

    def _record(self, engine: Engine, name: str) -> None:
        self.events.append((name, engine.state.iteration))


class SpoiltGradient:
    """Writes NaN into the gradient of chosen steps, each time the step runs.

    A replay of such a step is finite, so the run rolls back. Use it to test what your handler
    does after a rollback.

    Args:
        steps: the steps.
    """

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def attach(self, trainer: Trainer) -> None:
        """Listen after each micro-batch, before the guard checks the gradients."""
        trainer.add_event_handler(TrainingEvents.FLLM_MICRO_BATCH_COMPLETED, self.spoil)

    def spoil(self, trainer: Trainer) -> None:
        """Set one number of the gradient to NaN."""
        if trainer.state.iteration in self.steps:
            gradient = next(p.grad for p in trainer.model.parameters() if p.grad is not None)
            gradient.view(-1)[0] = math.nan


def tiny_model(vocab_size: int = 11, sequence_length: int = 8, **options: Any) -> Transformer:
    """Return a Transformer of two layers and width 16 that trains in milliseconds a step.

    Args:
        vocab_size: V.
        sequence_length: the context length in tokens.
        options: further fields of `TransformerConfig`.
    """
    fields: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 2, **options}
    return Transformer(
        TransformerConfig(vocab_size=vocab_size, sequence_length=sequence_length, **fields)
    )


def tiny_tokens(num_tokens: int = 400, vocab_size: int = 11, seed: int = 0) -> np.ndarray:
    """Return token ids with structure to learn: each is the last plus a small random step."""
    steps = np.random.default_rng(seed).integers(1, 3, size=num_tokens)
    return (np.cumsum(steps) % vocab_size).astype(np.uint8)


def tiny_loaders(
    sequence_length: int = 8, batch_size: int = 4, accumulation_steps: int = 1, seed: int = 0
) -> tuple[TokenWindowLoader, ValidationLoader]:
    """Return a training and a validation loader over `tiny_tokens`."""
    tokens = tiny_tokens()
    return (
        TokenWindowLoader(
            tokens[:320], Batching(sequence_length, batch_size, accumulation_steps, seed=seed)
        ),
        ValidationLoader(tokens[320:], Batching(sequence_length, batch_size)),
    )
