from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples

from fundamentallm.compute.distributed import Ranks
from fundamentallm.data.loaders import (
    Batching,
    MixtureLoader,
    MixtureValidationLoader,
    TokenWindowLoader,
    ValidationLoader,
    split_evenly,
)
from fundamentallm.data.permutation import derive_key
from fundamentallm.errors import DataError
from fundamentallm.training.epochs import Epochs
from fundamentallm.training.recovery.incident import corpus_place

# Each token says where it is from: source i has the numbers from 1000 i on.
SOURCES = [np.arange(1000 * i, 1000 * i + n) for i, n in enumerate((200, 50, 90))]
WEIGHTS = [1.0, 2.0, 1.0]


def mixture(**options: object) -> MixtureLoader:
    return MixtureLoader(SOURCES, WEIGHTS, ["a", "b", "c"], Batching(8, 4, **options))  # type: ignore[arg-type]


def sequences(loader: MixtureLoader, epochs: int) -> list[list[list[int]]]:
    found = []
    for epoch in range(epochs):
        loader.set_position(epoch, 0)
        found.append(
            [
                row
                for window in loader
                for m in window.micro_batches
                for row in m["input_ids"].tolist()
            ]
        )
    return found


def test_each_source_has_its_share_of_every_epoch() -> None:
    loader = mixture(seed=3)
    num_windows = [(len(tokens) - 1) // 8 for tokens in SOURCES]
    assert loader.num_sequences == sum(num_windows)
    for rows in sequences(loader, 3):
        counts = Counter(row[0] // 1000 for row in rows)
        assert [counts[i] for i in range(3)] == loader.shares
    assert loader.shares[1] == pytest.approx(sum(num_windows) / 2, abs=1)


def test_windows_are_those_of_the_source_and_each_is_seen_equally_often() -> None:
    loader = mixture(seed=5)
    seen: Counter[tuple[int, int, int]] = Counter()
    for epoch in range(6):
        for step in range(len(loader)):
            for source, start in loader.rows_at(epoch, step).tolist():
                assert 0 <= start < len(SOURCES[source]) - 1
                seen[source, start] += 1  # type: ignore[index]
    for rows in sequences(loader, 2):
        for row in rows:
            # A source is a ring: what reaches its end goes on at its beginning.
            num_targets = len(SOURCES[row[0] // 1000]) - 1
            assert set(np.diff(row).tolist()) <= {1, 1 - num_targets}
    for source, member in enumerate(loader.members):
        total = 6 * loader.shares[source]
        laps = total / member.num_sequences
        phases = {}
        for (number, start), count in seen.items():  # type: ignore[misc]
            if number == source:
                phases.setdefault(start % 8, Counter())[start] += count
        assert sum(sum(c.values()) for c in phases.values()) == total
        assert len(phases) <= -(-total // member.num_sequences)
        assert laps > 1 or source == 0


def test_a_pass_visits_each_window_once() -> None:
    """Over all epochs, source i's windows number c n to (c + 1) n - 1 are those of one lap."""
    loader = mixture(seed=1)
    member, share = loader.members[1], loader.shares[1]
    drawn = []
    for epoch in range(8):
        order = {}
        for step in range(len(loader)):
            elements = super(MixtureLoader, loader).rows_at(epoch, step)
            for element, (source, start) in zip(elements, loader.rows_at(epoch, step), strict=True):
                if source == 1:
                    order[int(element)] = int(start)
        drawn += [order[element] for element in sorted(order)]
    assert len(drawn) == 8 * share
    n = member.num_sequences
    for lap in range(len(drawn) // n):
        starts = drawn[lap * n : (lap + 1) * n]
        assert sorted(starts) == list(range(min(starts), min(starts) + 8 * n, 8))


@settings(max_examples=examples(30))
@given(seed=st.integers(0, 99), epoch=st.integers(0, 5), data=st.data())
def test_any_point_is_reached_at_once(seed: int, epoch: int, data: st.DataObject) -> None:
    loader = mixture(seed=seed)
    step = data.draw(st.integers(0, len(loader) - 1))
    loader.set_position(epoch, step)
    resumed = [m["input_ids"].tolist() for window in loader for m in window.micro_batches]
    whole = sequences(mixture(seed=seed), epoch + 1)[epoch]
    assert [row for batch in resumed for row in batch] == whole[step * 4 :]


def test_ranks_and_accumulation_share_the_same_order() -> None:
    alone = mixture(seed=2, accumulation_steps=2)
    ranks = [mixture(seed=2, rank=rank, world_size=2) for rank in range(2)]
    for step in range(len(alone)):
        whole = [m["input_ids"].tolist() for m in alone.window_at(1, step).micro_batches]
        parts = [loader.window_at(1, step).micro_batches[0] for loader in ranks]
        rows = [m["input_ids"].tolist() for m in parts if (m["target_ids"] >= 0).any()]
        assert [row for batch in whole for row in batch] == [row for batch in rows for row in batch]


def test_seeds_give_other_orders() -> None:
    assert sequences(mixture(seed=1), 1) != sequences(mixture(seed=2), 1)


def test_a_short_source_is_named() -> None:
    with pytest.raises(DataError, match="tiny"):
        MixtureLoader([SOURCES[0], np.arange(5)], [1, 1], ["big", "tiny"], Batching(8, 4))


def test_one_source_has_the_windows_of_its_own_loader() -> None:
    loader = MixtureLoader([SOURCES[0]], [1.0], ["a"], Batching(8, 4, seed=7))
    plain = TokenWindowLoader(SOURCES[0], Batching(8, 4, seed=7))
    assert len(loader) == len(plain)
    assert loader.tokens_per_step == plain.tokens_per_step


def test_a_source_goes_by_a_key_of_the_seed_and_its_number() -> None:
    """The formula written out: a resumed run relies on it."""
    loader = mixture(seed=7)
    for number, tokens in enumerate(SOURCES):
        own = TokenWindowLoader(tokens, Batching(8, 4, seed=derive_key(7, number, 4)))
        places = np.arange(own.num_sequences)
        assert np.array_equal(loader.members[number].starts_at(2, places), own.starts_at(2, places))


def test_the_first_epoch_begins_with_the_first_pass_through_each_source() -> None:
    loader = mixture(seed=7)
    rows = np.concatenate([loader.rows_at(0, step) for step in range(len(loader))])
    for number, (member, share) in enumerate(zip(loader.members, loader.shares, strict=True)):
        places = [divmod(place, member.num_sequences) for place in range(share)]
        expected = [int(member.starts_at(lap, np.array([at]))[0]) for lap, at in places]
        assert sorted(rows[rows[:, 0] == number, 1].tolist()) == sorted(expected)


def test_each_source_has_a_name() -> None:
    with pytest.raises(ValueError, match="shorter"):
        MixtureLoader(SOURCES, WEIGHTS, ["a", "b"], Batching(8, 4))


def test_validation_reads_every_target_of_every_source() -> None:
    members = [ValidationLoader(tokens, Batching(8, 3)) for tokens in SOURCES]
    loader = MixtureValidationLoader(members)
    targets = [int(i) for batch in loader for i in batch["target_ids"].flatten() if i >= 0]
    assert targets == [int(i) for tokens in SOURCES for i in tokens[1:]]
    assert loader.num_tokens == len(targets)
    assert len(loader) == len(list(loader))


@given(
    total=st.integers(1, 10_000),
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8),
)
def test_shares_are_as_near_to_the_weights_as_whole_numbers_can_be(
    total: int, weights: list[float]
) -> None:
    parts = split_evenly(total, weights)
    assert min(parts) >= 1
    assert sum(parts) >= total
    if total >= 100 * sum(weights) / min(weights):
        assert sum(parts) == total
        for part, weight in zip(parts, weights, strict=True):
            assert abs(part - total * weight / sum(weights)) < 1


def test_an_incident_names_source_and_place() -> None:
    loader = mixture(seed=3, accumulation_steps=2)
    place = SimpleNamespace(
        train_loader=loader,
        ranks=Ranks(),
        epochs=Epochs(len(loader)),
        state=SimpleNamespace(iteration=len(loader) + 2),
    )
    micro_batches = loader.window_at(1, 1).micro_batches
    for number, batch in enumerate(micro_batches):
        for row, ids in enumerate(batch["input_ids"].tolist()):
            found = corpus_place(place, number, row)  # type: ignore[arg-type]
            assert found == {"source": ids[0] // 1000, "corpus_offset": ids[0] % 1000}
    assert corpus_place(place, 99, 0) == {"corpus_offset": None}  # type: ignore[arg-type]


def test_the_remainder_counts_and_not_the_share() -> None:
    assert split_evenly(7, [5.2, 1.8]) == [5, 2]
    assert split_evenly(10, [6.3, 2.3, 1.4]) == [6, 2, 2]
