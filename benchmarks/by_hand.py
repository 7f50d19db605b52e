"""A GPT-2-like model and its training step as a script would have them, in eager float32.

Learned positions, LayerNorm before each sub-layer, GELU, a head tied to the embedding (Radford et
al. 2019); AdamW and a clipped gradient. What other loops are measured against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 65


@dataclass(frozen=True)
class Shape:
    """The size of a model and of its batch."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int


class Layer(nn.Module):
    """One block of a GPT."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.before_attention = nn.LayerNorm(width, bias=False)
        self.read = nn.Linear(width, 3 * width, bias=False)
        self.write = nn.Linear(width, width, bias=False)
        self.before_mlp = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        batch, time, width = x.shape
        parts = self.read(self.before_attention(x)).split(width, dim=2)
        query, key, value = (
            part.view(batch, time, self.heads, -1).transpose(1, 2) for part in parts
        )
        heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.write(heads.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x))))


class GPT(nn.Module):
    """Token ids (B, T) to logits (B, T, V)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, shape.width)
        self.places = nn.Embedding(shape.context, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits."""
        places = torch.arange(input_ids.size(1), device=input_ids.device)
        x = self.tokens(input_ids) + self.places(places)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))

    def loss(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Return the mean loss of a batch, (B, T) each."""
        logits = self(input_ids)
        return functional.cross_entropy(logits.flatten(0, 1), target_ids.flatten())


class Batches:
    """Random batches of a shape, the same in every process."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(0)
        size = (64, shape.batch, shape.context + 1)
        self.ids = torch.randint(VOCABULARY, size, generator=generator)

    def __len__(self) -> int:
        return 10**6

    def at(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of one batch, int64 (B, T)."""
        ids = self.ids[number % len(self.ids)]
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(len(self)):
            yield self.at(number)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.at(number)

    def text(self) -> str:
        """Return all tokens as characters."""
        return "".join(chr(48 + token) for token in self.ids.flatten().tolist())


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW as nanoGPT's CPU recipe has it."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)


def step_by_hand(
    model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], clip: float
) -> float:
    """Take one step; return its loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = model.loss(*batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()
