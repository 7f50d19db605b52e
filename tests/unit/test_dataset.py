from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fundamentallm.data.dataset import LanguageModelDataset
from fundamentallm.errors import DataError

SIZES = st.integers(min_value=1, max_value=12)


@given(num_tokens=st.integers(min_value=2, max_value=80), length=SIZES)
def test_windows_shift_by_one_do_not_overlap_and_cover_the_text(
    num_tokens: int, length: int
) -> None:
    if num_tokens <= length:
        return
    dataset = LanguageModelDataset(np.arange(num_tokens), length)
    targets = []
    for index in range(len(dataset)):
        item = dataset[index]
        assert item["input_ids"].dtype == item["target_ids"].dtype == torch.int64
        assert item["input_ids"].shape == item["target_ids"].shape == (length,)
        assert torch.equal(item["input_ids"] + 1, item["target_ids"])
        targets += item["target_ids"].tolist()
    assert targets == list(range(1, len(targets) + 1))
    assert num_tokens - 1 - len(targets) < length  # only a partial window is left out


@given(num_tokens=st.integers(min_value=2, max_value=80), length=SIZES)
def test_a_padded_last_window_leaves_no_target_out(num_tokens: int, length: int) -> None:
    dataset = LanguageModelDataset(np.arange(1, num_tokens + 1), length, pad_last=True)
    items = [dataset[index] for index in range(len(dataset))]
    targets = torch.cat([item["target_ids"] for item in items])
    inputs = torch.cat([item["input_ids"] for item in items])
    valid = targets >= 0
    assert targets[valid].tolist() == list(range(2, num_tokens + 1))
    assert inputs[valid].tolist() == list(range(1, num_tokens))
    assert set(targets[~valid].tolist()) <= {-100}
    assert set(inputs[~valid].tolist()) <= {0}


@given(num_tokens=st.integers(min_value=2, max_value=60), length=SIZES, stride=SIZES)
def test_a_stride_sets_where_windows_start(num_tokens: int, length: int, stride: int) -> None:
    if num_tokens <= length:
        return
    dataset = LanguageModelDataset(np.arange(num_tokens), length, stride=stride)
    starts = [int(dataset[index]["input_ids"][0]) for index in range(len(dataset))]
    assert starts == list(range(0, num_tokens - length, stride))


@given(num_tokens=st.integers(min_value=2, max_value=60), length=SIZES, stride=SIZES)
def test_padding_adds_one_window_and_only_for_targets_that_are_left(
    num_tokens: int, length: int, stride: int
) -> None:
    padded = LanguageModelDataset(np.arange(num_tokens), length, stride, pad_last=True)
    starts = list(range(0, num_tokens - length, stride))
    covered = {start + 1 + place for start in starts for place in range(length)}
    following = len(starts) * stride
    if max(covered, default=0) < num_tokens - 1 and following < num_tokens - 1:
        starts.append(following)
    assert [int(padded[index]["input_ids"][0]) for index in range(len(padded))] == starts
    for index, start in enumerate(starts):
        targets = padded[index]["target_ids"]
        expected = list(range(start + 1, min(start + 1 + length, num_tokens)))
        assert targets.tolist() == expected + [-100] * (length - len(expected))
        assert expected
    if stride <= length:
        last = padded[len(padded) - 1]["target_ids"]
        assert num_tokens - 1 in last.tolist()


def test_sources_of_every_kind_give_the_same_items(tmp_path: Path) -> None:
    ids = [3, 1, 4, 1, 5, 9, 2]
    np.save(tmp_path / "ids.npy", np.array(ids, dtype=np.uint16))
    sources = [
        ids,
        np.array(ids, dtype=np.uint8),
        torch.tensor(ids),
        np.array(ids, dtype=">u2"),
        np.load(tmp_path / "ids.npy", mmap_mode="r"),
    ]
    for source in sources:
        dataset = LanguageModelDataset(source, 3)
        assert len(dataset) == 2
        assert dataset[1]["input_ids"].tolist() == [1, 5, 9]
        assert dataset[1]["target_ids"].tolist() == [5, 9, 2]


def test_the_corpus_is_never_copied() -> None:
    ids = np.zeros(1000, dtype=np.uint8)
    assert np.shares_memory(LanguageModelDataset(ids, 10).tokens, ids)
    tensor = torch.zeros(1000, dtype=torch.int64)
    assert np.shares_memory(LanguageModelDataset(tensor, 10).tokens, tensor.numpy())


def test_an_item_is_the_readers_own() -> None:
    ids = np.arange(10, dtype=np.int64)
    LanguageModelDataset(ids, 4)[0]["input_ids"].fill_(99)
    assert ids.tolist() == list(range(10))


def test_indices_count_from_the_end_too_and_end() -> None:
    dataset = LanguageModelDataset(np.arange(9), 4)
    assert torch.equal(dataset[-1]["input_ids"], dataset[1]["input_ids"])
    for index in (2, -3):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize(("num_tokens", "length"), [(0, 1), (1, 1), (8, 8)])
def test_too_short_a_text_says_how_much_is_needed(num_tokens: int, length: int) -> None:
    with pytest.raises(DataError) as caught:
        LanguageModelDataset(np.zeros(num_tokens, dtype=np.uint8), length)
    assert f"{num_tokens} tokens" in caught.value.got
    assert str(length + 1) in caught.value.expected


def test_one_window_fits_exactly() -> None:
    assert len(LanguageModelDataset(np.arange(9), 8)) == 1


@pytest.mark.parametrize("options", [{"sequence_length": 0}, {"sequence_length": 4, "stride": 0}])
def test_lengths_below_one_are_misuse(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LanguageModelDataset(np.arange(9), **options)


@pytest.mark.parametrize("tokens", [np.zeros(9), np.zeros((9, 2), dtype=int), [0.5] * 9, "a" * 9])
def test_tokens_that_are_no_row_of_integers_are_misuse(tokens: Any) -> None:
    with pytest.raises(ValueError, match="one row of integers"):
        LanguageModelDataset(tokens, 4)


def test_it_feeds_a_plain_data_loader() -> None:
    loader = DataLoader(LanguageModelDataset(np.arange(41), 8), batch_size=2)
    batches = list(loader)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 8), (2, 8), (1, 8)]
