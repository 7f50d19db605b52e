"""Replays of a step: their numbers, their verdicts, and how much they hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision
from fundamentallm.compute.rng import capture_generators, restore_generators
from fundamentallm.config import TransformerConfig
from fundamentallm.data.batch import Window
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.losses import ChunkedCrossEntropy, LanguageModelingLoss
from fundamentallm.training.recovery.diagnosis import (
    BadRow,
    Diagnosis,
    Incident,
    Replay,
    StepReplayer,
    read,
    window_of,
)

CPU = torch.device("cpu")
ROWS, TIME, VOCABULARY = 4, 16, 500


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        TransformerConfig(
            vocab_size=VOCABULARY, sequence_length=TIME, d_model=8, num_layers=1, num_heads=1
        )
    )


def window() -> Window:
    ids = torch.randint(VOCABULARY, (ROWS, TIME + 1), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[0, 0] = -100
    return Window([{"input_ids": ids[:, :-1], "target_ids": targets}], ROWS * TIME - 1)


def replayer(loss_fn) -> StepReplayer:
    return StepReplayer(transformer(), loss_fn, Precision("fp32", CPU), Ranks())


LOOKS = {
    "worst_rows": lambda replayer: replayer.worst_rows(window()),
    "bad_rows": lambda replayer: replayer._first_bad_position(window().micro_batches[0]),
    "replay": lambda replayer: replayer.replay(window(), watch=True),
    "diagnose": lambda replayer: replayer.diagnose(window(), capture_generators(CPU), None, None),
}


@pytest.mark.parametrize("look", LOOKS)
def test_no_tensor_of_all_logits_is_made_where_the_loss_avoids_them(look):
    def largest(loss_fn) -> int:
        with LargestTensor() as recorder:
            LOOKS[look](replayer(loss_fn))
        return recorder.numel

    # The table of embeddings has 8 times 500 numbers, as a chunk's logits have.
    assert largest(ChunkedCrossEntropy(chunk_tokens=8)) == 8 * VOCABULARY
    assert largest(LanguageModelingLoss()) == ROWS * TIME * VOCABULARY


def test_the_worst_rows_are_those_of_the_plain_likelihood_whatever_the_objective():
    model, batch = transformer(), window().micro_batches[0]
    losses = torch.nn.functional.cross_entropy(
        model(batch["input_ids"]).transpose(1, 2), batch["target_ids"], reduction="none"
    )
    expected = losses.mean(1).argsort(descending=True).tolist()
    for loss_fn in (
        LanguageModelingLoss(label_smoothing=0.3),
        ChunkedCrossEntropy(8, label_smoothing=0.3, z_loss=0.1),
    ):
        rows = replayer(loss_fn).worst_rows(window(), ROWS)
        assert [place.row for place in rows] == expected
        assert [place.position for place in rows] == losses[expected].argmax(1).tolist()


class Small(nn.Module):
    """An embedding, dropout and a head, with a buffer that counts the forward passes."""

    calls: Tensor

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 5)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(5, 7)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.head(self.dropout(self.table(input_ids)))
        return logits


def rows_of(*rows: tuple[list[int], list[int]]) -> dict[str, Tensor]:
    """Return a batch of rows (inputs, targets)."""
    inputs, targets = zip(*rows, strict=True)
    return {"input_ids": torch.tensor(inputs), "target_ids": torch.tensor(targets)}


# Two micro-batches of 5 and 2 valid targets, of which one is ignored in each of two rows.
UNEVEN = Window(
    [
        rows_of(([0, 1, 2], [1, 2, -100]), ([3, 4, 5], [4, 5, 6])),
        rows_of(([6, 5, 4], [5, 4, -100])),
    ],
    7,
)


def small(loss_fn: Any = None, dropout: float = 0.0, precision: str = "fp32") -> StepReplayer:
    return StepReplayer(
        Small(dropout), loss_fn or LanguageModelingLoss(), Precision(precision, CPU), Ranks()
    )


def by_hand(model: nn.Module, smoothing: float = 0.0) -> tuple[float, list[Tensor]]:
    """Return loss and gradients of all rows at once: torch's mean over the targets that count."""
    logits = model(torch.cat([batch["input_ids"] for batch in UNEVEN.micro_batches]))
    targets = torch.cat([batch["target_ids"] for batch in UNEVEN.micro_batches])
    loss = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, label_smoothing=smoothing
    )
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_replay_has_the_loss_and_gradient_of_all_its_tokens_at_once(smoothing):
    replayer = small(LanguageModelingLoss(label_smoothing=smoothing))
    replay = replayer.replay(UNEVEN, watch=True)
    loss, gradients = by_hand(replayer.model, smoothing)
    assert replay.loss == pytest.approx(loss, rel=1e-6)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert replay.grad_norm == pytest.approx(norm, rel=1e-5)
    # What the modules saw: the loss of each micro-batch, and the gradient of the logits.
    losses = [it for it in replay.statistics if (it.module, it.kind) == ("loss", "output")]
    assert sum(it.largest for it in losses) == pytest.approx(7 * loss, rel=1e-6)
    assert [it.shape for it in losses] == [(), ()]
    if not smoothing:
        batch = UNEVEN.micro_batches[0]
        logits, targets = replayer.model(batch["input_ids"]), batch["target_ids"]
        expected = (logits.softmax(-1) - F.one_hot(targets.clamp(0), 7)) / 7
        expected[targets < 0] = 0
        first = next(it for it in replay.statistics if (it.module, it.kind) == ("head", "gradient"))
        assert first.shape == (2, 3, 7)
        assert (first.smallest, first.largest) == pytest.approx(
            (expected.min().item(), expected.max().item()), rel=1e-5
        )


def test_a_replay_begins_with_the_generators_it_is_given_and_leaves_everything_as_it_was():
    replayer = small(dropout=0.5)
    model = replayer.model
    torch.manual_seed(11)
    rng = capture_generators(CPU)
    torch.rand(3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    kept = [parameter.grad for parameter in model.parameters()]
    model.eval()
    before = torch.get_rng_state()

    first, again = replayer.replay(UNEVEN, rng), replayer.replay(UNEVEN, rng)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert model.calls == 0
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        assert parameter.grad is gradient
        assert bool((gradient == 2.0).all())
    assert first == again

    assert replayer.replay(UNEVEN).loss != first.loss  # the present generators drop others
    restore_generators(rng, CPU)
    model.train()
    total = sum(
        F.cross_entropy(
            model(batch["input_ids"]).flatten(0, 1),
            batch["target_ids"].flatten(),
            reduction="sum",
        ).item()
        for batch in UNEVEN.micro_batches
    )
    assert first.loss == pytest.approx(total / 7, rel=1e-6)


def test_a_replay_that_fails_leaves_everything_as_it_was():
    class Failing(LanguageModelingLoss):
        def __call__(self, *args: Any, **options: Any) -> Tensor:
            raise RuntimeError("no loss")

    replayer = small(Failing(), dropout=0.5)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no loss"):
        replayer.replay(UNEVEN, watch=True)
    assert replayer.model.calls == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert not replayer.model.head._forward_hooks


def test_a_wide_replay_computes_in_float32():
    narrow, wide = small(precision="bf16"), small()
    assert narrow.replay(UNEVEN, narrow=False) == wide.replay(UNEVEN)
    kinds = {it.dtype for it in narrow.replay(UNEVEN, watch=True).statistics if it.module == "head"}
    assert kinds == {"bfloat16"}
    assert narrow.replay(UNEVEN, narrow=False, watch=True).statistics == (
        wide.replay(UNEVEN, watch=True).statistics
    )


def test_the_loss_of_a_single_target_is_its_own_and_of_none_is_zero():
    replayer = small()
    one = window_of(rows_of(([3, 4], [4, -100])))
    assert one.num_tokens == 1
    logits = replayer.model(torch.tensor([[3]]))[0, 0]
    assert replayer.replay(one).loss == pytest.approx(-logits.log_softmax(-1)[4].item(), rel=1e-6)
    assert replayer.replay(window_of(rows_of(([3, 4], [-100, -100])))).loss == 0.0
    assert window_of(rows_of(([0, 0], [0, 1]))).num_tokens == 2  # token 0 is one like the others


def test_statistics_are_of_the_finite_values():
    found = read("here", "output", torch.tensor([[math.nan, math.inf, -2.0], [-math.inf, 3.0, 0]]))
    assert (found.module, found.kind, found.shape, found.dtype) == (
        "here",
        "output",
        (2, 3),
        "float32",
    )
    assert (found.smallest, found.largest, found.num_nan, found.num_inf) == (-2.0, 3.0, 1, 2)
    none = read("here", "output", torch.full((2,), math.nan))
    assert math.isnan(none.smallest)
    assert math.isnan(none.largest)
    assert none.is_bad
    assert found.is_bad
    assert read("", "output", torch.tensor([math.inf])).is_bad
    assert not read("", "output", torch.ones(1)).is_bad


@pytest.mark.parametrize(
    ("loss", "norm", "finite"),
    [(1.0, 1.0, True), (math.nan, 1.0, False), (1.0, math.inf, False)],
)
def test_a_replay_is_finite_where_loss_and_gradient_are(loss, norm, finite):
    assert Replay(loss, norm).is_finite is finite


class Poisoned(LanguageModelingLoss):
    """Breaks the loss, or only its gradient, of each target that is a bad token.

    Args:
        token: the bad one.
        gradient: break only the gradient.
        broken: whether it breaks anything at present.
    """

    def __init__(self, token: int, gradient: bool = False, broken: Any = lambda: True) -> None:
        super().__init__()
        self.token, self.gradient, self.broken = token, gradient, broken

    def __call__(self, logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        loss = super().__call__(logits, targets, reduction)
        hit = targets == self.token
        if not (hit.any() and self.broken()):
            return loss
        if self.gradient:
            return loss + (logits * 0).sum().abs().sqrt()  # 0, with a gradient of 0 times infinity
        return loss * math.nan


@pytest.mark.parametrize(
    ("token", "expected"), [(0, [BadRow(0, 0, 0)]), (5, [BadRow(0, 1, 2), BadRow(1, 0, 1)])]
)
def test_bad_rows_are_found_in_each_micro_batch_with_their_first_bad_token(token, expected):
    replayer = small()
    with torch.no_grad():
        replayer.model.table.weight[token] = math.nan
    assert replayer.bad_rows(UNEVEN, capture_generators(CPU)) == expected


@pytest.mark.parametrize(
    ("token", "expected"), [(2, [BadRow(0, 0, -1)]), (4, [BadRow(0, 1, -1), BadRow(1, 0, -1)])]
)
def test_a_row_whose_gradient_is_bad_has_no_bad_token(token, expected):
    rows = small(Poisoned(token, gradient=True)).bad_rows(UNEVEN, capture_generators(CPU))
    assert rows == expected


def test_three_worst_rows_are_given_and_the_highest_first():
    replayer = small()
    batch = UNEVEN.micro_batches[0]
    more = {name: rows.flip(0) for name, rows in batch.items()}
    window = Window([*UNEVEN.micro_batches, more], 12)
    losses = []
    for number, part in enumerate(window.micro_batches):
        each = F.cross_entropy(
            replayer.model(part["input_ids"]).transpose(1, 2), part["target_ids"], reduction="none"
        )
        losses += [(-row.mean().item(), number, index) for index, row in enumerate(each)]
    found = [(place.micro_batch, place.row) for place in replayer.worst_rows(window)]
    assert found == [(number, row) for _, number, row in sorted(losses)[:3]]


def diagnosis(loss_fn: Any, good: Window | None, earlier: Any = False, **options: Any) -> Diagnosis:
    """Diagnose UNEVEN; `earlier` is what entering the earlier weights yields, or calls."""

    @contextmanager
    def earlier_weights() -> Iterator[bool]:
        yield earlier() if callable(earlier) else earlier

    replayer = small(loss_fn, **options)
    return replayer.diagnose(UNEVEN, capture_generators(CPU), good, earlier_weights)


GOOD = Window([rows_of(([0, 1], [1, 2]))], 2)


def test_the_verdict_follows_from_what_is_finite():
    whole = LanguageModelingLoss()
    assert diagnosis(whole, GOOD).verdict == "transient"
    assert diagnosis(whole, GOOD).bad_rows == ()
    data = diagnosis(Poisoned(6), GOOD)
    assert data.verdict == "data"
    assert [(it.micro_batch, it.row) for it in data.bad_rows] == [(0, 1)]
    assert diagnosis(Poisoned(6), GOOD, earlier=True).verdict == "data"  # bad with those as well
    # A batch that was good is bad by now: the weights.
    assert diagnosis(Poisoned(2), GOOD).verdict == "divergence"
    # Without such a batch: the weights if every row is bad.
    assert diagnosis(Poisoned(6), None).verdict == "data"
    assert diagnosis(Poisoned(-100), None).verdict == "data"
    assert diagnosis(EveryRow(), None).verdict == "divergence"
    assert diagnosis(EveryRow(), GOOD, precision="bf16").verdict == "divergence"


class EveryRow(LanguageModelingLoss):
    """Breaks every loss, in any type."""

    def __call__(self, logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return super().__call__(logits, targets, reduction) * math.nan


class OnlyNarrow(LanguageModelingLoss):
    """Breaks every loss of logits in bfloat16."""

    def __call__(self, logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        factor = math.nan if logits.dtype == torch.bfloat16 else 1.0
        return super().__call__(logits, targets, reduction) * factor


def test_what_is_finite_in_float32_is_a_matter_of_precision():
    assert diagnosis(OnlyNarrow(), GOOD, precision="bf16").verdict == "precision"


def test_data_that_only_the_present_weights_break_are_told_from_data_that_all_break():
    broken = [True]
    loss_fn = Poisoned(6, broken=lambda: broken[0])

    def mended() -> bool:
        broken[0] = False
        return True

    found = diagnosis(loss_fn, GOOD, earlier=mended)
    assert found.verdict == "data_with_weights"
    assert [(it.micro_batch, it.row) for it in found.bad_rows] == [(0, 1)]

    broken[0] = True

    def none_kept() -> bool:
        broken[0] = False
        return False

    assert diagnosis(loss_fn, GOOD, earlier=none_kept).verdict == "data"


def test_a_bad_gradient_of_a_weight_is_named_where_every_recorded_tensor_is_finite():
    replayer = small()
    replayer.model.head.bias.register_hook(lambda gradient: gradient * math.nan)
    replay = replayer.replay(UNEVEN, watch=True)
    found = replay.first_bad("parameter")
    assert found is not None
    assert (found.module, found.kind, found.shape) == ("head", "parameter", (7,))
    assert [it.module for it in replay.statistics if it.is_bad] == ["head"]
    assert not replay.is_finite
    assert Diagnosis("data", replay).first_bad_backward == found
    assert Diagnosis("data", replay).first_bad_forward is None
    # A bad output says more than the gradients that follow from it.
    replayer = small(EveryRow())
    kinds = {it.kind for it in replayer.replay(UNEVEN, watch=True).statistics if it.is_bad}
    assert "parameter" not in kinds
    assert "output" in kinds


def test_an_incident_is_told_in_one_line():
    told = str(Incident(7, "loss nan", "data", "its window is passed over"))
    assert told == "step 7: loss nan; verdict: data; its window is passed over"
