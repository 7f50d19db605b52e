"""Losses against loops over Python floats, and the chunked form against the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fundamentallm.errors import ConfigError
from fundamentallm.testing import tiny_model
from fundamentallm.training.losses import (
    LOSSES,
    ChunkedCrossEntropy,
    LanguageModelingLoss,
    compute_loss,
)

REDUCTIONS = ("mean", "sum", "none", "sample")


def naive_token_loss(row: list[float], target: int, eps: float) -> float:
    """Cross-entropy of the smoothed target distribution, straight from its definition."""
    if target < 0:
        return 0.0
    highest = max(row)
    log_total = highest + math.log(math.fsum(math.exp(x - highest) for x in row))
    wanted = [eps / len(row) + (1 - eps) * (v == target) for v in range(len(row))]
    return math.fsum(q * (log_total - x) for q, x in zip(wanted, row, strict=True))


def naive_loss(logits: Tensor, targets: Tensor, reduction: str, eps: float) -> Tensor:
    losses = [
        [naive_token_loss(row, target, eps) for row, target in zip(rows, line, strict=True)]
        for rows, line in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    valid = [[target >= 0 for target in line] for line in targets.tolist()]
    if reduction == "none":
        return torch.tensor(losses, dtype=torch.float64)
    if reduction == "sample":
        means = [math.fsum(a) / max(1, sum(v)) for a, v in zip(losses, valid, strict=True)]
        return torch.tensor(means, dtype=torch.float64)
    total = math.fsum(map(math.fsum, losses))
    count = sum(map(sum, valid)) if reduction == "mean" else 1
    return torch.tensor(total / max(1, count), dtype=torch.float64)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) float64 and targets (B, T) with some masks, negative in several ways."""
    batch, time, vocabulary = (draw(st.integers(1, n)) for n in (3, 5, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = 5 * torch.randn(batch, time, vocabulary, generator=generator, dtype=torch.float64)
    size = batch * time
    target = st.integers(0, vocabulary - 1) | st.sampled_from([-1, -100, -7])
    targets = draw(st.lists(target, min_size=size, max_size=size))
    return logits, torch.tensor(targets).reshape(batch, time)


@settings(max_examples=examples(60))
@given(batches(), st.sampled_from(REDUCTIONS), st.sampled_from([0.0, 0.1, 0.7]))
def test_equals_the_definition(batch, reduction, eps):
    logits, targets = batch
    loss = compute_loss(logits, targets, reduction, eps)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, naive_loss(logits, targets, reduction, eps))


@settings(max_examples=examples(30))
@given(batches(), st.sampled_from([0.0, 0.2]))
def test_gradient_is_softmax_minus_target_distribution(batch, eps):
    logits, targets = batch
    logits.requires_grad_()
    compute_loss(logits, targets, "sum", eps).backward()
    vocabulary = logits.size(-1)
    wanted = (1 - eps) * nn.functional.one_hot(targets.clamp(min=0), vocabulary) + eps / vocabulary
    expected = (logits.detach().softmax(-1) - wanted) * (targets >= 0).unsqueeze(-1)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("mask", [-1, -100])
def test_nothing_valid_is_zero_loss_and_zero_gradient(reduction, eps, mask):
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = compute_loss(logits, torch.full((2, 3), mask), reduction, eps)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (logits.grad == 0).all()


def test_one_masked_sequence_leaves_the_others_mean():
    logits = torch.zeros(2, 3, 4)
    targets = torch.tensor([[-100, -100, -100], [1, -100, 2]])
    per_sequence = compute_loss(logits, targets, "sample")
    torch.testing.assert_close(per_sequence, torch.tensor([0.0, math.log(4)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    logits = torch.zeros(4096, 7, dtype=dtype)
    total = compute_loss(logits, torch.zeros(4096, dtype=torch.int64), "sum")
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(4096 * math.log(7), rel=1e-6)


def test_float64_stays_float64_under_autocast():
    logits = torch.randn(3, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_loss(logits, torch.tensor([0, 1, 2])).dtype == torch.float64


def test_huge_logits_do_not_overflow():
    logits = torch.tensor([[1e30, 0.0], [0.0, -1e30]])
    torch.testing.assert_close(
        compute_loss(logits, torch.tensor([0, 1]), "none"), torch.tensor([0.0, 1e30])
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_type_of_target(dtype):
    logits = torch.randn(4, 6)
    targets = torch.tensor([0, 5, 3, 1])
    assert compute_loss(logits, targets.to(dtype)).equal(compute_loss(logits, targets))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_tokens_at_all(shape, reduction):
    assert compute_loss(torch.zeros(*shape, 5), torch.zeros(shape).long(), reduction).item() == 0


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3, 5), torch.zeros(2, 4).long(), r"\(2, 3, 5\).*\(2, 4\)"),
        (torch.zeros(6, 5), torch.zeros(2, 3).long(), r"\(6, 5\).*\(2, 3\)"),
        (torch.zeros(()), torch.zeros(()).long(), r"\(\)"),
        (torch.zeros(2, 5), torch.zeros(2), "integers.*float32"),
        (torch.zeros(2, 5), torch.zeros(2).bool(), "integers.*bool"),
    ],
)
def test_misfits_are_refused(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        compute_loss(logits, targets)


def test_bad_arguments_are_refused():
    logits, targets = torch.zeros(2, 5), torch.zeros(2).long()
    with pytest.raises(ValueError, match=r"'max'.*mean, sum, none, sample"):
        compute_loss(logits, targets, "max")
    with pytest.raises(ValueError, match="time dimension"):
        compute_loss(logits[0], targets[0], "sample")
    for eps in (-0.1, 1.0, math.nan):
        for build in (LanguageModelingLoss, lambda e: ChunkedCrossEntropy(8, e)):
            with pytest.raises(ValueError, match="label_smoothing"):
                build(eps)
        with pytest.raises(ValueError, match="label_smoothing"):
            compute_loss(logits, targets, label_smoothing=eps)
    with pytest.raises(ValueError, match="chunk_tokens"):
        ChunkedCrossEntropy(0)
    with pytest.raises(ValueError, match=r"hidden states.*\(2, 5\).*\(3,\)"):
        ChunkedCrossEntropy()(logits, CountingHead(5, 7), torch.zeros(3).long())


def test_losses_by_name():
    assert LOSSES.names() == ["chunked_cross_entropy", "cross_entropy"]
    plain, smooth = (LOSSES.build("cross_entropy", {"label_smoothing": e}) for e in (0.0, 0.2))
    chunked = LOSSES.build("chunked_cross_entropy", {"chunk_tokens": 4})
    assert plain.is_nll
    assert chunked.is_nll
    assert not smooth.is_nll
    assert not ChunkedCrossEntropy(label_smoothing=0.1).is_nll
    assert chunked.takes_hidden_states
    assert not plain.takes_hidden_states
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    assert smooth(logits, targets).equal(compute_loss(logits, targets, "mean", 0.2))
    with pytest.raises(ConfigError, match="label_smoothing"):
        LOSSES.build("cross_entropy", {"label_smoothin": 0.1})


class CountingHead(nn.Module):
    """A head with a soft cap, which counts the rows of logits that it makes."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.rows: list[int] = []

    def logits_from_hidden(self, hidden: Tensor) -> Tensor:
        self.rows.append(hidden[..., 0].numel())
        return 3 * torch.tanh(self.head(hidden) / 3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("eps", [0.0, 0.15])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 20, 64])
def test_chunked_equals_whole(reduction, eps, chunk_tokens):
    torch.manual_seed(0)
    model = CountingHead(6, 11).double()
    hidden = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-3, 11, (4, 5))

    whole = compute_loss(model.logits_from_hidden(hidden), targets, reduction, eps)
    chunked = ChunkedCrossEntropy(chunk_tokens, eps)(hidden, model, targets, reduction)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=1e-13)

    weight = torch.randn(whole.shape, dtype=torch.float64)
    inputs = (hidden, model.head.weight)
    expected = torch.autograd.grad((whole * weight).sum(), inputs)
    actual = torch.autograd.grad((chunked * weight).sum(), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_chunked_under_autocast_equals_whole():
    torch.manual_seed(0)
    model = CountingHead(8, 11)
    hidden, targets = torch.randn(3, 5, 8, requires_grad=True), torch.randint(11, (3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = compute_loss(model.logits_from_hidden(hidden), targets, "sum")
        chunked = ChunkedCrossEntropy(4)(hidden, model, targets)
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(
        torch.autograd.grad(chunked, hidden), torch.autograd.grad(whole, hidden)
    )


def test_chunked_gives_the_unsmoothed_likelihood_too():
    model = CountingHead(6, 11)
    hidden, targets = torch.randn(4, 6), torch.tensor([3, -1, 0, 10])
    with torch.no_grad():
        nll = ChunkedCrossEntropy(3, label_smoothing=0.3).nll(hidden, model, targets)
    expected = compute_loss(model.logits_from_hidden(hidden), targets, "sum")
    torch.testing.assert_close(nll, expected)


def test_chunked_with_nothing_valid():
    model = CountingHead(6, 11)
    hidden = torch.randn(2, 3, 6, requires_grad=True)
    loss = ChunkedCrossEntropy(4)(hidden, model, torch.full((2, 3), -1), "mean")
    loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all()
    assert (model.head.weight.grad == 0).all()


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_chunked_never_holds_all_logits():
    model = CountingHead(4, 50)
    hidden, targets = torch.randn(64, 4, requires_grad=True), torch.randint(50, (64,))

    def largest(chunk_tokens: int) -> int:
        with LargestTensor() as recorder:
            ChunkedCrossEntropy(chunk_tokens)(hidden, model, targets).backward()
        return recorder.numel

    assert largest(64) == 64 * 50
    assert largest(8) == 8 * 50


def test_chunked_computes_logits_again_in_the_backward_pass():
    # Or else all chunks' logits would be kept for it.
    model = CountingHead(4, 9)
    hidden, targets = torch.randn(10, 4, requires_grad=True), torch.randint(9, (10,))
    loss = ChunkedCrossEntropy(4)(hidden, model, targets)
    assert model.rows == [4, 4, 2]
    loss.backward()
    assert sorted(model.rows) == [2, 2, 4, 4, 4, 4]


# ---------------------------------------------------------------------- the z-term


@given(st.integers(0, 2**31), st.floats(1e-6, 0.5))
def test_the_z_term_is_the_squared_log_partition_of_each_valid_target(seed, weight):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 7, (2, 3), generator=generator)
    targets[0, 1] = -100
    expected = compute_loss(logits, targets, "none").clone()
    for index in np.ndindex(2, 3):
        if targets[index] >= 0:
            partition = sum(math.exp(float(value)) for value in logits[index])
            expected[index] += weight * math.log(partition) ** 2
    actual = compute_loss(logits, targets, "none", z_loss=weight)
    torch.testing.assert_close(actual, expected)
    assert actual[0, 1] == 0


def test_the_z_term_is_the_same_in_chunks_and_its_nll_is_plain():
    model = tiny_model(7)
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    targets = torch.randint(0, 7, (2, 5))
    targets[1, 3] = -1
    chunked = ChunkedCrossEntropy(3, z_loss=0.1)
    plain = LOSSES.build("cross_entropy", {"z_loss": 0.1})
    one = chunked(hidden, model, targets)
    other = plain(model.logits_from_hidden(hidden), targets, "sum")
    torch.testing.assert_close(one, other)
    (first,) = torch.autograd.grad(one, hidden)
    (second,) = torch.autograd.grad(other, hidden)
    torch.testing.assert_close(first, second)
    assert not chunked.is_nll
    assert not plain.is_nll
    logits = model.logits_from_hidden(hidden)
    nll = chunked.nll(hidden, model, targets)
    torch.testing.assert_close(nll, compute_loss(logits, targets, "sum"))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_of_the_z_term_without_sense_is_refused(weight):
    with pytest.raises(ConfigError, match="z_loss"):
        LOSSES.build("cross_entropy", {"z_loss": weight})
