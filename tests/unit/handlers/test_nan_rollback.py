"""Numerical faults put into real training: the verdict, what is done, and when it gives up."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision
from fundamentallm.compute.rng import capture_generators
from fundamentallm.config.training import TrainingConfig
from fundamentallm.errors import NumericalError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.handlers import (
    Checkpointing,
    Evaluation,
    LossEMA,
    NaNRollback,
    Perplexity,
    Schedule,
)
from fundamentallm.training.handlers import nan_rollback as module
from fundamentallm.training.interventions import Interventions
from fundamentallm.training.losses import compute_loss
from fundamentallm.training.recovery.diagnosis import Incident
from fundamentallm.training.step import StepOutput
from fundamentallm.training.trainer import Trainer

Loss = Callable[..., Tensor]


class Plain:
    """The plain loss; what is spoilt derives from it."""

    is_nll = True
    trainer: Trainer

    def __call__(self, logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        return self.spoil(compute_loss(logits, targets, reduction), logits, targets)

    def spoil(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return loss


class Once(Plain):
    """Breaks the first time that a step is computed, never again: the machine erred."""

    def __init__(self, *steps: int, factor: float = math.nan) -> None:
        self.steps = set(steps)
        self.factor = factor

    def spoil(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        if self.trainer.state.iteration in self.steps:
            self.steps.remove(self.trainer.state.iteration)
            return loss * self.factor
        return loss


class Data(Plain):
    """Breaks on the sequences of some steps, whoever computes them."""

    def __init__(self, *steps: int, row: int = 2, factor: float = math.nan) -> None:
        train, _ = tiny_loaders()
        self.rows = [
            train.window_at(*divmod(step - 1, len(train))).micro_batches[0]["target_ids"][row]
            for step in steps
        ]
        self.factor = factor

    def spoil(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        hit = any(torch.equal(row, bad) for row in targets for bad in self.rows)
        return loss * self.factor if hit and self.also(logits) else loss

    def also(self, logits: Tensor) -> bool:
        return True


class DataInNarrow(Data):
    """Breaks on some sequences in bfloat16 alone."""

    def also(self, logits: Tensor) -> bool:
        return logits.dtype == torch.bfloat16


class DataWithWeights(Data):
    """Breaks on some sequences while the weights are those of the step that met them first."""

    weights: Tensor | None = None

    def also(self, logits: Tensor) -> bool:
        weights = next(iter(self.trainer.model.parameters())).detach()
        if self.weights is None:
            self.weights = weights.clone()
        return torch.equal(weights, self.weights)


def make_trainer(
    directory: Path | None,
    loss_fn: Plain | None = None,
    rollback: NaNRollback | None = None,
    **options: Any,
) -> Trainer:
    torch.manual_seed(3)
    train, val = tiny_loaders()
    fields = {"total_steps": 14, "eval_steps": 4, "learning_rate": 1e-2, **options}
    handlers: list[Any] = [rollback or NaNRollback(), LossEMA(0.8), Perplexity(), Evaluation()]
    if directory is not None:
        handlers.append(Checkpointing(directory))
    loss_fn = loss_fn or Plain()
    trainer = Trainer(
        tiny_model(dropout=0.1),
        train,
        val,
        loss_fn=loss_fn,
        device="cpu",
        config=TrainingConfig(**fields),
        handlers=handlers,
    )
    loss_fn.trainer = trainer
    Schedule(trainer.scheduler).attach(trainer)
    return trainer


def run(trainer: Trainer) -> list[Incident]:
    """Run to the end; return the incidents."""
    incidents: list[Incident] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_INCIDENT_DETECTED, lambda: incidents.append(trainer.state.incident)
    )
    trainer.run()
    return incidents


def assert_same_run(one: Trainer, other: Trainer) -> None:
    for (name, a), b in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.history.steps == other.history.steps
    # A window that was passed over has a loss of NaN, which equals nothing.
    seen = [
        [
            0.0 if step in t.interventions.skipped else loss
            for step, loss in enumerate(t.history.train_loss, 1)
        ]
        for t in (one, other)
    ]
    assert json.dumps(seen[0]) == json.dumps(seen[1])
    assert one.history.lr == other.history.lr
    assert one.history.loss_ema == other.history.loss_ema
    assert one.history.validations == other.history.validations
    assert one.history.epochs == other.history.epochs
    for name in ("tokens_seen", "optimizer_steps", "evaluations"):
        assert getattr(one.state, name) == getattr(other.state, name), name


def told(directory: Path, ledger: dict[str, Any], **options: Any) -> Trainer:
    """A clean run that is given a ledger."""
    trainer = make_trainer(directory, **options)
    trainer.interventions.load_state_dict(ledger)
    assert run(trainer) == []
    return trainer


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trainer]:
    """Return a clean run that passes over the given steps; each is made once."""

    @cache
    def passing_over(*steps: int) -> Trainer:
        return told(tmp_path_factory.mktemp("clean"), {"skipped": list(steps), "cuts": []})

    return passing_over


# Within an epoch, at its first and last step, right after a checkpoint, at the run's ends; each
# with one of the values here, and with the two others in the long run.
STEPS = [1, 5, 6, 10, 11, 14]
FACTORS = [math.nan, math.inf, -math.inf]
FAULTS = [
    pytest.param(step, factor, marks=[] if place % 3 == number else pytest.mark.long)
    for place, step in enumerate(STEPS)
    for number, factor in enumerate(FACTORS)
]


# ------------------------------------------------------------------ verdicts and actions


@pytest.mark.parametrize(("step", "factor"), FAULTS)
def test_a_transient_fault_leaves_no_trace_in_the_run(tmp_path, clean, step, factor):
    broken = make_trainer(tmp_path / "broken", Once(step, factor=factor))
    (incident,) = run(broken)
    assert incident.verdict == "transient"
    assert broken.interventions.skipped == set()
    assert broken.state.rollbacks == 0
    assert_same_run(broken, clean())


@pytest.mark.parametrize(("step", "factor"), FAULTS)
def test_bad_data_is_passed_over_and_nothing_else(tmp_path, clean, step, factor):
    broken = make_trainer(tmp_path / "broken", Data(step, factor=factor))
    (incident,) = run(broken)
    assert incident.verdict == "data"
    assert broken.interventions.state_dict() == {"skipped": [step], "cuts": []}
    assert broken.state.rollbacks == 0
    assert incident.diagnosis is not None
    assert [(bad.micro_batch, bad.row) for bad in incident.diagnosis.bad_rows] == [(0, 2)]
    assert_same_run(broken, clean(step))


def test_two_bad_sequences_of_one_window_are_both_found(tmp_path):
    loss = Data(6, row=0)
    loss.rows += Data(6, row=3).rows
    (incident,) = run(make_trainer(tmp_path, loss))
    assert incident.diagnosis is not None
    assert [bad.row for bad in incident.diagnosis.bad_rows] == [0, 3]


def test_data_that_is_bad_with_these_weights_alone_is_told_apart(tmp_path, clean):
    broken = make_trainer(tmp_path / "broken", DataWithWeights(6))
    (incident,) = run(broken)
    assert incident.verdict == "data_with_weights"
    assert_same_run(broken, clean(6))


def test_what_is_finite_in_float32_is_a_matter_of_precision(tmp_path):
    broken = make_trainer(tmp_path / "broken", DataInNarrow(6), precision="bf16")
    (incident,) = run(broken)
    assert incident.verdict == "precision"
    clean = told(tmp_path / "told", {"skipped": [6], "cuts": []}, precision="bf16")
    assert_same_run(broken, clean)


def diverge(trainer: Trainer, *steps: int) -> None:
    """Make the weights such that no batch is finite, the first time that a step comes."""
    left = set(steps)

    def spoil() -> None:
        if trainer.state.iteration in left:
            left.remove(trainer.state.iteration)
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.mul_(1e30)

    trainer.add_event_handler(Events.ITERATION_STARTED, spoil)


@pytest.mark.parametrize("step", [3, 9, 12])
def test_a_divergence_goes_back_to_where_the_run_was_healthy(tmp_path, step):
    rollback = NaNRollback(healthy_after=4, neighbours=1, rate_factor=0.25, rate_steps=3)
    broken = make_trainer(tmp_path / "broken", rollback=rollback)
    diverge(broken, step)
    went_to: list[int] = []
    broken.add_event_handler(
        TrainingEvents.FLLM_ROLLED_BACK, lambda: went_to.append(broken.state.iteration)
    )
    (incident,) = run(broken)
    assert incident.verdict == "divergence"
    # The newest checkpoint with four good steps behind it, the first one if there is none.
    restored = max((c for c in (0, 4, 8, 10, 12) if c + 4 < step), default=0)
    assert went_to == [restored]
    assert broken.interventions.state_dict() == {
        "skipped": [step - 1, step, step + 1],
        "cuts": [[restored + 1, step + 2, 0.25]],
    }
    assert broken.history.lr[step] == pytest.approx(0.25e-2)
    assert_same_run(broken, told(tmp_path / "told", broken.interventions.state_dict()))


def test_a_way_back_passes_over_what_only_a_stop_has_saved(tmp_path):
    whole = make_trainer(tmp_path / "whole", rollback=NaNRollback(healthy_after=2))
    diverge(whole, 12)
    run(whole)

    stopped = make_trainer(tmp_path / "stopped", rollback=NaNRollback(healthy_after=2))
    stopped.add_event_handler(
        Events.ITERATION_STARTED,
        lambda: stopped.interrupt_run(15) if stopped.state.iteration == 9 else None,
    )
    assert run(stopped) == []
    assert (tmp_path / "stopped" / "step-00000009").is_dir()
    resumed = make_trainer(tmp_path / "stopped", rollback=NaNRollback(healthy_after=2))
    resumed.resume(tmp_path / "stopped" / "step-00000009")
    diverge(resumed, 12)
    (incident,) = run(resumed)
    assert "going back to step 8" in incident.decision
    assert resumed.interventions.state_dict() == whole.interventions.state_dict()
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_distance_and_neighbourhood_double_with_each_retry(tmp_path):
    rollback = NaNRollback(healthy_after=2, neighbours=1, rate_steps=5)
    trainer = make_trainer(tmp_path, rollback=rollback)
    diverge(trainer, 10, 13)  # the second one in the region of the first
    incidents = run(trainer)
    assert [incident.verdict for incident in incidents] == ["divergence", "divergence"]
    assert trainer.interventions.skipped == {9, 10, 11} | {11, 12, 13, 14, 15}
    assert [cut.first for cut in trainer.interventions.cuts] == [5, 9]


def went_to_after(directory: Path, *faults: int) -> list[int]:
    """Return where divergences take a run that keeps every step's checkpoint."""
    rollback = NaNRollback(healthy_after=2, neighbours=0, rate_steps=3)
    trainer = make_trainer(None, rollback=rollback, total_steps=24, checkpoint_steps=1)
    Checkpointing(directory, n_saved=24).attach(trainer)
    diverge(trainer, *faults)
    went_to: list[int] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_ROLLED_BACK, lambda: went_to.append(trainer.state.iteration)
    )
    run(trainer)
    return went_to


def test_a_retry_in_a_region_goes_twice_as_far_back(tmp_path):
    # Two good steps behind step 7, then four behind step 6: 7, 8, 9 and 11.
    assert went_to_after(tmp_path, 10, 12) == [7, 6]


def test_it_is_said_where_no_checkpoint_has_proved_healthy(tmp_path):
    trainer = make_trainer(tmp_path, rollback=NaNRollback(healthy_after=10))
    diverge(trainer, 10)
    (incident,) = run(trainer)
    assert "none has proved healthy" in incident.decision


def test_a_region_ends(tmp_path):
    assert went_to_after(tmp_path, 10, 18) == [7, 15]


class WithTheseWeights(Plain):
    """Breaks on every window but the last one that was applied, while the weights are those."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.good: list[Tensor] = []
        self.weights: Tensor | None = None

    def spoil(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        weights = next(iter(self.trainer.model.parameters())).detach()
        if self.trainer.state.iteration < self.step:
            self.good.extend(targets)
            return loss
        if self.weights is None:
            self.weights = weights.clone()
        known = all(any(torch.equal(row, good) for good in self.good) for row in targets)
        return loss if known or not torch.equal(weights, self.weights) else loss * math.nan


def test_weights_that_are_blamed_for_one_window_after_another_are_left(tmp_path):
    # The checkpoint of step 8 has the weights that break: not to be taken for other ones.
    trainer = make_trainer(tmp_path, WithTheseWeights(9))
    verdicts = [incident.verdict for incident in run(trainer)]
    assert verdicts == ["data_with_weights", "data_with_weights", "divergence"]
    assert trainer.state.rollbacks == 1
    assert trainer.finished


def test_a_refused_update_enters_no_average(tmp_path):
    class Infinite(Data):
        def spoil(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
            hit = any(torch.equal(row, bad) for row in targets for bad in self.rows)
            if hit and logits.requires_grad:
                logits.register_hook(lambda gradient: gradient * math.inf)
            return loss  # finite

    broken = make_trainer(tmp_path / "broken", Infinite(6))
    (incident,) = run(broken)
    assert incident.verdict == "data"
    assert_same_run(broken, told(tmp_path / "told", {"skipped": [6], "cuts": []}))


@pytest.mark.parametrize(
    "option",
    [
        "max_rollbacks",
        "max_per_region",
        "max_overflows",
        "max_transients",
        "max_spikes",
        "healthy_after",
        "neighbours",
        "rate_steps",
    ],
)
def test_refuses_a_negative_count(option):
    with pytest.raises(ValueError, match=option):
        NaNRollback(**{option: -1})


def test_running_statistics_are_as_before_a_refused_step(tmp_path):
    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()
            self.norm = torch.nn.BatchNorm1d(self.inner.config.vocab_size)

        def forward(self, input_ids: Tensor) -> Tensor:
            logits = self.inner(input_ids)
            if self.training and iteration() == 6 and not tried:
                tried.append(6)
                logits = logits * math.nan
            return self.norm(logits.flatten(0, 1)).view_as(logits)

    def train(directory: Path) -> Trainer:
        torch.manual_seed(3)
        trainer = Trainer(
            Normed(),
            *tiny_loaders(),
            device="cpu",
            config=TrainingConfig(total_steps=9, eval_steps=4, learning_rate=1e-2),
            handlers=[NaNRollback(), Evaluation(), Checkpointing(directory)],
        )
        trainers.append(trainer)
        trainer.run()
        return trainer

    trainers: list[Trainer] = []
    tried: list[int] = []

    def iteration() -> int:
        return trainers[-1].state.iteration

    broken = train(tmp_path / "broken")
    assert tried == [6]
    clean = train(tmp_path / "clean")
    for name, value in clean.model.state_dict().items():
        assert torch.equal(broken.model.state_dict()[name], value), name


def test_without_a_controller_refusals_are_said(caplog):
    torch.manual_seed(3)
    trainer = Trainer(
        tiny_model(),
        *tiny_loaders(),
        loss_fn=(loss_fn := Once(*range(3, 15))),
        device="cpu",
        config=TrainingConfig(total_steps=14, learning_rate=1e-2),
    )
    loss_fn.trainer = trainer
    with caplog.at_level("WARNING"):
        trainer.run()
    said = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(said) == 2  # the 1st and the 10th of 12
    assert "step 3: update refused (nonfinite): loss nan" in said[0]


def test_a_learning_rate_that_is_no_number_never_meets_the_weights(tmp_path):
    broken = make_trainer(tmp_path / "broken")
    left = [6]

    def spoil() -> None:
        if [broken.state.iteration] == left:
            left.clear()
            broken.optimizer.param_groups[0]["lr"] = math.nan

    broken.add_event_handler(Events.ITERATION_STARTED, spoil)
    (incident,) = run(broken)
    assert incident.verdict == "state"
    assert broken.state.rollbacks == 1
    assert all(bool(torch.isfinite(p).all()) for p in broken.model.parameters())
    assert_same_run(broken, told(tmp_path / "clean", {"skipped": [], "cuts": []}))


@pytest.mark.parametrize("step", [5, 6, 7, 8])
def test_damage_to_the_moments_is_healed_before_a_checkpoint_holds_it(tmp_path, step):
    broken = make_trainer(tmp_path / "broken", rollback=NaNRollback(healthy_after=0, neighbours=0))
    left = [step]

    def spoil() -> None:
        if [broken.state.iteration] == left:
            left.clear()
            broken.optimizer.state[next(iter(broken.model.parameters()))]["exp_avg"][0] = math.nan

    broken.add_event_handler(Events.ITERATION_COMPLETED, spoil)
    (incident,) = run(broken)
    assert incident.verdict == ("state" if step in (7, 8) else "divergence")
    assert broken.state.rollbacks == 1
    assert broken.finished
    for name in ("step-00000012", "step-00000014"):
        broken.restore_point.store.verify(tmp_path / "broken" / name)  # type: ignore[union-attr]
    if step in (7, 8):  # nothing was passed over
        assert_same_run(broken, told(tmp_path / "clean", {"skipped": [], "cuts": []}))


def test_without_a_controller_a_damaged_state_is_not_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    for handler in trainer._event_handlers[TrainingEvents.FLLM_STATE_DAMAGED][:]:
        trainer.remove_event_handler(handler[0], TrainingEvents.FLLM_STATE_DAMAGED)

    def spoil() -> None:
        if trainer.state.iteration == 4:
            with torch.no_grad():
                next(iter(trainer.model.parameters())).view(-1)[0] = math.inf

    trainer.add_event_handler(Events.ITERATION_COMPLETED, spoil)
    with pytest.raises(Exception, match="not finite"):
        trainer.run()
    assert not (tmp_path / "step-00000004").exists()


def test_a_fault_that_no_replay_shows_takes_the_run_back(tmp_path):
    broken = make_trainer(tmp_path / "broken")

    def spoil() -> None:
        if broken.state.iteration == 6:
            next(iter(broken.model.parameters())).grad.view(-1)[0] = math.nan

    broken.add_event_handler(TrainingEvents.FLLM_MICRO_BATCH_COMPLETED, spoil)
    incidents = run(broken)
    assert [incident.verdict for incident in incidents] == ["transient", "unexplained"]
    assert broken.interventions.skipped == {6}
    assert broken.state.rollbacks == 1
    assert_same_run(broken, told(tmp_path / "told", broken.interventions.state_dict()))


def test_without_checkpoints_the_window_alone_is_skipped():
    trainer = make_trainer(None, Data(5))
    (incident,) = run(trainer)
    assert incident.verdict == "data"
    assert trainer.state.rollbacks == 0
    assert trainer.state.optimizer_steps == 13
    assert math.isnan(trainer.history.train_loss[4])


# ------------------------------------------------------------------ bounds


class Always(Plain):
    """Breaks from a step on, whatever the data."""

    def __init__(self, first: int) -> None:
        self.first = first

    def spoil(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return loss * math.nan if self.trainer.state.iteration >= self.first else loss


def test_a_lasting_divergence_ends_within_the_bounds_of_a_region(tmp_path):
    trainer = make_trainer(tmp_path, Always(6), NaNRollback(max_per_region=3), total_steps=100)
    with pytest.raises(NumericalError, match="after 3 rollbacks in this region") as error:
        trainer.run()
    assert error.value.exit_code == 20
    assert trainer.state.rollbacks == 3
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())


def test_lasting_bad_data_ends_within_the_bounds_of_a_run(tmp_path):
    trainer = make_trainer(tmp_path, Data(*range(2, 15)), NaNRollback(max_rollbacks=4))
    with pytest.raises(NumericalError, match="after 4 incidents"):
        trainer.run()
    assert len(trainer.interventions.skipped) == 4


def test_a_machine_that_errs_at_every_step_is_given_up(tmp_path):
    trainer = make_trainer(tmp_path, Once(*range(1, 15)), NaNRollback(max_transients=3))
    with pytest.raises(NumericalError, match="transient for the 4th time"):
        trainer.run()
    assert trainer.state.iteration == 4


def test_a_resumed_run_has_no_fresh_allowance(tmp_path):
    first = make_trainer(tmp_path, Data(2, 7), NaNRollback(max_rollbacks=2))
    assert len(run(first)) == 2
    resumed = make_trainer(tmp_path, Data(15), NaNRollback(max_rollbacks=2), total_steps=18)
    resumed.resume(tmp_path / "step-00000014")
    with pytest.raises(NumericalError, match="after 2 incidents"):
        resumed.run()


def test_overflows_count_only_in_a_row(tmp_path):
    handler = NaNRollback(max_overflows=3)
    trainer = make_trainer(None, rollback=handler)

    def overflow(times: int) -> None:
        for _ in range(times):
            trainer.state.output = trainer.state.output.__class__(2.0, math.inf, 8, 1, "overflow")
            handler.judge(trainer)

    trainer.run(max_iters=1)
    for _ in range(4):
        overflow(2)
        handler.note_good_window(trainer)
    with pytest.raises(NumericalError, match="3 fp16 overflows in a row"):
        overflow(3)


def test_a_controllers_own_refusal_is_no_fault(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_event_handler(
        TrainingEvents.FLLM_GRADIENTS_READY,
        lambda engine: engine.reject_step("too large") if engine.state.iteration == 5 else None,
    )
    assert run(trainer) == []
    assert trainer.state.skipped_steps == 1
    assert trainer.interventions.skipped == set()


# ------------------------------------------------------------------ evidence


def test_the_evidence_names_place_text_and_metrics_and_keeps_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2")

    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join("abcdefghijk"[token] for token in ids)

    rollback = NaNRollback(run_dir=tmp_path, tokenizer=Letters())  # type: ignore[arg-type]
    trainer = make_trainer(tmp_path / "checkpoints", Data(6), rollback)
    run(trainer)
    (directory,) = (tmp_path / "incidents").iterdir()
    assert directory.name == "00000006-data"
    text = (directory / "report.json").read_text()
    assert "hunter2" not in text
    report = json.loads(text)
    assert text == json.dumps(report, indent=2) + "\n"
    assert report["window"] == []  # the bad sequences say more
    assert report["first_bad"]["forward"]["module"] == "loss"
    (bad,) = report["bad_sequences"]
    window = trainer.train_loader.window_at(0, 5)
    ids = window.micro_batches[0]["input_ids"][2].tolist()
    assert bad["token_ids"] == ids
    assert bad["text"] == Letters().decode(ids)
    assert bad["corpus_offset"] == trainer.train_loader.rows_at(0, 5)[2]
    assert [entry["step"] for entry in report["metrics"]] == [1, 2, 3, 4, 5]
    assert report["checkpoint"]["name"] == "step-00000004"
    assert report["verdict"] == "data"


def test_a_report_has_the_metrics_of_the_last_two_hundred_steps():
    handler, state = NaNRollback(), SimpleNamespace(metrics={"train/lr": 0.5})
    for step in range(1, 206):
        state.iteration, state.output = step, StepOutput(2.0, 1.0, 8, 1)
        handler.note_metrics(SimpleNamespace(state=state))  # type: ignore[arg-type]
    steps = [entry["step"] for entry in handler._metrics]
    assert steps == list(range(6, 206))
    expected = {"step": 205, "loss": 2.0, "grad_norm": 1.0, "lr": 0.5, "rejection": ""}
    assert handler._metrics[-1] == expected


def test_a_disk_that_is_full_does_not_stop_the_healing(tmp_path, caplog):
    (tmp_path / "incidents").write_text("a file in the way")
    trainer = make_trainer(None, Data(6), NaNRollback(run_dir=tmp_path))
    assert len(run(trainer)) == 1
    assert trainer.finished
    assert "the evidence cannot be written" in caplog.text


def test_a_second_incident_of_a_step_leaves_the_evidence_of_the_first(tmp_path, caplog):
    for _ in range(2):
        run(make_trainer(None, Once(2), NaNRollback(run_dir=tmp_path), total_steps=2))
    first, second = sorted(path.name for path in (tmp_path / "incidents").iterdir())
    assert first == "00000002-transient"
    assert second.startswith(first)
    for name in (first, second):
        assert report_of(tmp_path, name)["step"] == 2
        assert f"evidence: {tmp_path / 'incidents' / name}" in caplog.text


def test_evidence_is_for_the_user_who_runs(tmp_path):
    before = os.umask(0o022)
    try:
        run(make_trainer(None, Once(2), NaNRollback(run_dir=tmp_path / "new"), total_steps=2))
    finally:
        os.umask(before)
    path = tmp_path / "new" / "incidents" / "00000002-transient"
    modes = [each.stat().st_mode & 0o777 for each in (path, path.parent, path.parent.parent)]
    assert modes == [0o700, 0o700, 0o755]


def test_evidence_is_not_written_through_a_link(tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "incidents").symlink_to("elsewhere")
    run(make_trainer(None, Once(2), NaNRollback(run_dir=tmp_path), total_steps=2))
    assert "the evidence cannot be written" in caplog.text
    assert list((tmp_path / "elsewhere").iterdir()) == []


def report_of(directory: Path, name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(
        (directory / "incidents" / name / "report.json").read_text()
    )
    return report


def test_the_evidence_names_the_checkpoint_that_a_resumed_run_began_with(tmp_path):
    run(make_trainer(tmp_path / "checkpoints", total_steps=6))
    resumed = make_trainer(tmp_path / "checkpoints", Data(7), NaNRollback(run_dir=tmp_path))
    resumed.resume(tmp_path / "checkpoints" / "step-00000006")
    run(resumed)
    assert report_of(tmp_path, "00000007-data")["checkpoint"]["name"] == "step-00000006"


def test_a_checkpoint_without_its_manifest_costs_no_report(tmp_path):
    trainer = make_trainer(tmp_path / "checkpoints", Data(6), NaNRollback(run_dir=tmp_path))

    def spoil() -> None:
        if trainer.state.iteration == 5:
            (trainer.state.last_checkpoint / "MANIFEST.json").write_text("{")  # type: ignore[operator]

    trainer.add_event_handler(Events.ITERATION_COMPLETED, spoil)
    run(trainer)
    checkpoint = report_of(tmp_path, "00000006-data")["checkpoint"]
    assert checkpoint["name"] == "step-00000004"
    assert "MANIFEST.json" in checkpoint["error"]


def evidence_of(directory: Path, name: str) -> tuple[str, dict[str, Any]]:
    (path,) = (directory / "incidents" / name / "evidence").iterdir()
    return path.name, CheckpointStore(path.parent).read(path)


def test_the_evidence_of_a_transient_fault_has_the_window_and_the_random_numbers(tmp_path):
    trainer = make_trainer(None, Once(6), NaNRollback(run_dir=tmp_path))
    before: list[Tensor] = []

    def note() -> None:
        if trainer.state.iteration == 6:
            before.append(torch.get_rng_state())

    trainer.add_event_handler(Events.ITERATION_STARTED, note)
    run(trainer)
    window = trainer.train_loader.window_at(0, 5).micro_batches[0]["input_ids"]
    report = report_of(tmp_path, "00000006-transient")
    assert [entry["token_ids"] for entry in report["window"]] == window.tolist()
    assert [entry["corpus_offset"] for entry in report["window"]] == [
        int(offset) for offset in trainer.train_loader.rows_at(0, 5)
    ]
    name, state = evidence_of(tmp_path, "00000006-transient")
    assert name == "step-00000005"
    assert state["model"] == {}
    assert torch.equal(state["generators"]["torch"], before[0])
    assert torch.equal(state["window"][0]["input_ids"], window)


@pytest.mark.parametrize("part", ["weight", "moment"])
def test_the_evidence_of_a_damaged_state_says_what_is_damaged(tmp_path, part):
    rollback = NaNRollback(run_dir=tmp_path)
    trainer = make_trainer(tmp_path / "checkpoints", rollback=rollback)
    left = [8]

    def spoil() -> None:
        if [trainer.state.iteration] == left:
            left.clear()
            weight = next(iter(trainer.model.parameters()))
            with torch.no_grad():
                (weight if part == "weight" else trainer.optimizer.state[weight]["exp_avg"])[0] = (
                    math.inf
                )

    trainer.add_event_handler(Events.ITERATION_COMPLETED, spoil)
    (incident,) = run(trainer)
    report = report_of(tmp_path, "00000008-state")
    name, state = evidence_of(tmp_path, "00000008-state")
    assert name == "step-00000008"
    assert report["modules"]
    if part == "weight":
        assert "model.token_embedding.weight" in incident.fault
        assert report["first_bad"]["forward"]["module"] == "token_embedding"
        assert not bool(torch.isfinite(state["model"]["token_embedding.weight"]).all())
    else:
        assert "optimizer.state.0.exp_avg" in incident.fault
        assert report["first_bad"] == {"forward": None, "backward": None}


# ------------------------------------------------------------------ decisions, without training


class AsSeen:
    """A run as the handler sees it: what it asks, and what it tells the run to do.

    Args:
        step: the present one.
        checkpoints: their steps.
        loss_fn: of the replays.
        ranks: of the run.
    """

    def __init__(
        self,
        step: int = 10,
        checkpoints: tuple[int, ...] = (),
        loss_fn: Plain | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        torch.manual_seed(3)
        self.model = tiny_model(num_layers=1)
        self.loss_fn = loss_fn or Plain()
        self.precision = Precision("fp32", torch.device("cpu"))
        self.ranks = ranks or Ranks()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.train_loader, _ = tiny_loaders()
        self.window = self.train_loader.window_at(0, 0)
        self.epochs = SimpleNamespace(position=lambda step: (0, step))
        self.generators_before = capture_generators(self.precision.device)
        self.interventions = Interventions()
        self.attached: dict[str, Any] = {}
        self.state = SimpleNamespace(iteration=step, metrics={})
        self.checkpoints = checkpoints
        self.asked: list[int | None] = []  # before which step's end the weights are to be
        self.earlier: dict[str, Tensor] | None = None
        self.went_back: list[int | None] = []
        self.redone: list[int] = []
        self.incidents: list[Incident] = []

    def restore_step(self, before: int | None = None) -> int | None:
        early = [it for it in self.checkpoints if before is None or it <= before]
        return max(early, default=min(self.checkpoints, default=None))

    def weights_before(self, before: int | None = None) -> dict[str, Tensor] | None:
        self.asked.append(before)
        return self.earlier

    def roll_back(self, reason: str, before: int | None = None) -> None:
        self.went_back.append(self.restore_step(before))

    def redo_step(self) -> None:
        self.redone.append(self.state.iteration)

    def report_incident(self, incident: Incident) -> None:
        self.incidents.append(incident)

    def refuse(self, handler: NaNRollback, rejection: str, step: int = 0, details: str = "") -> Any:
        """Refuse the present step, or another one, and return the incident."""
        self.state.iteration = step or self.state.iteration
        self.state.output = StepOutput(2.0, 1.0, 8, 1, rejection, details)
        handler.judge(self)  # type: ignore[arg-type]
        return self.incidents[-1]

    def apply(self, handler: NaNRollback, *steps: int) -> None:
        """Apply the updates of some steps, and come back to the present one."""
        present = self.state.iteration
        for self.state.iteration in steps:
            handler.note_good_window(self)  # type: ignore[arg-type]
        self.state.iteration = present


COUNTS = {
    "max_rollbacks": 10,
    "max_per_region": 3,
    "max_overflows": 30,
    "max_transients": 100,
    "max_spikes": 100,
    "healthy_after": 10,
    "neighbours": 1,
    "rate_steps": 100,
}


def test_the_options_have_their_documented_defaults_and_bounds():
    handler = NaNRollback()
    assert {name: getattr(handler, name) for name in COUNTS} == COUNTS
    assert handler.rate_factor == 0.5
    assert NaNRollback(**dict.fromkeys(COUNTS, 0), rate_factor=1.0).state_dict() == {
        "total": 0,
        "transients": 0,
        "spikes": 0,
        "region_end": 0,
        "in_region": 0,
        "overflows": 0,
        "blamed": 0,
        "good_steps": [],
    }
    for factor in (0.0, 1.5):
        with pytest.raises(ValueError, match="rate_factor"):
            NaNRollback(rate_factor=factor)


@pytest.mark.parametrize(
    ("healthy_after", "max_per_region", "kept"),
    [(3, 2, 12), (1, 10, 1024), (1, 20, 1024), (0, 3, 1), (2, 0, 2)],
)
def test_as_many_good_steps_are_known_as_the_last_retry_needs(healthy_after, max_per_region, kept):
    handler, run = NaNRollback(healthy_after=healthy_after, max_per_region=max_per_region), AsSeen()
    run.apply(handler, *range(1, 1100))
    assert handler.state_dict()["good_steps"] == list(range(1100 - kept, 1100))


DIVERGED = [
    # healthy_after, checkpoints, where to, skipped, steps with a lower rate, a part of the decision
    (2, (0, 4, 6, 7, 8), 7, {9, 10, 11}, (8, 12), "going back to step 7, without"),
    (2, (0, 6, 8), 6, {9, 10, 11}, (7, 12), "of steps 9 to 11, learning rate x 0.5 for 3 steps"),
    (2, (8, 9), 8, {9, 10, 11}, (9, 12), "step 8 (the oldest kept: none has proved healthy), wi"),
    (9, (0, 8), 0, {9, 10, 11}, (1, 12), "going back to step 0, without"),
    (0, (8, 9), 9, {10, 11}, (10, 12), "going back to step 9, without the windows of steps 10 to"),
    (20, (0, 9), 0, {9, 10, 11}, (1, 12), "step 0 (the oldest kept: none has proved healthy), wi"),
    (2, (), None, {10, 11}, (10, 12), "continuing from here, without the windows of steps 10 to"),
]


@pytest.mark.parametrize(("healthy", "checkpoints", "to", "skipped", "slow", "said"), DIVERGED)
def test_a_divergence_leads_before_the_good_steps_that_prove_health(
    healthy, checkpoints, to, skipped, slow, said
):
    handler = NaNRollback(healthy_after=healthy, rate_steps=3)
    run = AsSeen(10, checkpoints)
    run.apply(handler, *range(1, 10))
    incident = run.refuse(handler, "divergence")
    assert said in incident.decision
    assert run.went_back == [to]
    assert run.interventions.state_dict() == {
        "skipped": sorted(skipped),
        "cuts": [[*slow, 0.5]],
    }
    assert len(incident.diagnosis.bad_rows) == 3


def test_without_a_good_step_the_oldest_checkpoint_counts_even_if_none_is_needed():
    run = AsSeen(10, (2, 9))
    assert (
        "none has proved healthy" in run.refuse(NaNRollback(healthy_after=0), "divergence").decision
    )
    assert run.went_back == [2]


def test_another_fault_of_the_state_goes_back_to_the_newest_and_changes_no_plan():
    run = AsSeen(10, (2, 9))
    incident = run.refuse(NaNRollback(), "learning rate", details="two of three")
    assert incident.decision == "going back to step 9"
    assert incident.diagnosis.bad_rows == ()
    assert incident.diagnosis.replay.statistics
    assert run.went_back == [9]
    assert run.interventions == Interventions()


def test_a_region_ends_some_steps_after_its_last_fault():
    handler, run = NaNRollback(max_per_region=3, rate_steps=5), AsSeen(checkpoints=(0,))
    seen = []
    for step in (10, 15, 12, 21, 26):  # the last step of a region is within it
        run.refuse(handler, "learning rate", step)
        seen.append((handler.in_region, handler.region_end, handler.total))
    assert seen == [(1, 15, 1), (2, 20, 2), (3, 20, 3), (1, 26, 4), (2, 31, 5)]
    run.refuse(handler, "learning rate", 31)
    with pytest.raises(NumericalError, match="after 3 rollbacks in this region"):
        run.refuse(handler, "learning rate", 31)
    assert len(run.went_back) == 6


def test_each_retry_looks_and_skips_twice_as_far():
    handler = NaNRollback(max_per_region=4, healthy_after=1, rate_steps=50)
    run = AsSeen(40, tuple(range(40)))
    run.apply(handler, *range(1, 40))
    for _ in range(4):
        run.refuse(handler, "divergence")
        run.interventions.skipped, skipped = set(), run.interventions.skipped
    # One good step behind step 38, two behind 37, four behind 35, eight behind 31.
    assert run.went_back == [38, 37, 35, 31]
    assert skipped == set(range(32, 49))


def test_a_spike_is_skipped_with_its_worst_sequences_until_there_are_too_many():
    handler, run = NaNRollback(max_spikes=2), AsSeen()
    for step in (5, 7):
        incident = run.refuse(handler, "spike", step, details="loss 9 scales above")
        assert (incident.step, incident.verdict) == (step, "spike")
        assert "(loss 9 scales above)" in incident.fault
        assert len(incident.diagnosis.bad_rows) == 3
    assert "()" not in run.refuse(NaNRollback(), "spike", 8).fault
    with pytest.raises(NumericalError, match="after 2 spikes"):
        run.refuse(handler, "spike", 9)
    assert run.interventions.skipped == {5, 7, 8}
    assert handler.state_dict()["spikes"] == 3
    assert handler.state_dict()["total"] == 0


def test_the_first_overflow_of_too_many_gives_up_with_what_the_modules_gave():
    handler, run = NaNRollback(max_overflows=2), AsSeen()
    run.state.output = StepOutput(2.0, math.inf, 8, 1, "overflow")
    handler.judge(run)  # type: ignore[arg-type]
    assert run.incidents == []
    with pytest.raises(NumericalError, match="2 fp16 overflows in a row"):
        handler.judge(run)  # type: ignore[arg-type]
    (incident,) = run.incidents
    assert (incident.verdict, incident.decision) == ("overflow", "giving up")
    assert incident.diagnosis is not None
    assert incident.diagnosis.replay.statistics
    assert incident.diagnosis.bad_rows == ()


class NotWith(Plain):
    """Breaks on the window of a run while the model has the weights that it has now."""

    def of(self, run: AsSeen) -> None:
        self.model = run.model
        self.rows = run.window.micro_batches[0]["target_ids"]
        self.weights = next(run.model.parameters()).detach().clone()

    def spoil(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        known = any(torch.equal(row, bad) for row in targets for bad in self.rows)
        now = torch.equal(next(self.model.parameters()), self.weights)
        return loss * math.nan if known and now else loss


@pytest.mark.parametrize(("applied", "asked"), [([3, 5], 4), ([5], 4), ([], 6)])
@pytest.mark.parametrize("kept", [True, False])
def test_earlier_weights_are_those_before_the_last_applied_update(applied, asked, kept):
    run, handler = AsSeen(8, loss_fn=(loss_fn := NotWith())), NaNRollback()
    loss_fn.of(run)
    loss_fn.rows = loss_fn.rows[:2]  # without a good window every bad row would be a divergence
    run.window, window = run.train_loader.window_at(0, 1), run.window
    run.apply(handler, *applied)
    run.window = window
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.earlier = {name: tensor * 0.5 for name, tensor in before.items()} if kept else None
    incident = run.refuse(handler, "nonfinite")
    assert incident.verdict == ("data_with_weights" if kept else "data")
    assert run.asked == [asked]
    assert run.interventions.skipped == {8}
    assert handler.state_dict()["blamed"] == (1 if kept else 0)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_known_good_window_is_the_last_that_was_applied():
    run, handler = AsSeen(8), NaNRollback()
    assert handler._known_good(run) is None  # type: ignore[arg-type]
    # A process that continues knows only its step; its loader makes the window again.
    handler.load_state_dict({**handler.state_dict(), "good_steps": [2, 5]})
    again = handler._known_good(run)  # type: ignore[arg-type]
    assert again is not None
    expected = run.train_loader.window_at(0, 4).micro_batches[0]["input_ids"]
    assert torch.equal(again.micro_batches[0]["input_ids"], expected)
    run.train_loader = [run.window]  # type: ignore[assignment]
    assert handler._known_good(run) is None  # type: ignore[arg-type]
    run.apply(handler, 7)
    assert handler._known_good(run) is run.window  # type: ignore[arg-type]
    run.train_loader, _ = tiny_loaders()
    assert handler._known_good(run) is run.window  # type: ignore[arg-type]
    handler.load_state_dict({**handler.state_dict(), "good_steps": []})
    assert handler._known_good(run) is None  # type: ignore[arg-type]


class Voting(Ranks):
    """A rank of three, whose others have these shares of every vote."""

    others: tuple[int, ...] = (0, 0, 0)

    def sum_counts(self, counts: Any) -> list[int]:
        return [own + more for own, more in zip(counts, self.others, strict=True)]


@pytest.mark.parametrize(
    ("rank", "bad", "others", "writes"),
    [
        (0, False, (0, 0, 0), True),
        (1, False, (0, 0, 0), False),
        (2, False, (0, 0, 0), False),
        (1, True, (0, 0, 0), True),
        (1, True, (1, 0, 0), False),
        (1, True, (0, 0, 1), True),
        (0, False, (0, 0, 1), False),
        (0, True, (0, 1, 1), True),
    ],
)
def test_the_first_rank_whose_share_is_bad_writes_the_evidence(
    monkeypatch, tmp_path, caplog, rank, bad, others, writes
):
    written: list[Incident] = []

    def write(run_dir: Path, incident: Incident, *_: Any) -> Path:
        written.append(incident)
        return run_dir

    monkeypatch.setattr(module, "write_incident", write)
    run = AsSeen(checkpoints=(4,), ranks=(ranks := Voting(rank, 3)))
    object.__setattr__(ranks, "others", others)
    if bad:
        with torch.no_grad():
            next(run.model.parameters()).fill_(math.nan)
    run.refuse(NaNRollback(run_dir=tmp_path), "learning rate")
    assert written == run.incidents * writes
    said = [record.getMessage() for record in caplog.records if "first bad" in record.getMessage()]
    assert ["output of" in line for line in said] == ([True, False] if bad and writes else [])
    levels = {record.levelname for record in caplog.records if "step 10" in record.getMessage()}
    assert levels == ({"WARNING"} if rank == 0 else set())


def test_a_state_that_is_taken_back_replaces_what_the_steps_decide():
    saved = {
        "total": 3,
        "transients": 2,
        "spikes": 1,
        "region_end": 40,
        "in_region": 2,
        "overflows": 5,
        "blamed": 1,
        "good_steps": [7, 8, 9],
    }
    handler = NaNRollback()
    AsSeen().apply(handler, 1, 2)
    handler.load_state_dict(saved)
    assert handler.state_dict() == saved
    # As many incidents, in another course: those of the state that is loaded.
    handler.load_state_dict({**saved, "total": 1, "transients": 4, "region_end": 30})
    assert handler.state_dict() == {**saved, "total": 1, "transients": 4, "region_end": 30}
    # Fewer than are known: a rollback gives no fresh allowance.
    handler.load_state_dict({**saved, "total": 1, "transients": 2, "in_region": 1, "overflows": 0})
    known = {**saved, "total": 1, "transients": 4, "region_end": 30, "overflows": 0}
    assert handler.state_dict() == known
    without = {name: value for name, value in known.items() if name != "blamed"}
    handler.load_state_dict(without)  # a checkpoint of an earlier release
    assert handler.state_dict() == {**known, "blamed": 0}


def test_a_step_is_repeated_again_once_the_run_has_gone_back():
    run, handler = AsSeen(6, (4,)), NaNRollback()
    assert run.refuse(handler, "nonfinite").verdict == "transient"
    handler.load_state_dict(handler.state_dict())
    assert run.refuse(handler, "nonfinite").verdict == "transient"
    assert run.refuse(handler, "nonfinite").verdict == "unexplained"
    assert run.redone == [6, 6]
    assert run.went_back == [4]
    assert run.interventions.skipped == {6}
    assert (handler.transients, handler.total) == (2, 1)


@pytest.mark.parametrize(("num_bad", "said"), [(0, ""), (3, "z"), (4, "z and 1 more")])
def test_a_damaged_state_is_named_by_three_tensors(num_bad, said):
    run, handler = AsSeen(8, (4,)), NaNRollback()
    names = ["x", "y", "z", "zz"][:num_bad]
    run.model = torch.nn.ParameterDict({name: torch.full((1,), math.nan) for name in names})  # type: ignore[assignment]
    fault = module._damage(run)  # type: ignore[arg-type]
    assert fault == (f": model.x, model.y, model.{said}" if num_bad else "")
    run = AsSeen(8)
    handler.judge_state(run)  # type: ignore[arg-type]
    assert run.incidents == []  # without a checkpoint the error of the save says it
