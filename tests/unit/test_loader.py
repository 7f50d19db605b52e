from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fundamentallm.data.batch import Window, as_batch, as_window, count_valid
from fundamentallm.data.dataset import LanguageModelDataset
from fundamentallm.data.loaders import (
    Batching,
    TokenWindowLoader,
    ValidationLoader,
    WindowLoader,
    as_window_loader,
    batch_shape_of,
)
from fundamentallm.data.permutation import Permutation, derive_key
from fundamentallm.data.token_file import FileTokens
from fundamentallm.errors import DataError
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.trainer import Trainer

SMALL = st.integers(min_value=1, max_value=4)


def rows_of(window: Window) -> list[list[int]]:
    """The inputs and last target of every unmasked row of a window."""
    rows = []
    for micro in window.micro_batches:
        for inputs, targets in zip(micro["input_ids"], micro["target_ids"], strict=True):
            if int(targets[0]) >= 0:
                rows.append([*inputs.tolist(), int(targets[-1])])
    return rows


def global_rows(
    tokens: np.ndarray, length: int, sizes: tuple[int, int, int], seed: int, epoch: int, step: int
) -> list[list[int]]:
    """The rows of a step over all ranks, put together from micro-batch m of each rank in turn."""
    batch, accumulation, ranks = sizes
    windows = [
        TokenWindowLoader(
            tokens, Batching(length, batch, accumulation, seed, rank, ranks)
        ).window_at(epoch, step)
        for rank in range(ranks)
    ]
    rows = []
    for number in range(len(windows[0].micro_batches)):
        for window in windows:
            rows += rows_of(Window([window.micro_batches[number]], 0))
    return rows


# TokenWindowLoader


@settings(max_examples=examples(40))
@given(
    num_tokens=st.integers(min_value=2, max_value=400),
    length=st.integers(min_value=1, max_value=12),
    batch=SMALL,
    accumulation=SMALL,
    seed=st.integers(min_value=0, max_value=2**32),
    epoch=st.integers(min_value=0, max_value=100),
)
def test_an_epoch_visits_sequences_that_do_not_overlap_each_once(
    num_tokens: int, length: int, batch: int, accumulation: int, seed: int, epoch: int
) -> None:
    if num_tokens <= length:
        return
    loader = TokenWindowLoader(np.arange(num_tokens), Batching(length, batch, accumulation, seed))
    num_sequences = (num_tokens - 1) // length
    assert len(loader) == -(-num_sequences // (batch * accumulation))
    loader.set_position(epoch, 0)
    windows = list(loader)
    assert len(windows) == len(loader)
    rows = [row for window in windows for row in rows_of(window)]
    assert len(rows) == num_sequences
    starts = sorted(row[0] for row in rows)
    # The text is a ring of targets; token i stands before target i + 1.
    for row in rows:
        targets = [(row[0] + place) % (num_tokens - 1) + 1 for place in range(length)]
        assert row[-1] == targets[-1]
        assert row[:-1] == [target - 1 for target in targets]
    assert set(np.diff(starts).tolist()) <= {length}
    assert 0 <= starts[0] < length
    assert starts[-1] < num_tokens - 1
    if num_sequences == 1:
        assert starts[0] + length < num_tokens
    for window in windows[:-1]:
        assert [tuple(m["input_ids"].shape) for m in window.micro_batches] == [
            (batch, length)
        ] * accumulation
    for window in windows:
        assert window.num_tokens == len(rows_of(window)) * length
        assert all(t.dtype == torch.int64 for m in window.micro_batches for t in m.values())


@settings(max_examples=examples(40))
@given(
    num_sequences=st.integers(min_value=1, max_value=40),
    epoch=st.integers(min_value=0, max_value=5),
    data=st.data(),
)
def test_the_rows_of_a_step_are_the_same_however_they_are_split(
    num_sequences: int, epoch: int, data: st.DataObject
) -> None:
    tokens = np.arange(num_sequences * 3 + 4)
    step = data.draw(st.integers(min_value=0, max_value=-(-num_sequences // 12) - 1))
    expected = global_rows(tokens, 3, (12, 1, 1), 7, epoch, step)
    assert expected
    for sizes in ((1, 12, 1), (2, 6, 1), (2, 3, 2), (1, 4, 3), (3, 1, 4), (6, 1, 2)):
        assert global_rows(tokens, 3, sizes, 7, epoch, step) == expected


@settings(max_examples=examples(40))
@given(
    num_tokens=st.integers(min_value=5, max_value=150),
    sizes=st.tuples(SMALL, SMALL, SMALL),
    seed=st.integers(min_value=0, max_value=100),
)
def test_the_rows_of_an_epoch_are_the_same_for_any_sizes(
    num_tokens: int, sizes: tuple[int, int, int], seed: int
) -> None:
    tokens = np.arange(num_tokens)
    batch, accumulation, ranks = sizes
    steps = len(TokenWindowLoader(tokens, Batching(4, batch, accumulation, seed, 0, ranks)))
    rows = [row for step in range(steps) for row in global_rows(tokens, 4, sizes, seed, 2, step)]
    alone = TokenWindowLoader(tokens, Batching(4, 1, seed=seed))
    # In order, which is stronger than as a multiset: sizes only say where a step ends.
    assert rows == [rows_of(alone.window_at(2, step))[0] for step in range(len(alone))]


@pytest.mark.parametrize(("num_tokens", "epoch"), [(103, 0), (103, 7), (21, 3), (6, 1), (1403, 4)])
def test_the_starts_are_phase_and_permutation_of_seed_and_epoch(
    num_tokens: int, epoch: int
) -> None:
    """The formula written out, number by number: a resumed run relies on it."""
    length, seed = 5, 11
    num_sequences = (num_tokens - 1) // length
    phase = derive_key(seed, epoch, 2) % (length if num_sequences > 1 else num_tokens % length)
    order = Permutation(num_sequences, derive_key(seed, epoch, 1))
    loader = TokenWindowLoader(np.arange(num_tokens), Batching(length, 2, 2, seed=seed))
    found = [int(row) for step in range(len(loader)) for row in loader.rows_at(epoch, step)]
    expected = [int(order(np.array([place]))[0]) for place in range(num_sequences)]
    assert found == [phase + place * length for place in expected]


@settings(max_examples=examples(40))
@given(num_sequences=st.integers(min_value=1, max_value=30), batch=SMALL, accumulation=SMALL)
def test_in_a_short_last_step_every_rank_joins_every_micro_batch(
    num_sequences: int, batch: int, accumulation: int
) -> None:
    ranks = 3
    tokens = np.arange((num_sequences + 1) * 2)
    loaders = [
        TokenWindowLoader(tokens, Batching(2, batch, accumulation, 0, rank, ranks))
        for rank in range(ranks)
    ]
    step = len(loaders[0]) - 1
    left = loaders[0].num_sequences - step * batch * accumulation * ranks
    windows = [loader.window_at(0, step) for loader in loaders]
    assert {len(window.micro_batches) for window in windows} == {-(-left // (batch * ranks))}
    assert sum(window.num_tokens for window in windows) == left * 2
    for window in windows:
        assert window.num_tokens == sum(count_valid(m["target_ids"]) for m in window.micro_batches)
        for micro in window.micro_batches:
            assert 1 <= len(micro["input_ids"]) <= batch
            if count_valid(micro["target_ids"]) == 0:
                assert micro["input_ids"].tolist() == [[0, 0]]
                assert micro["target_ids"].tolist() == [[-100, -100]]


@settings(max_examples=examples(40))
@given(seed=st.integers(min_value=0, max_value=1000), data=st.data())
def test_any_position_is_reached_at_once(seed: int, data: st.DataObject) -> None:
    def stream(loader: TokenWindowLoader, windows: int) -> list[list[list[int]]]:
        found: list[list[list[int]]] = []
        while len(found) < windows:
            found += [rows_of(window) for window in loader]
        return found[:windows]

    tokens = np.arange(101)
    whole = stream(TokenWindowLoader(tokens, Batching(5, 2, 2, seed)), 15)
    per_epoch = len(TokenWindowLoader(tokens, Batching(5, 2, 2, seed)))
    place = data.draw(st.integers(min_value=0, max_value=14))
    loader = TokenWindowLoader(tokens, Batching(5, 2, 2, seed))
    loader.set_position(*divmod(place, per_epoch))
    assert stream(loader, 15 - place) == whole[place:]


def test_reaching_far_into_an_epoch_draws_nothing_before_it() -> None:
    tokens = np.broadcast_to(np.uint8(1), (10**12,))  # no memory behind it
    loader = TokenWindowLoader(tokens, Batching(1000, 4, 2))
    loader.set_position(3, len(loader) - 2)
    assert [window.num_tokens for window in loader] == [
        8000,
        loader.window_at(3, len(loader) - 1).num_tokens,
    ]


def test_leaving_an_epoch_early_goes_on_after_the_last_window() -> None:
    loader = TokenWindowLoader(np.arange(61), Batching(5, 2))
    iterator = iter(loader)
    seen = [rows_of(next(iterator)) for _ in range(2)]
    seen += [rows_of(window) for window in loader]
    assert seen == [rows_of(loader.window_at(0, step)) for step in range(len(loader))]


def test_epochs_and_seeds_have_their_own_order_and_phase() -> None:
    tokens = np.arange(5003)
    orders = set()
    phases = set()
    for seed in range(4):
        for epoch in range(10):
            loader = TokenWindowLoader(tokens, Batching(10, 16, seed=seed))
            starts = np.concatenate([loader.rows_at(epoch, step) for step in range(len(loader))])
            orders.add(tuple((starts // 10).tolist()))
            phases.add(int(starts.min()))
    assert len(orders) == 40
    assert phases == set(range(10))  # 40 draws miss one of ten about once in seven


def test_the_starts_of_a_step_are_those_of_its_rows() -> None:
    tokens = np.arange(203)
    loader = TokenWindowLoader(tokens, Batching(4, 3, 2, seed=5))
    for step in range(len(loader)):
        rows = rows_of(loader.window_at(2, step))
        assert loader.rows_at(2, step).tolist() == [row[0] for row in rows]


def test_asking_for_a_window_moves_nothing() -> None:
    loader = TokenWindowLoader(np.arange(101), Batching(5, 2))
    first = rows_of(loader.window_at(0, 0))
    loader.window_at(4, 1)
    assert rows_of(next(iter(loader))) == first


def test_no_random_state_is_used() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(TokenWindowLoader(np.arange(101), Batching(5, 2)))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_batches_come_straight_from_a_memory_map(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100, dtype=np.uint16))
    tokens = np.load(tmp_path / "ids.npy", mmap_mode="r")
    mapped = TokenWindowLoader(tokens, Batching(7, 3, seed=1))
    assert np.shares_memory(mapped._windows, tokens)
    in_memory = TokenWindowLoader(np.arange(100), Batching(7, 3, seed=1))
    assert [rows_of(w) for w in mapped] == [rows_of(w) for w in in_memory]


@pytest.mark.parametrize(("num_tokens", "length"), [(0, 1), (8, 8)])
def test_too_short_a_text_says_how_much_is_needed(num_tokens: int, length: int) -> None:
    with pytest.raises(DataError) as caught:
        TokenWindowLoader(np.zeros(num_tokens, dtype=np.uint8), Batching(length, 1))
    assert f"{num_tokens} tokens" in caught.value.got
    assert str(length + 1) in caught.value.expected


@settings(max_examples=examples(60))
@given(num_tokens=st.integers(2, 200), length=st.integers(1, 40), seed=st.integers(0, 50))
def test_every_target_is_reached_and_an_epoch_leaves_out_less_than_a_sequence(
    num_tokens: int, length: int, seed: int
) -> None:
    if num_tokens <= length:
        return
    loader = TokenWindowLoader(np.arange(num_tokens), Batching(length, 3, seed=seed))
    reached: set[int] = set()
    for epoch in range(12 * length + 20):
        loader.set_position(epoch, 0)
        targets = torch.cat([m["target_ids"].flatten() for w in loader for m in w.micro_batches])
        own = targets[targets >= 0].tolist()
        assert len(own) == len(set(own)) > num_tokens - 1 - length
        reached.update(own)
        if len(reached) == num_tokens - 1:
            return
    raise AssertionError(f"never: {sorted(set(range(1, num_tokens)) - reached)}")


def test_one_sequence_is_enough() -> None:
    loader = TokenWindowLoader(np.arange(9), Batching(8, 4, 4))
    (window,) = loader
    assert rows_of(window) == [list(range(9))]


# ValidationLoader


@settings(max_examples=examples(40))
@given(
    num_tokens=st.integers(min_value=0, max_value=200),
    length=st.integers(min_value=1, max_value=9),
    batch=SMALL,
    ranks=st.integers(min_value=1, max_value=3),
)
def test_validation_sees_every_target_once_over_the_ranks(
    num_tokens: int, length: int, batch: int, ranks: int
) -> None:
    tokens = np.arange(1, num_tokens + 1)
    pairs = []
    for rank in range(ranks):
        loader = ValidationLoader(tokens, Batching(length, batch, rank=rank, world_size=ranks))
        assert loader.num_tokens == max(0, num_tokens - 1)
        for micro in loader:
            inputs, targets = micro["input_ids"], micro["target_ids"]
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.shape == targets.shape
            assert 1 <= len(inputs) <= batch
            assert inputs.shape[1] == length
            valid = targets >= 0
            assert set(targets[~valid].tolist()) <= {-100}
            assert valid.flatten().any()
            pairs += list(zip(inputs[valid].tolist(), targets[valid].tolist(), strict=True))
    assert sorted(pairs) == [(token, token + 1) for token in range(1, num_tokens)]


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_an_empty_split_is_an_empty_loader(num_tokens: int) -> None:
    loader = ValidationLoader(np.zeros(num_tokens, dtype=np.uint8), Batching(8, 2))
    assert len(loader) == 0
    assert list(loader) == []


def test_validation_repeats_itself() -> None:
    loader = ValidationLoader(np.arange(50), Batching(8, 2))
    first = [micro["input_ids"].tolist() for micro in loader]
    assert len(first) == len(loader) == 4
    assert [micro["input_ids"].tolist() for micro in loader] == first


# WindowLoader


def plain_loader(size: int = 10, **options: Any) -> DataLoader[Any]:
    return DataLoader(LanguageModelDataset(np.arange(size * 3 + 1), 3), **options)


def epochs_of(loader: WindowLoader, number: int) -> list[list[list[list[int]]]]:
    return [[rows_of(window) for window in loader] for _ in range(number)]


def test_an_epoch_that_was_left_is_gone_on_with() -> None:
    loader = WindowLoader(plain_loader(10, batch_size=2))
    whole = [rows_of(window) for window in loader]
    loader.set_position(0, 0)
    left = [rows_of(window) for window in islice(loader, 2)]
    assert left + [rows_of(window) for window in islice(loader, 3)] == whole


def test_a_plain_loader_becomes_windows() -> None:
    loader = WindowLoader(plain_loader(10, batch_size=2), accumulation_steps=2)
    windows = list(loader)
    assert len(loader) == len(windows) == 3  # the short last window is kept
    assert [len(window.micro_batches) for window in windows] == [2, 2, 1]
    assert [window.num_tokens for window in windows] == [12, 12, 6]
    assert [row[0] for window in windows for row in rows_of(window)] == list(range(0, 30, 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_order_of_a_shuffling_loader_follows_from_seed_and_epoch(workers: int) -> None:
    def shuffled(seed: int) -> WindowLoader:
        return WindowLoader(
            plain_loader(30, batch_size=4, shuffle=True, num_workers=workers), 2, seed=seed
        )

    torch.manual_seed(1)
    first = epochs_of(shuffled(seed=5), 2)
    torch.manual_seed(2)
    torch.rand(7)
    assert epochs_of(shuffled(seed=5), 2) == first
    assert first[0] != first[1]
    assert epochs_of(shuffled(seed=6), 1)[0] != first[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffling_loader_leaves_the_training_s_random_numbers_alone(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    loader = WindowLoader(plain_loader(30, batch_size=4, shuffle=True, num_workers=workers), 2)
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    seeded.clear()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    loader.set_position(0, 2)
    for _ in range(2):
        for _ in loader:
            assert torch.equal(torch.get_rng_state(), states[0])
            assert np.random.get_state()[1].tolist() == states[1]
            assert random.getstate() == states[2]
    assert seeded == []  # torch.manual_seed would reseed the dropout of every GPU


def test_the_order_of_a_shuffling_loader_is_that_of_torch_for_a_key_of_seed_and_epoch() -> None:
    """The formula written out: a resumed run relies on it."""
    keys = [derive_key(5, epoch, 3) for epoch in range(4)]
    assert max(keys) >= 2**63 > min(keys)  # torch takes a key modulo 2^63
    loader = WindowLoader(plain_loader(30, batch_size=1, shuffle=True), seed=5)
    for key, epoch in zip(keys, epochs_of(loader, 4), strict=True):
        torch.manual_seed(key % 2**63)
        expected = [rows_of(as_window(b)) for b in plain_loader(30, batch_size=1, shuffle=True)]
        assert epoch == expected


DATA = LanguageModelDataset(np.arange(91), 3)
ORDERS = {
    "generator": lambda: {"shuffle": True, "batch_size": 4, "generator": torch.Generator()},
    "subset": lambda: {"sampler": SubsetRandomSampler(range(30)), "batch_size": 4},
    "weights": lambda: {
        "sampler": WeightedRandomSampler([1.0] * 30, 30, generator=torch.Generator()),
        "batch_size": 4,
    },
    "batches": lambda: {
        "batch_sampler": BatchSampler(
            RandomSampler(range(30), generator=torch.Generator()), 4, drop_last=False
        )
    },
    "distributed": lambda: {"sampler": DistributedSampler(DATA, 1, 0), "batch_size": 4},
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_every_sampler_follows_from_seed_and_epoch(name: str) -> None:
    def made() -> WindowLoader:
        return WindowLoader(DataLoader(DATA, **ORDERS[name]()), 2, seed=5)

    torch.manual_seed(1)
    whole = epochs_of(made(), 3)
    assert whole[0] != whole[1] != whole[2]
    torch.manual_seed(2)
    resumed = made()
    resumed.set_position(1, 2)
    assert epochs_of(resumed, 2) == [whole[1][2:], whole[2]]


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_wrapped_loader_goes_to_a_position(step: int) -> None:
    def shuffled() -> WindowLoader:
        return WindowLoader(plain_loader(30, batch_size=4, shuffle=True), 2, seed=5)

    whole = epochs_of(shuffled(), 3)
    loader = shuffled()
    loader.set_position(1, step)
    assert epochs_of(loader, 2) == [whole[1][step:], whole[2]]


def test_pairs_are_batches_too() -> None:
    inputs = torch.arange(12).view(4, 3)
    loader = WindowLoader(DataLoader(TensorDataset(inputs, inputs + 1), batch_size=2))
    assert [rows_of(window) for window in loader] == [
        [[0, 1, 2, 3], [3, 4, 5, 6]],
        [[6, 7, 8, 9], [9, 10, 11, 12]],
    ]


def test_mappings_of_other_kinds_and_more_keys_are_batches_too() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    batch = as_batch(UserDict(input_ids=ids, target_ids=ids + 1, length=ids))
    assert list(batch) == ["input_ids", "target_ids"]
    assert batch["target_ids"] is not batch["input_ids"]


def test_labels_are_shifted_once_and_masked_ones_stay_masked() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 0]])
    labels = torch.tensor([[5, 6, 7, 8], [1, -100, 3, -100]])
    batch = as_batch({"input_ids": ids, "labels": labels, "attention_mask": ids.clamp(max=1)})
    assert batch["input_ids"] is ids
    assert batch["target_ids"].tolist() == [[6, 7, 8, -100], [-100, 3, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert "labels" not in batch
    assert as_window(UserDict(input_ids=ids, labels=labels)).num_tokens == 4


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.zeros(2, dtype=torch.int64), r"labels \(2,\)"),
        ([torch.zeros(2)] * 3, "a list.*collate_fn"),
    ],
    ids=["a class for each row", "not collated"],
)
def test_labels_that_are_not_one_for_each_token_are_refused(labels: Any, told: str) -> None:
    with pytest.raises(DataError, match=f"(?s){told}"):
        as_batch({"input_ids": torch.zeros(2, 3, dtype=torch.int64), "labels": labels})


def test_a_loader_without_a_length_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([])

    with pytest.raises(DataError, match="no length"):
        WindowLoader(DataLoader(Stream()))


def test_a_loader_without_a_batch_is_refused_and_the_trainer_keeps_its_own() -> None:
    trainer = Trainer(tiny_model(), *tiny_loaders(), device="cpu")
    own = trainer.train_loader
    with pytest.raises(DataError, match="have no batch"):
        trainer.run([])
    assert trainer.train_loader is own
    assert trainer.steps_per_epoch == len(own)


def test_a_batch_is_a_window_of_one() -> None:
    ids = torch.tensor([[1, -100, 2]])
    window = as_window((ids, ids))
    assert len(window.micro_batches) == 1
    assert window.num_tokens == 2
    assert as_window(window) is window


@pytest.mark.parametrize(
    ("batch", "told"),
    [(torch.zeros(2, 3), "Tensor"), ({"x": 1, "y": 2}, "keys x, y"), ((1, 2, 3), "tuple of 3")],
)
def test_a_batch_of_another_shape_is_refused(batch: Any, told: str) -> None:
    with pytest.raises(ValueError, match=f"input_ids.*{told}"):
        next(iter(WindowLoader([batch])))


def test_masked_targets_do_not_count() -> None:
    targets = torch.tensor([[1, -100, 0], [-1, 5, -100]])
    assert count_valid(targets) == 3
    (window,) = WindowLoader([(torch.zeros(2, 3, dtype=torch.int64), targets)])
    assert window.num_tokens == 3


def test_an_empty_loader_has_no_windows() -> None:
    loader = WindowLoader([])
    assert len(loader) == 0
    assert list(loader) == []
    assert (loader.accumulation_steps, loader.seed) == (1, 0)


def test_no_micro_batch_is_misuse() -> None:
    with pytest.raises(ValueError, match="accumulation_steps"):
        WindowLoader([], accumulation_steps=0)


class OwnLoader:
    """A loader of windows that somebody else wrote."""

    def __len__(self) -> int:
        return 1

    def set_position(self, epoch: int, step: int) -> None:
        pass

    def __iter__(self) -> Iterator[Window]:
        micro: dict[str, Tensor] = {}
        yield Window([micro], 0)


def test_a_loader_of_windows_is_used_as_it_is() -> None:
    own = OwnLoader()
    assert as_window_loader(own, 4, 0) is own
    ours = TokenWindowLoader(np.arange(9), Batching(8, 1))
    assert as_window_loader(ours, 4, 0) is ours
    wrapped = as_window_loader(plain_loader(10, batch_size=2), 4, 9)
    assert isinstance(wrapped, WindowLoader)
    assert (wrapped.accumulation_steps, wrapped.seed) == (4, 9)
    plain = as_window_loader(plain_loader(10, batch_size=2))
    assert (plain.accumulation_steps, plain.seed) == (1, 0)


# guards


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_length": 0},
        {"batch_size": 0},
        {"accumulation_steps": 0},
        {"rank": 2, "world_size": 2},
        {"rank": -1},
    ],
)
def test_sizes_and_ranks_that_cannot_be_are_misuse(options: dict[str, int]) -> None:
    arguments = {"sequence_length": 4, "batch_size": 2, **options}
    with pytest.raises(ValueError, match="must"):
        Batching(**arguments)


@pytest.mark.parametrize("step", [-1, 12])
def test_a_step_that_an_epoch_lacks_is_misuse(step: int) -> None:
    loader = TokenWindowLoader(np.arange(100), Batching(4, 2))
    assert len(loader) == 12
    with pytest.raises(ValueError, match="12 steps"):
        loader.window_at(0, step)


def test_inputs_and_targets_do_not_share_memory() -> None:
    (micro,) = TokenWindowLoader(np.arange(100), Batching(4, 2)).window_at(0, 0).micro_batches
    targets = micro["target_ids"].clone()
    micro["input_ids"].fill_(-1)
    assert torch.equal(micro["target_ids"], targets)
    assert micro["target_ids"].view(-1).shape == (8,)


@pytest.mark.parametrize("tokens", [np.zeros(100), np.zeros((100, 2), dtype=int), [0.5] * 100])
def test_tokens_that_are_no_row_of_integers_are_misuse(tokens: Any) -> None:
    for loader in (TokenWindowLoader, ValidationLoader):
        with pytest.raises(ValueError, match="one row of integers"):
            loader(tokens, Batching(4, 2))


def test_padding_of_validation_is_the_token_that_every_vocabulary_has() -> None:
    (batch,) = ValidationLoader(np.arange(1, 7), Batching(4, 2))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 0, 0, 0]]
    assert batch["target_ids"].tolist() == [[2, 3, 4, 5], [6, -100, -100, -100]]


def test_a_file_of_tokens_is_read_as_an_array_is(tmp_path: Path) -> None:
    ids = np.arange(60, dtype=np.uint16)
    (tmp_path / "ids.bin").write_bytes(ids.tobytes())
    in_file = FileTokens(tmp_path / "ids.bin", 0, len(ids), ids.dtype)
    for loader in (TokenWindowLoader, ValidationLoader):
        batches = [
            [as_window(batch).micro_batches for batch in loader(tokens, Batching(4, 2))]
            for tokens in (in_file, ids)
        ]
        assert str(batches[0]) == str(batches[1])


def test_a_list_without_tokens_is_an_empty_split() -> None:
    assert len(ValidationLoader([], Batching(4, 2))) == 0
    with pytest.raises(ValueError, match="one row of integers"):
        ValidationLoader([0.5], Batching(4, 2))


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_tokens_of_other_kinds_give_the_same_batches(kind: Any) -> None:
    ids = np.arange(60)
    expected = [rows_of(window) for window in TokenWindowLoader(ids, Batching(4, 2))]
    assert [rows_of(window) for window in TokenWindowLoader(kind(ids), Batching(4, 2))] == expected
    validated = [micro["target_ids"].tolist() for micro in ValidationLoader(ids, Batching(4, 2))]
    assert [
        m["target_ids"].tolist() for m in ValidationLoader(kind(ids), Batching(4, 2))
    ] == validated


def test_without_a_seed_the_order_is_that_of_seed_0() -> None:
    plain, zero = (
        TokenWindowLoader(np.arange(100), batching)
        for batching in (Batching(4, 2), Batching(4, 2, seed=0))
    )
    assert rows_of(plain.window_at(0, 0)) == rows_of(zero.window_at(0, 0))


def test_a_full_step_computes_its_rows_on_every_rank() -> None:
    loader = TokenWindowLoader(np.arange(500), Batching(4, 5, accumulation_steps=3, world_size=2))
    assert loader.computed_per_step == loader.tokens_per_step == 120
    assert sum(micro["input_ids"].numel() for micro in loader.window_at(0, 0).micro_batches) == 60


def test_a_text_of_two_whole_sequences_has_every_phase() -> None:
    loader = TokenWindowLoader(np.arange(9), Batching(4, 2))
    phases = {int(loader.rows_at(epoch, 0).min()) for epoch in range(40)}
    assert phases == {0, 1, 2, 3}


def test_a_loader_tells_the_shape_of_its_batches_as_far_as_it_knows() -> None:
    assert batch_shape_of(TokenWindowLoader(np.arange(50), Batching(4, 2))) == (2, 4)
    assert batch_shape_of(WindowLoader(plain_loader(10, batch_size=2))) == (2, None)
    assert batch_shape_of(WindowLoader([])) == (None, None)
