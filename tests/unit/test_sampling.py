"""Token sampling against the rules' definitions, and generation against plain forward passes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fundamentallm.config import TransformerConfig
from fundamentallm.errors import NumericalError
from fundamentallm.models.sampling import generate_tokens, sample_next
from fundamentallm.models.transformer import Transformer

V = 6
LOGITS = [2.0, -1.0, 0.5, 1.5, -math.inf, 0.0]
DRAWS = 20_000


def frequencies(**rules: float | int | None) -> list[float]:
    """Draw many tokens in one call, which also proves that rows are independent."""
    logits = torch.tensor(LOGITS).expand(DRAWS, V)
    ids = sample_next(logits, generator=torch.Generator().manual_seed(0), **rules)  # type: ignore[arg-type]
    assert ids.shape == (DRAWS,)
    assert ids.dtype == torch.int64
    return (torch.bincount(ids, minlength=V) / DRAWS).tolist()


def naive_probabilities(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
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
    assert sample_next(logits, temperature=0).tolist() == [1, 0]


@given(temperature=st.floats(0, 1e-3), seed=st.integers(0, 100))
@settings(deadline=None)
def test_a_tiny_temperature_is_greedy_and_never_nan(temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    assert sample_next(
        torch.tensor([LOGITS]) * 10, temperature=temperature, generator=generator
    ).tolist() == [0]


def test_top_k_keeps_exactly_k_of_equals() -> None:
    ids = sample_next(torch.zeros(1000, V), top_k=2, generator=torch.Generator().manual_seed(0))
    assert len(set(ids.tolist())) == 2


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = torch.linspace(0, 1, 50).expand(200, 50).bfloat16()
    draws = [
        sample_next(x, top_p=0.9, generator=torch.Generator().manual_seed(3))
        for x in (logits, logits.float())
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_distribution_are_refused(bad: list[float], temperature: float) -> None:
    with pytest.raises(NumericalError, match="not finite"):
        sample_next(torch.tensor([[1.0, 2.0], bad]), temperature=temperature)


BAD_RULES: list[tuple[dict[str, float], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"top_k": 0}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": math.nan}, "top_p"),
]


@pytest.mark.parametrize(("rules", "name"), BAD_RULES)
def test_a_rule_out_of_range_is_refused(rules: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        sample_next(torch.zeros(1, V), **rules)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=name):  # at the call, not at the first token
        generate_tokens(nn.Identity(), torch.zeros(1, 1).long(), 1, **rules)  # type: ignore[arg-type]


def test_logits_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 6\)"):
        sample_next(torch.zeros(2, 3, V))


@pytest.mark.parametrize("shape", [(3,), (1, 0)])
def test_a_prompt_of_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate_tokens(nn.Identity(), torch.zeros(shape).long(), 1)


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="got -1"):
        generate_tokens(nn.Identity(), torch.zeros(1, 1).long(), -1)


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


def test_generation_slides_past_the_context_length() -> None:
    model = Successor(sequence_length=4)
    ids = [int(token) for token in generate_tokens(model, torch.tensor([[0, 1, 2]]), 4)]
    assert ids == [3, 4, 5, 6]
    assert model.seen == [[0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]


def test_a_prompt_longer_than_the_context_is_cut_at_the_left() -> None:
    model = Successor(sequence_length=2)
    list(generate_tokens(model, torch.tensor([[5, 6, 7, 8]]), 1))
    assert model.seen == [[7, 8]]


def test_a_model_without_a_context_length_sees_everything() -> None:
    model = Successor(sequence_length=None)
    list(generate_tokens(model, torch.tensor([[0]]), 3))
    assert model.seen == [[0], [0, 1], [0, 1, 2]]


def test_tokens_stream_one_forward_each() -> None:
    model = Successor(sequence_length=8)
    tokens = generate_tokens(model, torch.tensor([[0], [7]]), 3)
    assert model.seen == []
    assert next(tokens).tolist() == [1, 8]
    assert len(model.seen) == 1


def test_modes_and_gradients_are_the_callers_own_between_tokens() -> None:
    model = Successor(sequence_length=8)
    model.dropout.eval()  # a frozen part of a model in training
    for _ in generate_tokens(model, torch.tensor([[0]]), 2):
        assert (model.training, model.dropout.training) == (True, False)
        assert torch.is_grad_enabled()
    assert model.states == [(False, False, False)] * 2


def test_modes_return_after_an_error() -> None:
    model = Successor(sequence_length=8).train()
    with pytest.raises(RuntimeError):
        next(generate_tokens(model, torch.zeros(1, 1), 1))  # one_hot refuses floats
    assert model.training


def tiny_transformer() -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=11, sequence_length=8, d_model=16, num_layers=2, num_heads=2, dropout=0.2
    )
    return Transformer(config)


def test_greedy_generation_equals_plain_forward_passes() -> None:
    model = tiny_transformer()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    tokens = list(generate_tokens(model, prompt, 12, temperature=0))
    model.eval()
    ids = prompt
    for token in tokens:
        expected = model(ids[:, -8:])[:, -1].argmax(-1)
        assert torch.equal(token, expected)
        ids = torch.cat((ids, expected[:, None]), dim=1)
    assert len(tokens) == 12


def test_a_seed_decides_the_text_and_global_random_numbers_stay_untouched() -> None:
    model, prompt = tiny_transformer(), torch.zeros(1, 1).long()

    def text(generator: torch.Generator | None) -> list[int]:
        return [int(token) for token in generate_tokens(model, prompt, 30, generator=generator)]

    before = torch.get_rng_state()
    assert text(torch.Generator().manual_seed(1)) == text(torch.Generator().manual_seed(1))
    assert text(torch.Generator().manual_seed(1)) != text(torch.Generator().manual_seed(2))
    assert text(None) != text(None)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_tokens_asked_no_forward() -> None:
    model = Successor(sequence_length=8)
    assert list(generate_tokens(model, torch.tensor([[0]]), 0)) == []
    assert model.seen == []
