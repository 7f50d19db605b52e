"""One step and one evaluation pass, against arithmetic written out and bitwise copies of state."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision
from fundamentallm.data.batch import Window
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import UniformModel, tiny_loaders, tiny_model
from fundamentallm.training.evaluator import Evaluator, evaluate_batch
from fundamentallm.training.losses import ChunkedCrossEntropy, LanguageModelingLoss
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.step import StepOutput, TrainStep, perplexity_of, undisturbed

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
VOCABULARY = 11
LENGTH = 8


class Bench:
    """A step with everything around it, and a record of the events."""

    def __init__(
        self,
        model: nn.Module | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
        max_grad_norm: float | None = None,
        precision: Precision = FP32,
        optimizer: torch.optim.Optimizer | None = None,
        max_grad_value: float | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.model = model if model is not None else tiny_model(VOCABULARY, LENGTH)
        self.optimizer = optimizer or OptimizerBuilder.build("adamw", self.model, 0.01)
        self.events: list[TrainingEvents] = []
        self.on_event: Callable[[TrainingEvents], Any] = lambda event: None
        self.step = TrainStep(
            self.model,
            self.model,
            self.optimizer,
            loss_fn or LanguageModelingLoss(),
            precision,
            Ranks(),
            max_grad_norm,
            self.notify,
            max_grad_value,
        )

    def notify(self, event: TrainingEvents) -> None:
        self.events.append(event)
        self.on_event(event)

    def take(self, window: Window) -> StepOutput:
        sequences = sum(len(batch["input_ids"]) for batch in window.micro_batches)
        return self.step(window, window.num_tokens, sequences)

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        )

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.reshape(-1) for p in self.model.parameters()])


def window(num_micro_batches: int = 3, rows: int = 2, masked: int = 0, seed: int = 0) -> Window:
    """Random tokens; the first `masked` targets of each row are left out."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_micro_batches):
        ids = torch.randint(VOCABULARY, (rows, LENGTH + 1), generator=generator)
        targets = ids[:, 1:].clone()
        targets[:, :masked] = -100
        batches.append({"input_ids": ids[:, :-1].contiguous(), "target_ids": targets})
    return Window(batches, num_micro_batches * rows * (LENGTH - masked))


def naive_nll(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[float, int]:
    """Summed NLL and valid targets, one target at a time in Python floats."""
    terms = []
    with torch.no_grad():
        for batch in batches:
            logits = model(batch["input_ids"]).double()
            for row, targets in zip(logits.tolist(), batch["target_ids"].tolist(), strict=True):
                for scores, target in zip(row, targets, strict=True):
                    if target >= 0:
                        top = max(scores)
                        log_total = top + math.log(math.fsum(math.exp(x - top) for x in scores))
                        terms.append(log_total - scores[target])
    return math.fsum(terms), len(terms)


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_same_bits(actual[key], expected[key])
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same_bits(one, other)
    elif isinstance(actual, Tensor):
        assert actual.dtype == expected.dtype
        assert actual.numpy().tobytes() == expected.numpy().tobytes()
    else:
        assert actual == expected


# ---------------------------------------------------------------- an accepted update


def test_output_counts_tokens_and_sequences_and_has_the_loss_before_the_update():
    bench = Bench()
    share = window(masked=3)
    nll, count = naive_nll(bench.model, share.micro_batches)
    before = bench.state()
    output = bench.take(share)
    assert output.num_tokens == count == 30
    assert output.num_sequences == 6
    assert output.rejection == ""
    assert output.loss == pytest.approx(nll / count, rel=1e-6)
    for name, value in bench.model.state_dict().items():
        assert not torch.equal(value, before["model"][name]), name


def test_loss_of_a_uniform_model_is_the_logarithm_of_the_vocabulary():
    output = Bench(UniformModel(VOCABULARY)).take(window(masked=2))
    assert output.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_events_come_once_for_each_micro_batch_then_gradients_then_update():
    for num in (1, 3, 5):
        bench = Bench()
        bench.take(window(num))
        assert bench.events == [
            *[TrainingEvents.FLLM_MICRO_BATCH_COMPLETED] * num,
            TrainingEvents.FLLM_GRADIENTS_READY,
            TrainingEvents.FLLM_OPTIMIZER_STEPPED,
        ]


def test_weights_change_between_the_gradients_event_and_the_update_event():
    bench = Bench()
    seen = {}
    bench.on_event = lambda event: seen.setdefault(event, bench.state()["model"])
    before = bench.state()["model"]
    bench.take(window())
    assert_same_bits(seen[TrainingEvents.FLLM_MICRO_BATCH_COMPLETED], before)
    assert_same_bits(seen[TrainingEvents.FLLM_GRADIENTS_READY], before)
    assert_same_bits(seen[TrainingEvents.FLLM_OPTIMIZER_STEPPED], bench.state()["model"])


def test_before_its_first_window_a_step_knows_neither_loss_nor_norm():
    step = Bench(max_grad_norm=0.5).step
    assert math.isnan(step.loss)
    assert math.isnan(step.norm)
    assert (step.clip_norm, step.veto, step.veto_details) == (0.5, "", "")
    assert not step.vetoes_possible


def test_one_valid_target_is_enough_for_an_update():
    bench = Bench()
    share = window(1, rows=1, masked=LENGTH - 1)
    nll, count = naive_nll(bench.model, share.micro_batches)
    output = bench.take(share)
    assert (output.rejection, output.num_tokens, count) == ("", 1, 1)
    assert output.loss == pytest.approx(nll, rel=1e-6)


def test_parameters_without_a_gradient_have_a_norm_of_zero():
    class Aside(UniformModel):
        """What learns is not among the parameters."""

        def __init__(self) -> None:
            super().__init__(VOCABULARY)
            self.offset = [torch.zeros(VOCABULARY, requires_grad=True)]

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.offset[0].expand(*input_ids.shape, -1)

    output = Bench(Aside()).take(window())
    assert (output.rejection, output.grad_norm) == ("", 0.0)


def test_the_type_of_the_loss_may_change_between_two_steps():
    model = tiny_model(VOCABULARY, LENGTH)
    bench = Bench(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    narrow = bench.take(window())
    model.double()
    wide = bench.take(window())
    assert (wide.loss, wide.grad_norm) == pytest.approx((narrow.loss, narrow.grad_norm), rel=1e-5)
    assert wide.loss != narrow.loss


def test_gradients_of_an_earlier_step_leave_no_trace():
    fresh, used = Bench(), Bench()
    for parameter in used.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    assert used.take(window()) == fresh.take(window())
    assert_same_bits(used.state(), fresh.state())


def test_frozen_parameters_stay_and_count_for_nothing():
    whole, model = Bench(), tiny_model(VOCABULARY, LENGTH)
    model.load_state_dict(whole.model.state_dict())
    name, frozen = next(iter(model.named_parameters()))
    frozen.requires_grad_(False)
    before = frozen.clone()
    output = Bench(model).take(window())
    norm = whole.take(window()).grad_norm
    rest = [p.grad.reshape(-1) for n, p in whole.model.named_parameters() if n != name]
    assert output.grad_norm == pytest.approx(float(torch.cat(rest).norm()), rel=1e-5)
    assert output.grad_norm < 0.99 * norm
    assert torch.equal(frozen, before)


# ---------------------------------------------------------------- clipping


def test_norm_is_measured_before_clipping_and_the_update_sees_the_clipped_gradient():
    free, clipped = Bench(), Bench(max_grad_norm=0.05)
    norm = free.take(window()).grad_norm
    output = clipped.take(window())
    assert norm == pytest.approx(float(free.gradient().norm()), rel=1e-5)
    assert norm > 0.1
    assert output.grad_norm == norm
    assert float(clipped.step.grad_norm) == pytest.approx(norm, rel=1e-6)
    assert float(clipped.gradient().norm()) == pytest.approx(0.05, rel=1e-4)
    torch.testing.assert_close(clipped.gradient(), free.gradient() * (0.05 / norm))


def test_a_gradient_below_the_limit_is_left_alone():
    free, wide = Bench(), Bench(max_grad_norm=1e3)
    assert free.take(window()) == wide.take(window())
    assert_same_bits(wide.state(), free.state())


@pytest.mark.parametrize("share", [1.0005, 4.0])
def test_a_gradient_is_clipped_as_soon_as_it_is_above_the_limit(share):
    norm = Bench().take(window()).grad_norm
    clipped = Bench(max_grad_norm=norm / share)
    clipped.take(window())
    assert float(clipped.gradient().norm()) == pytest.approx(norm / share, rel=1e-4)


def test_a_tiny_gradient_is_clipped_to_a_limit_that_is_tinier():
    share = 8e-6 / Bench().take(window()).grad_norm

    def faint(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return share * LanguageModelingLoss()(logits, targets, reduction)

    bench = Bench(loss_fn=faint, max_grad_norm=2e-6)
    assert bench.take(window()).grad_norm == pytest.approx(8e-6, rel=1e-3)
    assert 1e-6 < float(bench.gradient().norm()) <= 2e-6


def test_each_element_is_clipped_to_its_own_limit():
    free, clipped = Bench(), Bench(max_grad_value=0.01)
    free.take(window())
    clipped.take(window())
    assert float(free.gradient().abs().max()) > 0.02
    assert torch.equal(clipped.gradient(), free.gradient().clamp(-0.01, 0.01))


@pytest.mark.parametrize(
    ("limit", "norms", "expected"),
    [(None, [0.05], 0.05), (0.08, [0.05], 0.05), (0.05, [0.08], 0.05), (None, [0.05, 0.08], 0.05)],
)
def test_a_controller_may_lower_the_limit_of_one_step(limit, norms, expected):
    bench = Bench(max_grad_norm=limit)
    free = Bench(max_grad_norm=limit)

    def lower(event: TrainingEvents) -> None:
        if event == TrainingEvents.FLLM_GRADIENTS_READY:
            for norm in norms:
                bench.step.clip_to(norm)

    bench.on_event = lower
    assert bench.take(window()).grad_norm > 0.1
    assert float(bench.gradient().norm()) == pytest.approx(expected, rel=1e-4)
    bench.on_event = lambda event: None
    bench.model.load_state_dict(free.model.state_dict())
    bench.take(window())
    free.take(window())
    assert torch.equal(bench.gradient(), free.gradient())


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan])
def test_a_limit_that_is_no_number_above_zero_is_refused(norm):
    with pytest.raises(ValueError, match="above 0"):
        Bench().step.clip_to(norm)


def test_observers_of_the_gradients_event_see_them_whole_and_unclipped():
    bench = Bench(max_grad_norm=0.05)
    norms = []

    def note(event: TrainingEvents) -> None:
        if event == TrainingEvents.FLLM_GRADIENTS_READY:
            norms.append((float(bench.gradient().norm()), float(bench.step.grad_norm)))

    bench.on_event = note
    output = bench.take(window())
    assert norms == [(pytest.approx(output.grad_norm, rel=1e-5), pytest.approx(output.grad_norm))]
    assert output.grad_norm > 0.1


def test_clipping_follows_the_unscaling_of_half_precision():
    model = tiny_model(VOCABULARY, LENGTH)
    plain = Bench(copy.deepcopy(model), max_grad_norm=0.05)
    half = Bench(copy.deepcopy(model), max_grad_norm=0.05, precision=fp16(2.0**10))
    norm = plain.take(window()).grad_norm
    output = half.take(window())
    assert output.rejection == ""
    assert output.grad_norm == pytest.approx(norm, rel=0.02)
    assert float(half.gradient().norm()) == pytest.approx(0.05, rel=1e-3)


# ---------------------------------------------------------------- refused updates


def fp16(scale: float) -> Precision:
    precision = Precision("fp16", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return precision


class Fault:
    """A loss that is spoilt in one micro-batch: its value, or only its gradient."""

    is_nll = True

    def __init__(self, value: float, in_gradient: bool, at: int) -> None:
        self.value, self.in_gradient, self.at = value, in_gradient, at
        self.calls = 0

    def __call__(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        loss = LanguageModelingLoss()(logits, targets, reduction)
        self.calls += 1
        if self.calls - 1 != self.at:
            return loss
        if self.in_gradient:
            loss.register_hook(lambda grad: grad * self.value)
            return loss
        return loss + self.value


def warmed(**options: Any) -> Bench:
    """A bench whose optimizer has state that a wrong update could spoil."""
    bench = Bench(**options)
    loss_fn, bench.step.loss_fn = bench.step.loss_fn, LanguageModelingLoss()
    for seed in (7, 8):
        assert bench.take(window(seed=seed)).rejection == ""
    bench.step.loss_fn = loss_fn
    bench.events.clear()
    return bench


def assert_left_alone(bench: Bench, before: dict[str, Any]) -> None:
    assert_same_bits(bench.state(), before)
    assert all(p.grad is None for p in bench.model.parameters())
    assert TrainingEvents.FLLM_OPTIMIZER_STEPPED not in bench.events


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("in_gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_number_refuses_the_update_and_changes_no_bit(value, in_gradient, at):
    bench = warmed(loss_fn=Fault(value, in_gradient, at), max_grad_norm=1.0)
    before = bench.state()
    output = bench.take(window())
    assert output.rejection == "nonfinite"
    assert math.isfinite(output.loss) == in_gradient
    assert in_gradient <= (not math.isfinite(output.grad_norm))
    assert_left_alone(bench, before)
    assert bench.events[-1] == TrainingEvents.FLLM_GRADIENTS_READY
    # The next step is as if the refused one had never been.
    twin = warmed(max_grad_norm=1.0)
    assert bench.take(window(seed=5)) == twin.take(window(seed=5))
    assert_same_bits(bench.state(), twin.state())


def test_one_nonfinite_gradient_entry_is_enough():
    bench = warmed()
    before = bench.state()

    def spoil(event: TrainingEvents) -> None:
        if bench.events == [TrainingEvents.FLLM_MICRO_BATCH_COMPLETED] * 3:
            list(bench.model.parameters())[-1].grad.view(-1)[-1] = math.nan

    bench.on_event = spoil
    assert bench.take(window()).rejection == "nonfinite"
    assert_left_alone(bench, before)


def test_a_veto_refuses_the_update_for_one_step():
    bench = warmed()
    before = bench.state()

    def object_(event: TrainingEvents) -> None:
        if event == TrainingEvents.FLLM_GRADIENTS_READY:
            bench.step.veto, bench.step.veto_details = "too steep", "ten times the median"

    bench.on_event = object_
    bench.step.vetoes_possible = True
    output = bench.take(window())
    assert (output.rejection, output.details) == ("too steep", "ten times the median")
    assert math.isfinite(output.loss)
    assert math.isfinite(output.grad_norm)
    assert_left_alone(bench, before)
    bench.on_event = lambda event: None
    assert bench.take(window()).rejection == ""


def test_a_vetoed_step_counts_for_nothing_in_the_loss_scale():
    precision = fp16(2.0**10)
    precision.scaler.set_growth_interval(2)
    bench = Bench(precision=precision)
    bench.step.vetoes_possible = True
    bench.on_event = lambda event: setattr(bench.step, "veto", "too steep")
    for _ in range(4):
        assert bench.take(window()).rejection == "too steep"
    assert precision.scaler.state_dict()["_growth_tracker"] == 0
    assert precision.scaler.get_scale() == 2.0**10
    bench.on_event = lambda event: None
    for _ in range(2):  # two steps that were applied let it grow
        assert bench.take(window()).rejection == ""
    assert precision.scaler.get_scale() == 2.0**11


def test_a_nonfinite_loss_outranks_a_veto():
    bench = warmed(loss_fn=Fault(math.nan, False, 0))
    bench.on_event = lambda event: bench.step.__dict__.update(veto="too steep", veto_details="so")
    output = bench.take(window())
    assert (output.rejection, output.details) == ("nonfinite", "")


def test_a_window_without_targets_is_refused_before_the_model_is_asked():
    bench = warmed()
    before = bench.state()
    bench.model.register_forward_hook(lambda *_: pytest.fail("the model was called"))
    output = bench.take(window(masked=LENGTH))
    assert (output.rejection, output.num_tokens, output.num_sequences) == ("empty", 0, 6)
    assert math.isnan(output.loss)
    assert math.isnan(output.grad_norm)
    assert_left_alone(bench, before)
    assert bench.events == []


def test_an_fp16_overflow_refuses_the_update_and_lowers_the_scale():
    precision = fp16(2.0**10)
    bench = warmed(precision=precision)
    scale = precision.scaler.get_scale()
    bench.step.loss_fn = Fault(math.inf, True, 1)
    before = bench.state()
    output = bench.take(window())
    assert output.rejection == "overflow"
    assert math.isfinite(output.loss)
    assert_left_alone(bench, before)
    assert precision.scaler.get_scale() == scale / 2
    bench.step.loss_fn = LanguageModelingLoss()
    assert bench.take(window()).rejection == ""


def test_a_scale_too_large_for_half_precision_comes_down_until_steps_go_through():
    precision = fp16(2.0**30)
    bench = Bench(precision=precision)
    before = bench.state()
    rejections = []
    while not rejections or rejections[-1]:
        assert len(rejections) < 40
        if rejections:
            assert_left_alone(bench, before)
        rejections.append(bench.take(window()).rejection)
    assert set(rejections[:-1]) == {"overflow"}
    assert precision.scaler.get_scale() == 2.0 ** (30 - len(rejections) + 1)


def test_a_nan_loss_in_fp16_is_no_overflow():
    bench = warmed(precision=fp16(2.0**10))
    bench.step.loss_fn = Fault(math.nan, False, 1)
    before = bench.state()
    assert bench.take(window()).rejection == "nonfinite"
    assert_left_alone(bench, before)


# ---------------------------------------------------------------- other objectives


def test_a_smoothed_objective_moves_the_weights_and_the_plain_likelihood_is_logged():
    plain, smooth = Bench(), Bench(loss_fn=LanguageModelingLoss(label_smoothing=0.3))
    nll, count = naive_nll(plain.model, window(masked=1).micro_batches)
    output = smooth.take(window(masked=1))
    assert output.loss == pytest.approx(nll / count, rel=1e-6)
    assert output.grad_norm != pytest.approx(plain.take(window(masked=1)).grad_norm, rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_loss_on_hidden_states_takes_the_same_step(smoothing):
    whole = Bench(loss_fn=LanguageModelingLoss(smoothing), max_grad_norm=0.5)
    parts = Bench(loss_fn=ChunkedCrossEntropy(5, smoothing), max_grad_norm=0.5)
    wanted, output = whole.take(window(masked=2)), parts.take(window(masked=2))
    assert output.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert output.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
    torch.testing.assert_close(parts.gradient(), whole.gradient(), rtol=1e-4, atol=1e-7)


def test_a_bare_function_is_an_objective_whose_likelihood_is_measured_apart():
    def hinge(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return logits.square().sum()

    bench = Bench(loss_fn=hinge)
    nll, count = naive_nll(bench.model, window().micro_batches)
    assert bench.take(window()).loss == pytest.approx(nll / count, rel=1e-6)


# ---------------------------------------------------------------- evaluation


def evaluate(
    model: nn.Module, batches: list[dict[str, Tensor]], loss_fn: Callable[..., Tensor] | None = None
) -> Evaluator:
    evaluator = Evaluator(model, FP32, loss_fn=loss_fn)
    evaluator.run(batches)
    return evaluator


def validation_batches() -> list[dict[str, Tensor]]:
    # The last one is padded with masked targets.
    batches = list(tiny_loaders(LENGTH)[1])
    assert (batches[-1]["target_ids"] < 0).any()
    return batches


def test_evaluation_is_the_sum_over_every_target():
    model = tiny_model(VOCABULARY, LENGTH).eval()
    batches = validation_batches()
    nll, count = naive_nll(model, batches)
    output = evaluate(model, batches)
    assert output.num_tokens == count == 79
    assert output.nll == pytest.approx(nll, rel=1e-6)
    assert output.state.metrics["loss"] == pytest.approx(nll / count, rel=1e-6)
    assert output.state.metrics["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-6)


def test_evaluation_in_float64_has_the_digits_of_float64():
    model = tiny_model(VOCABULARY, LENGTH).double().eval()
    batches = validation_batches()
    nll, _ = naive_nll(model, batches)
    assert evaluate(model, batches).nll == pytest.approx(nll, rel=1e-14)


def test_evaluation_adds_up_in_float64_where_float32_would_lose_terms():
    # Each batch adds 1 to 2^24, which float32 cannot count beyond.
    losses = iter([2.0**24, *[1.0] * 50])

    class Fixed:
        takes_hidden_states = True

        def nll(self, hidden: Tensor, model: nn.Module, targets: Tensor) -> Tensor:
            return torch.tensor(next(losses))

    class Model(UniformModel):
        def forward(self, input_ids: Tensor, return_hidden: bool = False) -> Tensor:
            assert return_hidden
            return super().forward(input_ids)

    batch = {"input_ids": torch.zeros(1, 1).long(), "target_ids": torch.zeros(1, 1).long()}
    output = evaluate(Model(2), [batch] * 51, Fixed())
    assert (output.nll, output.num_tokens) == (2.0**24 + 50, 51)


def test_one_batch_gives_its_sum_and_count_without_a_graph():
    model = tiny_model(VOCABULARY, LENGTH)
    batch = window(1, masked=3).micro_batches[0]
    nll, count, _ = evaluate_batch(model, batch, FP32)
    wanted, num_valid = naive_nll(model, [batch])
    assert count == num_valid == 10
    assert not nll.requires_grad
    assert float(nll) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_loss_on_hidden_states_is_evaluated_without_the_full_logits(smoothing):
    model = tiny_model(VOCABULARY, LENGTH)
    widths = []
    handle = model.register_forward_hook(lambda m, args, out: widths.append(out.size(-1)))
    batches = validation_batches()
    output = evaluate(model, batches, ChunkedCrossEntropy(3, smoothing))
    handle.remove()
    assert set(widths) == {16}
    assert output.nll == pytest.approx(naive_nll(model, batches)[0], rel=1e-6)


def test_smoothing_of_the_objective_does_not_enter_the_evaluation():
    model = tiny_model(VOCABULARY, LENGTH)
    smooth = LanguageModelingLoss(label_smoothing=0.4)
    smoothed = evaluate(model, validation_batches(), smooth)
    plain = evaluate(model, validation_batches())
    assert (smoothed.nll, smoothed.num_tokens) == (plain.nll, plain.num_tokens)


def test_no_targets_give_nan_and_not_a_perfect_score():
    model = tiny_model(VOCABULARY, LENGTH)
    for batches in ([], window(2, masked=LENGTH).micro_batches):
        output = evaluate(model, batches)
        assert (output.nll, output.num_tokens) == (0.0, 0)
        assert math.isnan(output.state.metrics["loss"])
        assert math.isnan(output.state.metrics["perplexity"])


def test_a_pass_may_be_cut_short_after_each_batch():
    model = tiny_model(VOCABULARY, LENGTH)
    modes = [module.training for module in model.modules()]
    batches = validation_batches()
    evaluator = Evaluator(model, FP32)
    asked = []
    evaluator.leaves = lambda: bool(asked.append(evaluator.state.iteration))
    whole = dict(evaluator.run(batches).metrics)
    assert asked == list(range(1, len(batches) + 1))
    asked.clear()

    def leave_at_the_second() -> bool:
        asked.append(evaluator.state.iteration)
        return len(asked) == 2

    evaluator.leaves = leave_at_the_second
    assert evaluator.run(batches).metrics == {}
    assert asked == [1, 2]
    assert [module.training for module in model.modules()] == modes
    evaluator.leaves = lambda: False
    assert evaluator.run(batches).metrics == whole


class Restless(nn.Module):
    """Draws from every generator at each call and notes the modes; may fail."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(VOCABULARY))
        self.frozen_part = nn.Dropout(0.5)
        self.live_part = nn.Dropout(0.5)
        self.fails = fails
        self.seen: list[list[bool]] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        self.seen.append([module.training for module in self.modules()])
        torch.rand(3), np.random.rand(3), random.random()
        if self.fails and len(self.seen) == 2:
            raise RuntimeError("no luck")
        return self.bias.expand(*input_ids.shape, -1)


def draws() -> list[float]:
    """The next numbers of each generator, which stay the next."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    numbers = [float(torch.rand(())), np.random.rand(), random.random()]
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    return numbers


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_leaves_generators_and_each_module_s_mode_as_they_were(fails):
    model = Restless(fails)
    model.train()
    model.frozen_part.eval()
    before = draws()
    if fails:
        with pytest.raises(RuntimeError, match="no luck"):
            evaluate(model, validation_batches())
    else:
        evaluate(model, validation_batches())
    assert model.seen
    assert not any(map(any, model.seen))
    assert (model.training, model.frozen_part.training, model.live_part.training) == (
        True,
        False,
        True,
    )
    assert draws() == before


def test_the_restless_model_would_be_noticed():
    before = draws()
    Restless()(torch.zeros(1, 1).long())
    assert all(now != then for now, then in zip(draws(), before, strict=True))


def test_undisturbed_restores_after_an_exception_in_its_body():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())

    def body() -> None:
        with undisturbed(model):
            assert not any(module.training for module in model.modules())
            model[1].train()
            torch.rand(1)
            raise KeyError

    before = draws()
    with pytest.raises(KeyError):
        body()
    assert [module.training for module in model.modules()] == [True, True, False]
    assert draws() == before


def test_evaluation_between_two_steps_changes_nothing_of_the_second():
    quiet = Bench(tiny_model(VOCABULARY, LENGTH, dropout=0.3))
    twin = Bench(copy.deepcopy(quiet.model))
    for bench in (quiet, twin):
        torch.manual_seed(3)
        bench.take(window())
        if bench is twin:
            evaluate(bench.model, validation_batches())
        bench.take(window(seed=1))
    assert_same_bits(twin.state(), quiet.state())


def test_perplexity_is_the_exponential_and_never_raises():
    assert perplexity_of(0.0) == 1.0
    assert perplexity_of(math.log(11)) == pytest.approx(11)
    assert perplexity_of(709.0) == math.exp(709.0)
    assert perplexity_of(710.0) == math.inf
    assert perplexity_of(math.inf) == math.inf
    assert math.isnan(perplexity_of(math.nan))
