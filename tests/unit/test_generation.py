"""Generation against plain forward passes over the documented windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples
from tests.unit.test_cache import COMBINATIONS, T, V, lively
from torch import Tensor, nn

from fundamentallm.models.generation.batch import Generation, generate_tokens
from fundamentallm.models.generation.sampling import SamplingRules
from fundamentallm.models.layers.positions import POSITIONS, Positions

GREEDY = SamplingRules(temperature=0)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7], list(range(T)), list(range(T - 1))]


def window(prompt_length: int, length: int, context: int) -> int:
    """Return where the window of a text begins, by the documented rule and one token at a time."""
    start = max(0, prompt_length - context)
    for reached in range(prompt_length, length + 1):
        if reached - start > context:  # begins anew with the newest token and context // 2
            start = reached - 1 - context // 2
    return start


def reference(model: nn.Module, prompt: list[int], number: int) -> list[int]:
    """Greedy text by one whole forward pass a token, one text at a time."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(number):
            start = window(len(prompt), len(text), T)
            text.append(int(model(torch.tensor([text[start:]]))[0, -1].argmax()))
    return text[len(prompt) :]


def texts(*arguments: Any, **options: Any) -> list[list[int]]:
    return torch.stack(list(generate_tokens(*arguments, **options)), dim=1).tolist()


# Every second combination in one of the types by default, all of them in both in the long run.
@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        pytest.param(fields, dtype, marks=pytest.mark.long if number % 4 != 2 * turn else [])
        for number, fields in enumerate(COMBINATIONS)
        for turn, dtype in enumerate((torch.float64, torch.float32))
    ],
    ids=str,
)
def test_greedy_text_equals_whole_forward_passes_far_past_the_context(
    fields: dict[str, Any], dtype: torch.dtype
) -> None:
    model = lively(**fields).to(dtype)
    expected = [reference(model, prompt, 4 * T) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) > 1
    assert max(len(set(text)) for text in expected) > 2
    assert texts(model, PROMPTS, 4 * T, GREEDY) == expected
    assert texts(model, PROMPTS, 4 * T, GREEDY, use_cache=False) == expected
    assert texts(model, PROMPTS[:1], 4 * T, GREEDY) == expected[:1]


RULES = [
    SamplingRules(),
    SamplingRules(temperature=1.5, top_k=5),
    SamplingRules(top_p=0.9, min_p=0.05),
    SamplingRules(temperature=0, repetition_penalty=1.5),
    SamplingRules(repetition_penalty=1.2, temperature=0.7),
]


@given(
    prompts=st.lists(
        st.lists(st.integers(0, V - 1), min_size=1, max_size=2 * T), min_size=1, max_size=4
    ),
    rules=st.sampled_from(RULES),
    seed=st.integers(0, 1000),
    context=st.integers(1, T),
    positions=st.sampled_from(POSITIONS.names()),
)
@settings(max_examples=examples(25))
def test_a_row_is_what_it_is_alone_with_the_cache_and_without(
    prompts: list[list[int]], rules: SamplingRules, seed: int, context: int, positions: str
) -> None:
    model = lively(positions=positions, num_kv_heads=2, sequence_length=context).double()
    seeds = [seed + row for row in range(len(prompts))]
    together = texts(model, prompts, 2 * context + 3, rules, seeds)
    assert texts(model, prompts, 2 * context + 3, rules, seeds, use_cache=False) == together
    for prompt, own, text in zip(prompts, seeds, together, strict=True):
        assert texts(model, [prompt], 2 * context + 3, rules, [own]) == [text]


def test_rows_that_end_leave_the_others_as_they_are() -> None:
    model, rules, seeds = lively().double(), SamplingRules(repetition_penalty=1.3), [1, 2, 3, 4, 5]
    expected = texts(model, PROMPTS, 150, rules, seeds)
    generation = Generation(model, PROMPTS, 150, rules, seeds)
    ends = {2: [1], 70: [0, 4], 71: [1], 100: [2]}
    for step in range(1, 151):
        assert generation.step().shape == (len(generation.rows),)
        generation.end(ends.get(step, []))
    assert generation.rows == [3]
    for row, length in enumerate([70, 2, 100, 150, 70]):
        assert generation.texts[row] == PROMPTS[row] + expected[row][:length]


class Successor(nn.Module):
    """Always continues n with n + 1 and remembers what it was shown."""

    def __init__(self, sequence_length: int | None) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        if sequence_length is not None:
            self.sequence_length = sequence_length
        self.seen: list[list[int]] = []
        self.states: list[tuple[bool, bool, bool]] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        self.seen.append(input_ids[0].tolist())
        self.states.append((self.training, self.dropout.training, torch.is_grad_enabled()))
        return 100.0 * nn.functional.one_hot((input_ids + 1) % 50, 50)


@pytest.mark.parametrize(
    ("context", "windows"),
    [
        (4, [[0, 1, 2], [0, 1, 2, 3], [2, 3, 4], [2, 3, 4, 5], [4, 5, 6], [4, 5, 6, 7]]),
        (3, [[0, 1, 2], [2, 3], [2, 3, 4], [4, 5], [4, 5, 6], [6, 7]]),
        (2, [[1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7]]),
        (1, [[2], [3], [4], [5], [6], [7]]),
    ],
)
def test_a_full_window_begins_anew_with_the_newest_token_and_half_the_context(
    context: int, windows: list[list[int]]
) -> None:
    model = Successor(sequence_length=context)
    assert texts(model, [[0, 1, 2]], 6, GREEDY) == [[3, 4, 5, 6, 7, 8]]
    assert model.seen == windows


def test_a_prompt_longer_than_the_context_is_cut_at_the_left() -> None:
    model = Successor(sequence_length=2)
    texts(model, [[5, 6, 7, 8]], 1, GREEDY)
    assert model.seen == [[7, 8]]


def test_a_model_without_a_context_length_sees_everything() -> None:
    model = Successor(sequence_length=None)
    texts(model, [[0]], 3, GREEDY)
    assert model.seen == [[0], [0, 1], [0, 1, 2]]


def test_tokens_stream_one_forward_each() -> None:
    model = Successor(sequence_length=8)
    tokens = generate_tokens(model, [[0], [7]], 3, GREEDY)
    assert model.seen == []
    assert next(tokens).tolist() == [1, 8]
    assert len(model.seen) == 1


def test_a_cached_step_computes_one_token_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = lively(), []
    forward = model.forward

    def remember(input_ids: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", remember)
    texts(model, [[1, 2, 3, 4, 5], [1, 2]], 8, GREEDY)  # T = 9
    ones = (2, 1)
    # The longer prompt fills its window after five tokens and begins anew with T // 2 + 1.
    assert shapes == [(2, 4), *[ones] * 5, (1, 4), *[ones] * 3]


def test_positions_without_places_are_recomputed() -> None:
    model = lively()
    model.positions = Positions()
    assert texts(model, PROMPTS[:2], 20, GREEDY) == [
        reference(model, prompt, 20) for prompt in PROMPTS[:2]
    ]


@pytest.mark.parametrize("use_cache", [True, False])
def test_modes_and_gradients_are_the_callers_own_between_tokens(use_cache: bool) -> None:
    model = lively(dropout=0.5).train()
    model.blocks[0].eval()  # a frozen part of a model in training
    before = [module.training for module in model.modules()]
    tokens = []
    for token in generate_tokens(model, [[0]], 20, GREEDY, use_cache=use_cache):
        assert [module.training for module in model.modules()] == before
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        tokens.append(token)
    assert torch.stack(tokens, dim=1).tolist() == [reference(model.eval(), [0], 20)]
    # What was generated can be trained on.
    model(torch.stack(tokens[:T], dim=1)).sum().backward()


def test_a_forward_runs_in_evaluation_mode_without_gradients() -> None:
    model = Successor(sequence_length=8)
    texts(model, [[0]], 2, GREEDY)
    assert model.states == [(False, False, False)] * 2
    assert model.training


def test_modes_return_after_an_error() -> None:
    model = Successor(sequence_length=8).train()
    with pytest.raises(IndexError):
        next(generate_tokens(nn.Sequential(model, nn.Flatten(0)), [[0]], 1, GREEDY))
    assert model.training


def test_a_seed_decides_the_text_and_global_random_numbers_stay_untouched() -> None:
    model, rules = lively(), SamplingRules(temperature=2.0)
    before = torch.get_rng_state()
    assert texts(model, [[0]], 30, rules, [1]) == texts(model, [[0]], 30, rules, [1])
    assert texts(model, [[0]], 30, rules, [1]) != texts(model, [[0]], 30, rules, [2])
    assert texts(model, [[0]], 30, rules) != texts(model, [[0]], 30, rules)
    first, second = texts(model, [[0], [0]], 30, rules)
    assert first != second
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("number", [1, 63, 64, 65])
def test_a_longer_text_begins_as_the_shorter_one(number: int) -> None:
    model = lively().double()
    long = texts(model, [[0]], 130, SamplingRules(), [5])[0]
    assert texts(model, [[0]], number, SamplingRules(), [5]) == [long[:number]]


def test_the_penalty_knows_the_prompt_and_what_was_generated() -> None:
    class LowestFirst(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return -(1.0 + torch.arange(6)).expand(*input_ids.shape, -1)

    rules = SamplingRules(temperature=0, repetition_penalty=10.0)
    assert texts(LowestFirst(), [[1, 3, 1], [5]], 4, rules) == [[0, 2, 4, 5], [0, 1, 2, 3]]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_ids_beyond_the_vocabulary_are_never_drawn(rules: SamplingRules, use_cache: bool) -> None:
    model = lively(tie_embeddings=False).double()
    padded = lively(tie_embeddings=False, vocab_size=V + 7).double()
    weights = model.state_dict()
    for name, weight in padded.state_dict().items():
        rows = weights[name]
        if weight.shape != rows.shape:
            # Likelier than a token that there is, wherever that one's logit is positive.
            rows = torch.cat([rows, 9.0 * rows[:7]])
        weight.copy_(rows)
    options: dict[str, Any] = {"seeds": [1, 2, 3, 4, 5], "use_cache": use_cache}
    plain = texts(model, PROMPTS, 40, rules, **options)
    assert texts(model, PROMPTS, 40, rules, **options, vocab_size=V) == plain
    assert max(map(max, texts(padded, PROMPTS, 40, rules, **options))) >= V
    assert texts(padded, PROMPTS, 40, rules, **options, vocab_size=V) == plain


def test_no_tokens_asked_no_forward() -> None:
    model = Successor(sequence_length=8)
    assert list(generate_tokens(model, [[0]], 0, GREEDY)) == []
    assert model.seen == []


@pytest.mark.parametrize(
    ("prompts", "number", "seeds", "message"),
    [
        ([], 1, None, "at least one token"),
        ([[1], []], 1, None, "at least one token"),
        ([[1]], -1, None, "got -1"),
        ([[1]], 1, [1, 2], "1 prompts and 2 seeds"),
    ],
)
def test_impossible_arguments_are_refused_at_the_call(
    prompts: list[list[int]], number: int, seeds: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_tokens(Successor(8), prompts, number, GREEDY, seeds)
