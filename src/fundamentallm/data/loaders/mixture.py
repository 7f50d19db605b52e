"""Several sources in one run, each with its share of the sequences.

Shapes: T sequence length, n rows; S sequences of an epoch, n_i sequences of source i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fundamentallm.data.batch import Batch
from fundamentallm.data.loaders.epoch import MIXTURE, Batching, EpochLoader
from fundamentallm.data.loaders.tokens import TokenWindowLoader, ValidationLoader
from fundamentallm.data.permutation import derive_key
from fundamentallm.data.token_file import Tokens
from fundamentallm.errors import DataError


class MixtureLoader(EpochLoader):
    """Windows over several sequences of tokens, in the shares that weights ask for.

    An epoch has as many sequences as all its sources, S = sum n_i. Source i gets its share
    of them, the largest remainders rounded up and at least 1, in an order drawn for that epoch. It
    goes through its own sequences pass by pass, in an order drawn for each pass, so each is seen
    equally often up to one, and an epoch begins where the last one stopped. The sequence at any
    position of any epoch is computed from the seed.

    Args:
        sources: the tokens of each, (N_i,).
        weights: of each, above 0.
        names: of each, for messages.
        batching, end_id: as for `TokenWindowLoader`.

    Attributes:
        shares: sequences of each source in an epoch.

    Raises:
        DataError: a source has fewer than T + 1 tokens.
    """

    def __init__(
        self,
        sources: Sequence[Tokens],
        weights: Sequence[float],
        names: Sequence[str],
        batching: Batching,
        end_id: int | None = None,
    ) -> None:
        self.members = []
        for number, (tokens, name) in enumerate(zip(sources, names, strict=True)):
            own = replace(batching, seed=derive_key(batching.seed, number, MIXTURE))
            try:
                member = TokenWindowLoader(tokens, own, end_id)
            except DataError as error:
                error.where = name
                raise
            self.members.append(member)
        counts = [member.num_sequences for member in self.members]
        self.shares = split_evenly(sum(counts), weights)
        super().__init__(sum(self.shares), batching)

    def rows_at(self, epoch: int, step: int) -> np.ndarray:
        """Return source and first token's index of each sequence of a step, (n, 2), in order.

        Raises:
            ValueError: an epoch has no such step.
        """
        elements = super().rows_at(epoch, step)
        ends = np.cumsum(self.shares)
        sources = np.searchsorted(ends, elements, side="right")
        rows = np.empty((len(elements), 2), dtype=np.int64)
        rows[:, 0] = sources
        for number, member in enumerate(self.members):
            own = sources == number
            share = self.shares[number]
            # Counted over all epochs: the next sequence of a source.
            places = epoch * share + elements[own] - (ends[number] - share)
            starts = np.empty(len(places), dtype=np.int64)
            for lap in np.unique(places // member.num_sequences):
                of_lap = places // member.num_sequences == lap
                positions = places[of_lap] % member.num_sequences
                starts[of_lap] = member.starts_at(int(lap), positions)
            rows[own, 1] = starts
        return rows

    def _gather(self, rows: np.ndarray) -> Batch:
        parts = []
        order = []
        for number, member in enumerate(self.members):
            places = np.flatnonzero(rows[:, 0] == number)
            if len(places):
                parts.append(member.batch_from(rows[places, 1]))
                order.append(places)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        return {key: torch.cat([part[key] for part in parts])[back] for key in parts[0]}


class MixtureValidationLoader:
    """Every target of the validation split of each source once, source by source.

    Args:
        members: one loader for each, all for the same rank.

    Attributes:
        num_tokens: targets over all of them and all ranks.
    """

    def __init__(self, members: Sequence[ValidationLoader]) -> None:
        self.members = list(members)
        self.num_tokens = sum(member.num_tokens for member in self.members)

    def __len__(self) -> int:
        """Return the batches over all ranks."""
        return sum(len(member) for member in self.members)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches."""
        for member in self.members:
            yield from member


def split_evenly(total: int, weights: Sequence[float]) -> list[int]:
    """Split a number by weights: the largest remainders are rounded up; each part is at least 1."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * total
    parts: list[Any] = np.maximum(1, np.floor(exact)).astype(np.int64).tolist()
    by_remainder = np.argsort(-(exact - np.floor(exact)), kind="stable")
    for number in range(max(0, total - sum(parts))):
        parts[by_remainder[number % len(parts)]] += 1
    return parts
