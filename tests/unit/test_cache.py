"""The KV cache against whole forward passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples
from torch import Tensor

from fundamentallm.config import TransformerConfig
from fundamentallm.models.generation.cache import KVCache
from fundamentallm.models.layers.attention import cached_attention, flash_attention
from fundamentallm.models.layers.positions import POSITIONS, Positions
from fundamentallm.models.transformer import Transformer

V, T = 13, 9
COMBINATIONS = [
    {
        **{"positions": positions, "num_kv_heads": kv, "qk_norm": norm, "logit_softcap": cap},
        **{"token_shift": norm != (cap is None), "embedding_norm": norm},
    }
    for positions, kv, norm, cap in itertools.product(
        POSITIONS.names(), (1, 2, 4), (False, True), (None, 5.0)
    )
]
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lively(seed: int = 0, **fields: Any) -> Transformer:
    """A model whose weights are large enough that attention and positions decide the logits."""
    torch.manual_seed(seed)
    small = {"vocab_size": V, "sequence_length": T, "d_model": 16, "num_layers": 2, "num_heads": 4}
    model = Transformer(TransformerConfig(**{**small, **fields})).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.6
    return model


def new_cache(model: Transformer, batch: int, capacity: int = T) -> KVCache:
    cache = model.new_cache(batch, capacity)
    assert cache is not None
    return cache


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fields", COMBINATIONS, ids=str)
@pytest.mark.usefixtures("_float64")
def test_logits_equal_those_of_the_whole_text(fields: dict[str, Any]) -> None:
    model, ids = lively(**fields), tokens(3, T)
    whole = model(ids)
    with torch.inference_mode():
        cache = new_cache(model, 3)
        filled = model(ids[:, :4], cache=cache.fill([0, 1, 2], [4, 4, 4]))
        torch.testing.assert_close(filled, whole[:, :4], **EXACT)
        for t in range(4, T):
            one = model(ids[:, t : t + 1], cache=cache.step())
            torch.testing.assert_close(one, whole[:, t : t + 1], **EXACT)
    assert cache.lengths == [T] * 3


@given(
    plan=st.lists(st.lists(st.integers(0, T - 1), min_size=4, max_size=4), min_size=1, max_size=3),
    which=st.lists(st.booleans(), min_size=4, max_size=4),
    kept=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    combination=st.sampled_from(COMBINATIONS),
)
@settings(max_examples=examples(40))
def test_rows_of_any_lengths_filled_again_and_dropped_stay_exact(
    plan: list[list[int]], which: list[bool], kept: list[int], combination: dict[str, Any]
) -> None:
    """Whatever happens to rows, each continues the text that it holds, at its own length."""
    model = lively(**combination).double()
    texts: list[list[int]] = [[], [], [], []]
    generator = torch.Generator().manual_seed(0)

    def some(number: int) -> list[int]:
        return torch.randint(V, (number,), generator=generator).tolist()

    def step(cache: KVCache) -> None:
        if max(map(len, texts)) == T:
            return
        new = some(len(texts))
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        logits = model(torch.tensor(new)[:, None], cache=cache.step())
        for row, text in enumerate(texts):
            torch.testing.assert_close(logits[row, 0], model(torch.tensor([text]))[0, -1], **EXACT)

    with torch.inference_mode():
        cache = new_cache(model, 4)
        for number, lengths in enumerate(plan):
            rows = [row for row in range(4) if number == 0 or which[row]]
            for row in rows:
                texts[row] = some(lengths[row])
            if rows:
                use = cache.fill(rows, [lengths[row] for row in rows])
                longest = max(lengths[row] for row in rows)
                padded = [texts[row] + some(longest - lengths[row]) for row in rows]
                if longest:
                    model(torch.tensor(padded), cache=use)
            step(cache)
        cache.keep(kept)
        texts = [texts[row] for row in kept]
        step(cache)
        step(cache)
        assert cache.lengths == list(map(len, texts))


def test_rows_that_begin_alike_are_filled_by_one() -> None:
    model, ids = lively(), tokens(1, 5)
    with torch.inference_mode():
        one, many = new_cache(model, 1), new_cache(model, 3)
        model(ids, cache=one.fill([0], [5]))
        model(ids, cache=many.fill([0, 1, 2], [5, 5, 5]))
        token = tokens(1, 1, seed=1)
        expected = model(token, cache=one.step()).expand(3, -1, -1)
        torch.testing.assert_close(model(token.expand(3, 1), cache=many.step()), expected)


def test_a_cache_keeps_grouped_heads_alone_and_is_allocated_once() -> None:
    model = lively(num_kv_heads=2)
    with torch.inference_mode():
        cache = new_cache(model, 3, capacity=7)
        before = [buffer.data_ptr() for buffer in (*cache._keys, *cache._values)]
        model(tokens(3, 4), cache=cache.fill([0, 1, 2], [4, 4, 4]))
        model(tokens(3, 1), cache=cache.step())
    buffers = (*cache._keys, *cache._values)
    assert [buffer.data_ptr() for buffer in buffers] == before
    assert {tuple(buffer.shape) for buffer in buffers} == {(3, 2, 7, 4)}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6])
def test_one_query_reads_what_the_last_of_all_queries_reads(num_kv_heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 6, 7, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, num_kv_heads, 7, 4, dtype=torch.float64)
    whole = flash_attention(query, key, value)
    for t in range(7):
        one = query[:, :, t : t + 1]
        sliced = cached_attention(one, key[:, :, : t + 1], value[:, :, : t + 1])
        torch.testing.assert_close(sliced, whole[:, :, t : t + 1], **EXACT)
        visible = (torch.arange(7) <= t).expand(2, 1, 1, 7)
        masked = cached_attention(one, key, value, visible)
        torch.testing.assert_close(masked, whole[:, :, t : t + 1], **EXACT)


@pytest.mark.parametrize("positions", POSITIONS.names())
def test_marks_at_places_are_those_of_the_whole_text(positions: str) -> None:
    encoding = POSITIONS.build(positions, None, width=16, head_width=4, sequence_length=T)
    places = torch.tensor([[0, 3], [8, 1]])
    marks = encoding.at(places)
    assert marks is not None
    torch.manual_seed(0)
    x, query, key = torch.randn(2, T, 16), torch.randn(2, 4, T, 4), torch.randn(2, 2, T, 4)
    rows = torch.arange(2)[:, None]
    assert torch.equal(marks.embed(x[rows, places]), encoding.embed(x)[rows, places])
    picked = [h.transpose(1, 2)[rows, places].transpose(1, 2) for h in (query, key)]
    for given_places, whole in zip(marks.rotate(*picked), encoding.rotate(query, key), strict=True):
        expected = whole.transpose(1, 2)[rows, places].transpose(1, 2)
        torch.testing.assert_close(given_places, expected)


def test_positions_that_know_no_places_have_no_cache() -> None:
    model = lively()
    model.positions = Positions()
    assert model.new_cache(1, T) is None


def test_gradient_checkpointing_does_not_touch_the_cache() -> None:
    model, ids = lively(), tokens(2, 3)
    model.gradient_checkpointing = True
    with torch.inference_mode():
        cache = new_cache(model, 2)
        model(ids[:, :2], cache=cache.fill([0, 1], [2, 2]))
        torch.testing.assert_close(
            model(ids[:, 2:], cache=cache.step()), lively()(ids)[:, 2:], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("lengths", [[4, 4], [4, 2]])
def test_bfloat16_autocast_stays_near_float32(lengths: list[int]) -> None:
    model, ids = lively(qk_norm=True), tokens(2, 5)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        cache = new_cache(model, 2)
        model(ids[:, :4], cache=cache.fill([0, 1], lengths))
        logits = model(ids[:, 4:], cache=cache.step())
    text = [*ids[1, : lengths[1]].tolist(), int(ids[1, 4])]
    expected = model(torch.tensor([text]))[0, -1]
    assert (logits[1, 0].float() - expected).abs().max() < 0.1 * expected.abs().max()
