"""Token sampling against the rules' definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fundamentallm.errors import NumericalError
from fundamentallm.models.generation.sampling import SamplingRules, draw, probabilities, sample_next

V = 6
LOGITS = [2.0, -1.0, 0.5, 1.5, -math.inf, 0.0]
DRAWS = 20_000


def uniforms(number: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, dtype=torch.float64, generator=generator)


def frequencies(**rules: float | int | None) -> list[float]:
    """Draw many tokens in one call, which also proves that rows are independent."""
    logits = torch.tensor(LOGITS).expand(DRAWS, V)
    ids = sample_next(logits, SamplingRules(**rules), uniforms(DRAWS))  # type: ignore[arg-type]
    assert ids.shape == (DRAWS,)
    assert ids.dtype == torch.int64
    return (torch.bincount(ids, minlength=V) / DRAWS).tolist()


def naive_probabilities(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> list[float]:
    weights = [math.exp(x / temperature) for x in LOGITS]
    order = sorted(range(V), key=lambda v: -weights[v])[:top_k]
    if top_p is not None:
        total, kept, mass = sum(weights[v] for v in order), [], 0.0
        for v in order:
            kept.append(v)
            mass += weights[v] / total
            if mass >= top_p:
                break
        order = kept
    if min_p is not None:
        order = [v for v in order if weights[v] >= min_p * max(weights)]
    total = sum(weights[v] for v in order)
    return [weights[v] / total if v in order else 0.0 for v in range(V)]


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.01},
        {"top_p": 0.7},
        {"top_p": 0.95},
        {"top_p": 1.0},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.6},
        {"min_p": 0.0},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 2.0, "min_p": 0.3},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.95, "min_p": 0.4},
    ],
)
def test_tokens_follow_the_rules_distribution(rules: dict[str, float]) -> None:
    expected = naive_probabilities(**rules)  # type: ignore[arg-type]
    for actual, wanted in zip(frequencies(**rules), expected, strict=True):
        assert actual == pytest.approx(wanted, abs=5 * math.sqrt(0.25 / DRAWS))
        assert actual > 0 or wanted < 0.01
        assert wanted > 0 or actual == 0


def test_temperature_0_takes_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]])
    assert sample_next(logits, SamplingRules(temperature=0)).tolist() == [1, 0]


@given(temperature=st.floats(0, 1e-3), seed=st.integers(0, 100))
def test_a_tiny_temperature_is_greedy_and_never_nan(temperature: float, seed: int) -> None:
    rules = SamplingRules(temperature=temperature)
    assert sample_next(torch.tensor([LOGITS]) * 10, rules, uniforms(1, seed)).tolist() == [0]


def test_top_k_keeps_exactly_k_of_equals() -> None:
    ids = sample_next(torch.zeros(1000, V), SamplingRules(top_k=2), uniforms(1000))
    assert len(set(ids.tolist())) == 2


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = torch.linspace(0, 1, 50).expand(200, 50).bfloat16()
    draws = [
        sample_next(x, SamplingRules(top_p=0.9), uniforms(200, seed=3))
        for x in (logits, logits.float())
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_distribution_are_refused(bad: list[float], temperature: float) -> None:
    rules = SamplingRules(temperature=temperature)
    with pytest.raises(NumericalError, match="not finite"):
        sample_next(torch.tensor([[1.0, 2.0], bad]), rules, uniforms(2))


BAD_RULES: list[tuple[dict[str, float], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"top_k": 0}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": math.nan}, "top_p"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.01}, "min_p"),
    ({"min_p": math.nan}, "min_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"repetition_penalty": -2.0}, "repetition_penalty"),
    ({"repetition_penalty": math.inf}, "repetition_penalty"),
    ({"repetition_penalty": math.nan}, "repetition_penalty"),
]


@pytest.mark.parametrize(("rules", "name"), BAD_RULES)
def test_a_rule_out_of_range_is_refused(rules: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingRules(**rules)  # type: ignore[arg-type]


def test_logits_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 6\)"):
        sample_next(torch.zeros(2, 3, V), SamplingRules(), uniforms(2))


def test_missing_random_numbers_are_refused_and_not_needed_at_temperature_0() -> None:
    with pytest.raises(ValueError, match="uniforms"):
        sample_next(torch.zeros(1, V), SamplingRules())
    assert sample_next(torch.zeros(1, V), SamplingRules(temperature=0)).tolist() == [0]


@given(
    logits=st.lists(st.floats(-5, 5), min_size=V, max_size=V),
    seen=st.lists(st.booleans(), min_size=V, max_size=V),
    penalty=st.floats(0.5, 3),
)
def test_the_penalty_divides_positive_logits_of_seen_tokens_and_multiplies_negative_ones(
    logits: list[float], seen: list[bool], penalty: float
) -> None:
    expected = [
        (x / penalty if x > 0 else x * penalty) if was_seen else x
        for x, was_seen in zip(logits, seen, strict=True)
    ]
    token = sample_next(
        torch.tensor([logits], dtype=torch.float64),
        SamplingRules(temperature=0, repetition_penalty=penalty),
        seen=torch.tensor([seen]),
    )
    assert expected[int(token)] == max(expected)


def test_the_penalty_comes_before_the_temperature() -> None:
    logits, seen = torch.tensor([[2.0, 0.0]]).expand(DRAWS, 2), torch.tensor([[True, False]])
    rules = SamplingRules(repetition_penalty=4.0, temperature=0.5)
    ids = sample_next(logits, rules, uniforms(DRAWS), seen.expand(DRAWS, 2))
    expected = 1 / (1 + math.exp(-(2.0 / 4.0) / 0.5))
    assert (ids == 0).double().mean().item() == pytest.approx(expected, abs=0.02)


def test_a_draw_inverts_the_cumulated_probabilities() -> None:
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for uniform, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (0.9999, 4)):
        assert draw(weights, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 0.1, 0.3, 1 / 3, 1.0]), min_size=1, max_size=40),
    uniform=st.sampled_from([0.0, 0.5, 1 - 2**-53]),
)
def test_a_token_of_probability_0_is_never_drawn(weights: list[float], uniform: float) -> None:
    if not any(weights):
        weights = [*weights, 1.0]
    token = draw(
        torch.tensor([weights], dtype=torch.float64), torch.tensor([uniform], dtype=torch.float64)
    )
    assert weights[int(token)] > 0


@pytest.mark.parametrize("vocab_size", [50_257, 128_256])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_rules_that_keep_everything_change_nothing(vocab_size: int, spread: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, vocab_size) * spread
    plain = probabilities(logits, SamplingRules())
    for rules in (
        SamplingRules(top_p=1.0),
        SamplingRules(top_k=vocab_size),
        SamplingRules(top_p=1.0, top_k=vocab_size, min_p=0.0),
    ):
        assert torch.equal(probabilities(logits, rules), plain)


def test_a_nucleus_of_a_large_vocabulary_is_that_of_exact_sums() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 128_256) * 3
    exact = logits.double().softmax(dim=-1)[0]
    ordered, indices = exact.sort(descending=True)
    for top_p in (0.5, 0.99, 0.99999):
        kept = probabilities(logits, SamplingRules(top_p=top_p))[0] > 0
        count = int((ordered.cumsum(0) - ordered < top_p).sum())
        assert abs(int(kept.sum()) - count) <= 1  # a rounding of the bound itself
        assert kept[indices[: count - 1]].all()
